"""When a draft model is disabled: engines run its first pass at every step, drafts or none, to keep
its cache complete.

Where drafting does not pay, that pass is left out. What a request says meanwhile is missing in the
draft model's cache for good, so only requests that came later are worth drafting for. Disabling
lasts, so what is predicted for a lone step does not decide it, but what is predicted on average.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from smart_decoding.core.running import RunningMean
from smart_decoding.integrations.chain_costs import StepCosts

DISABLED = -1  # stands for a length: no token is drafted, and the pass is left out
# Rounds of an exploration while it is disabled: the prompts of newcomers must be read first.
NEWCOMERS_RUN = 32


class DraftModelSwitch:
    """Whether the draft model is disabled, and for which requests it can still draft."""

    def __init__(self) -> None:
        self._share = StepCosts()  # of a plain step's seconds, what a step without the pass takes
        self._speedup = RunningMean()  # log of what drafting is predicted to bring over none
        self._incomplete: set[str] = set()  # requests with tokens that the draft model has not seen

    # --- when ---

    @property
    def known(self) -> bool:
        """Whether enough steps without the pass were seen to tell what disabling saves."""
        return self._share.known

    @property
    def disabled(self) -> bool:
        """Whether the pass is left out."""
        return self._speedup.mean < 0

    def decide(self, drafting: float, without: float) -> None:
        """Before a step. drafting, without: predicted tokens per second, as if the draft model had
        seen all, and without the pass."""
        self._speedup.observe(math.log(drafting / without))

    def rate(self, plain: float, batch: int) -> float:
        """Tokens per second without the pass, where a plain step with it takes `plain` seconds."""
        return batch / (plain * self._remaining(batch))

    def observe(self, costs: StepCosts, batch: int, seconds: float) -> None:
        """After a step that verified nothing and left out the pass: it tells of the pass, or of the
        machine's speed."""
        if self.disabled:
            costs.observe(batch, 0, 0, seconds / self._remaining(batch))
        else:
            self._share.observe(batch, 0, 0, seconds / costs.plain(batch))

    def _remaining(self, batch: int) -> float:
        return min(self._share.plain(batch), 1.0)

    # --- for whom it drafts ---

    def can_draft(self, id_: str) -> bool:
        """Whether the draft model has seen all of a request."""
        return id_ not in self._incomplete

    def miss(self, ids: Iterable[str]) -> None:
        """These requests get tokens that the draft model does not see."""
        self._incomplete.update(ids)

    def forget(self, alive: Mapping[str, object]) -> None:
        """Drops what is known of requests that are not in `alive`."""
        self._incomplete.intersection_update(alive)
