"""When to leave the option predicted best, so that predictions stay true, and at what cost.

Every option but the best is explored in turn, as often as a budget allows: a share of the time. An
exploration is a run of a few rounds, so that its price of switching is paid once. What is charged
is what it really lost, and further ones wait until that is earned again. A run that gained is
followed by another one at once: a drafter that has recovered is back soon. What an option needs
before its first token, as a model that has to read prompts, is earned beforehand, at the same rate,
but for a little that is lent: short answers would end before it had paid. The more requests wait
for it, the less is lent to each. All is counted in plain rounds, whose length is known for every
batch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from smart_decoding.core.calibration import HORIZON
from smart_decoding.core.costs import size_bucket

if TYPE_CHECKING:
    from smart_decoding.core.batch import Round

RUN = 2  # rounds of an exploration
LENT = HORIZON / 2  # plain rounds of a lone request at the start: a model can read its prompt


class Exploration:
    """Spends `budget` of the time, and one run more, on options that are not predicted best.

    left: rounds of the run that is going on. seconds: lost in all, gains not counted; count:
    runs."""

    def __init__(self, budget: float) -> None:
        self.budget = budget
        self.left = 0
        self.seconds = 0.0
        self.count = 0
        self._debt = 0.0  # plain rounds that explorations have lost and that are not earned yet
        self._earned = 0.0  # plain rounds, for what options need before they begin
        self._lent = LENT  # what of it is left
        self._pause = HORIZON  # rounds until the next run at least, however little it costs
        self._lost = 0.0  # seconds, by the run that is going on

    @property
    def wait(self) -> float:
        """Rounds in the best option until an exploration is due."""
        if self.budget <= 0:
            return math.inf
        return max(self._pause, math.ceil(self._debt / self.budget))

    def affords(self, price: float, size: int = 1) -> bool:
        """Whether an option's price of beginning, in plain rounds of `size` requests, has been
        earned or is lent."""
        return min(price, HORIZON) <= self._earned + self._lent / size

    def begin(self, rounds: int | None = None, price: float = 0.0, size: int = 1) -> None:
        """A run of so many rounds (None: RUN) begins with the coming one."""
        price = min(price, HORIZON)
        earned = min(price, self._earned)
        self._earned -= earned
        self._lent -= (price - earned) * size
        self.left = RUN if rounds is None else rounds
        self.count += 1
        self._lost = 0.0

    def stop(self) -> None:
        """Another option is predicted best now, and explored no longer."""
        self.left = 0

    def observe_best(self) -> None:
        """After a round in the option predicted best."""
        self._debt = max(0.0, self._debt - self.budget)
        self._earned = min(HORIZON, self._earned + self.budget)
        self._pause = max(0, self._pause - 1)

    def observe(self, loss: float, plain: float) -> bool:
        """After a round of a run, which lost so many seconds against the best option (negative:
        gained); whether the run has ended. plain: seconds of a plain round. Where rounds overlap,
        some may follow the last one of a run: each counts as a run of its own.

        A process that was stopped meanwhile must not lose the explorations of hours to come: a
        round loses no more than HORIZON plain ones."""
        self._debt = max(0.0, self._debt + min(loss / plain, HORIZON))
        self._lost += loss
        self._pause = HORIZON
        if self.left > 1:
            self.left -= 1
            return False
        lost = self._lost
        self._lost = 0.0
        self.left = 0
        self.seconds += max(lost, 0.0)
        if lost < 0:
            self.begin()
        return True


# --- rest -----------------------------------------------------------------------------------------
#
# Plain decoding that need not ask each round anew whether drafting pays.


class Rest:
    """Goes on for some rounds, as long as the batch has about as many requests.

    Its rounds are learned from all at once: behind a forward no cache is warm, and to learn from
    one takes several times as long as from one more."""

    def __init__(self) -> None:
        self._left = 0
        self._bucket = 0
        self._rounds: list[Round] = []

    def begin(self, rounds: int, size: int) -> None:
        """So many rounds from the next one on, of a batch of `size` requests."""
        self._left = rounds
        self._bucket = size_bucket(size)

    def goes_on(self, size: int) -> bool:
        """Whether the coming round is one of them."""
        if self._left and self._bucket == size_bucket(size):
            self._left -= 1
            return True
        self._left = 0
        return False

    def add(self, round: Round) -> list[Round]:
        """After a round that did not ask. Returns those to learn from now: the last round of a rest
        brings all."""
        self._rounds.append(round)
        return [] if self._left and len(self._rounds) < HORIZON else self.take()

    def take(self) -> list[Round]:
        """Those not learned from yet."""
        rounds = self._rounds
        self._rounds = []
        return rounds
