"""When to leave the option predicted best, so that predictions stay true, and at what cost.

Every option but the best is explored in turn, as often as a budget allows: a share of the time. An
exploration is a run of a few rounds, so that its price of switching is paid once, and what is
charged is what it really lost. A run that gained is followed by another one at once: a drafter that
has recovered is back soon. Costs are in plain rounds, whose length is known for every batch.
"""

from __future__ import annotations

import math

RUN = 4  # rounds of an exploration
CREDIT = 4.0  # plain rounds that may be lost at once, at the start and after a long time


class Exploration:
    """Spends `budget` of the time, and at first CREDIT, on options that are not predicted best.

    left: rounds of the run that is going on. seconds: lost in all, gains not counted; count:
    runs."""

    def __init__(self, budget: float) -> None:
        self.budget = budget
        self.left = 0
        self.seconds = 0.0
        self.count = 0
        self._credit = CREDIT
        self._lost = 0.0  # seconds, by the run that is going on

    def rounds_until(self, cost: float) -> float:
        """Rounds in the best option until an exploration that costs so many plain rounds is due."""
        if self.budget <= 0:
            return math.inf
        return max(0.0, math.ceil((cost - self._credit) / self.budget))

    def begin(self) -> None:
        """A run begins with the coming round."""
        self.left = RUN
        self.count += 1
        self._lost = 0.0

    def stop(self) -> None:
        """Another option is predicted best now, and explored no longer."""
        self.left = 0

    def observe_best(self, cost: float) -> None:
        """After a round in the option predicted best; `cost`: of what is explored next."""
        self._credit = min(self._credit + self.budget, max(CREDIT, cost))

    def observe(self, loss: float, plain: float) -> bool:
        """After a round of a run, which lost so many seconds against the best option (negative:
        gained); whether the run has ended. plain: seconds of a plain round.

        A process that was stopped meanwhile must not lose the explorations of hours to come."""
        loss = min(loss, CREDIT * plain)
        self._credit = min(self._credit - loss / plain, CREDIT)
        self._lost += loss
        self.left -= 1
        if self.left > 0:
            return False
        self.seconds += max(self._lost, 0.0)
        if self._lost < 0:
            self.begin()
        return True
