"""When a draft model is disabled: engines run its first pass at every step, drafts or none, to keep
its cache complete.

Where drafting does not pay, that pass is left out. What a request says meanwhile is missing in the
draft model's cache for good, so only requests that came later are worth drafting for. Now and then,
as a budget allows, the draft model is observed on newcomers from their first token on, to see
whether it has become worth its passes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from smart_decoding.core.exploration import Exploration
from smart_decoding.integrations.chain_costs import StepCosts

DISABLED = -1  # stands for a length: no token is drafted, and the pass is left out
MEASURED_STEPS = 6  # that tell at first what a step without the pass costs
OBSERVED_DRAFTS = 96  # before it is judged: one of each newcomer and step
AT_ONCE = 4  # newcomers at most that count in one step
# Times that drafting must be predicted slower, less those that it is predicted faster, before it is
# disabled: predictions waver.
SLOWER_STEPS = 8
# Predicted speedup that it takes to enable it again, as what was left out cannot be used.
ENABLE_SPEEDUP = 1.03


class DraftModelSwitch:
    """Whether the draft model is disabled, and for which requests it can still draft.

    observing: drafts that are still to be observed, whatever is predicted."""

    def __init__(self, budget: float) -> None:
        self.disabled = False
        self.observing = OBSERVED_DRAFTS
        self._share = StepCosts()  # of a plain step's seconds, what a step without the pass takes
        self._exploration = Exploration(budget)
        self._incomplete: set[str] = set()  # requests with tokens that the draft model has not seen
        self._to_measure = MEASURED_STEPS
        self._slower = 0

    # --- what it costs ---

    def measures(self) -> bool:
        """Whether the coming step is one of those that tell at first what disabling saves."""
        self._to_measure -= 1
        return self._to_measure >= 0

    def rate(self, plain: float, batch: int) -> float:
        """Tokens per second without the pass, where a plain step with it takes `plain` seconds."""
        return batch / (plain * self._remaining(batch))

    def _remaining(self, batch: int) -> float:
        return min(self._share.plain(batch), 1.0) if self._share.known else 1.0

    def observe(self, costs: StepCosts, batch: int, seconds: float) -> None:
        """After a step that verified nothing and left out the pass: it tells of the pass, or of the
        machine's speed."""
        if self.disabled:
            costs.observe(batch, 0, 0, seconds / self._remaining(batch))
            self._exploration.observe_best(seconds)
        else:
            self._share.observe(batch, 0, 0, seconds / costs.plain(batch))

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

    # --- when ---

    def decide(self, drafting: float, disabled: float) -> None:
        """drafting, disabled: predicted tokens per second, as if it could draft for all."""
        if self.observing:
            return
        slower = drafting < disabled * (ENABLE_SPEEDUP if self.disabled else 1.0)
        self._slower = max(self._slower + (1 if slower else -1), 0)
        self.disabled = slower and (self.disabled or self._slower >= SLOWER_STEPS)

    def observes(self, ids: Sequence[str], cost: float) -> bool:
        """Whether the draft model is observed in the coming step, whatever is predicted: at the
        start, and now and then while it is disabled, if there are newcomers.

        cost: seconds of such a step beyond one without the pass."""
        newcomers = min(sum(map(self.can_draft, ids)), AT_ONCE)
        if not self.observing and self.disabled and newcomers:
            whole = OBSERVED_DRAFTS / newcomers * cost
            if self._exploration.due(whole):
                self.observing = OBSERVED_DRAFTS
                self._exploration.observe(whole)
        self.observing = max(self.observing - newcomers, 0)
        return self.observing > 0 and newcomers > 0
