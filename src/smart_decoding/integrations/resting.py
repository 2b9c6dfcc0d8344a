"""When a draft model rests: engines run its first pass at every step, drafts or none, to keep its
cache complete.

Where drafting does not pay, that pass is left out. What a request says meanwhile is missing in the
draft model's cache for good, so only requests that came later are worth drafting for; at times, as
a budget allows, it listens to newcomers from their first token on, to see whether it has become
worth its passes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from smart_decoding.core.probing import Prober
from smart_decoding.integrations.chain_costs import StepCosts

REST = -1  # stands for a length: no token is drafted, and the pass is left out
TRIAL = 6  # steps that tell at first what a step without the pass costs
LISTEN, AT_ONCE = (
    96,
    4,
)  # drafts that are heard before it is judged (one of each newcomer and step, of so many at most)
# times more that drafting must promise less than that it promises more, before it sleeps: promises
# waver
SURE = 8
# what drafting must promise over resting to be taken up again, as what rests have lost cannot be
# used
BACK = 1.03


class Rests:
    """Whether the draft model rests, and for which requests it can still draft."""

    def __init__(self, budget: float) -> None:
        self.asleep = False
        self.listening = LISTEN  # drafts that are still to be heard, whatever is believed of it
        self._share = StepCosts()  # of a plain step's seconds, what a step without the pass takes
        self._prober = Prober(budget)
        self._missed: set[str] = set()  # requests that have lost tokens to a rest
        self._trial = TRIAL
        self._doubts = 0  # how much oftener of late drafting promised less than resting, not more

    # --- what it costs ---

    def trial(self) -> bool:
        """Whether the coming step is one of those that tell at first what a rest costs."""
        self._trial -= 1
        return self._trial >= 0

    def rate(self, plain: float, batch: int) -> float:
        """Tokens per second without the pass, where a plain step with it takes `plain` seconds."""
        return batch / (plain * self._left(batch))

    def _left(self, batch: int) -> float:
        return min(self._share.plain(batch), 1.0) if self._share.known else 1.0

    def observe(self, costs: StepCosts, batch: int, seconds: float) -> None:
        """After a step that verified nothing and left out the pass: it tells of the pass, or of the
        machine's speed."""
        plain = costs.plain(batch)
        if not self.asleep:
            self._share.observe(batch, 0, 0, seconds / plain)
        else:
            costs.observe(batch, 0, 0, seconds / self._left(batch))
            self._prober.ordinary_round(seconds)

    # --- for whom it drafts ---

    def whole(self, id_: str) -> bool:
        return id_ not in self._missed

    def miss(self, ids: Iterable[str]) -> None:
        self._missed.update(ids)

    def forget(self, alive: Mapping[str, object]) -> None:
        self._missed.intersection_update(alive)

    # --- when ---

    def decide(self, drafting: float, resting: float) -> None:
        """drafting, resting: tokens per second that either promises, if all requests were whole."""
        if self.listening:
            return
        worse = drafting < resting * (BACK if self.asleep else 1.0)
        self._doubts = max(self._doubts + (1 if worse else -1), 0)
        self.asleep = worse and (self.asleep or self._doubts >= SURE)

    def listens(self, ids: Sequence[str], price: float) -> bool:
        """Whether the draft model is heard in the coming step, whatever is believed of it: at the
        start, and at times while it is asleep, if there are newcomers. price: seconds that it
        costs."""
        newcomers = min(sum(map(self.whole, ids)), AT_ONCE)
        if (
            not self.listening
            and self.asleep
            and newcomers
            and self._prober.due(LISTEN / newcomers * price)
        ):
            self.listening = LISTEN
            self._prober.probe_round(LISTEN / newcomers * price)
        self.listening = max(self.listening - newcomers, 0)
        return self.listening > 0 and newcomers > 0
