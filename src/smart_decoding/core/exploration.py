"""When to leave the option predicted best, so that predictions stay true; and when not to ask.

Every option but the best is explored in turn, as often as a budget allows: a share of the time. An
exploration is a run of a few rounds, so that its price of switching is paid once. Its price is
earned beforehand: what the option is predicted to lose, and what it needs before its first token,
as a model that has to read prompts. A run is charged what it really lost. A run that gained is
followed by another one at once: a drafter that has recovered is back soon.

Lone requests have a loan: short answers would end before a run was earned. All is counted in plain
rounds, whose length is known for every batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from smart_decoding.core.calibration import HORIZON
from smart_decoding.core.costs import size_bucket

if TYPE_CHECKING:
    from smart_decoding.core.batch import Round

RUN = 2  # rounds of an exploration
# Plain rounds that lone requests may spend before they are earned, once: a model can read a prompt.
LOAN = HORIZON / 2


class Mode(Enum):
    """The ways to spend a round."""

    PLAIN = "plain"
    FREE = "free"  # what drafters without a model propose
    MODEL = "model"


@dataclass(slots=True)
class Account:
    """What batches of about one size have for explorations.

    balance: plain rounds earned and not spent yet, at first those of two HORIZONs; negative where a
    run lost more than expected. pause: rounds until the next run at least, however little it
    costs."""

    balance: float
    pause: int = HORIZON


class Exploration:
    """Spends `budget` of the time on options that are not predicted best. Batches of other sizes
    have accounts of their own: an expensive run of many requests does not silence a lone one.

    left: rounds of the run that is going on. seconds: lost in all, gains not counted; count:
    runs."""

    def __init__(self, budget: float) -> None:
        self.budget = budget
        self.left = 0
        self.seconds = 0.0
        self.count = 0
        self._accounts: dict[int, Account] = {}
        self._loan = LOAN  # what of it is left
        self._lost = 0.0  # seconds, by the run that is going on
        self._spent = 0.0  # plain rounds, by the same, beyond what it was lent

    def account(self, size: int) -> Account:
        """Return the account of batches of about this size."""
        start = 2 * HORIZON * self.budget
        return self._accounts.setdefault(size_bucket(size), Account(start))

    def wait(self, size: int, price: float = 0.0) -> float:
        """Return how many more rounds in the best option pay for a run. price: in plain rounds. A
        lone request may take the loan."""
        if self.budget <= 0:
            return math.inf
        account = self.account(size)
        missing = min(price, HORIZON) - account.balance - (self._loan if size == 1 else 0.0)
        return max(account.pause, math.ceil(missing / self.budget))

    def begin(self, size: int, price: float = 0.0) -> None:
        """Begin a run with the coming round."""
        account = self.account(size)
        missing = min(price, HORIZON) - account.balance
        lent = min(max(missing, 0.0), self._loan) if size == 1 else 0.0
        self._loan -= lent
        account.balance += lent
        self.left = RUN
        self.count += 1
        self._lost = 0.0
        self._spent = -lent

    def stop(self) -> None:
        """End the run: another option is predicted best now."""
        self.left = 0

    def observe_best(self, size: int) -> None:
        """Earn budget, after a round in the option predicted best."""
        account = self.account(size)
        account.balance = min(HORIZON, account.balance + self.budget)
        account.pause = max(0, account.pause - 1)

    def observe(self, size: int, loss: float, plain: float) -> bool:
        """Charge a round of a run, which lost so many seconds against the best option (negative:
        gained); return whether the run has ended. plain: seconds of a plain round. Where rounds
        overlap, some are reported after their run has ended: each is charged by itself.

        The next run waits until the budget has this one's loss again, even if more was earned
        before: otherwise many runs would follow each other after a long time without any. A process
        that was stopped meanwhile must not lose the explorations of hours to come: a round loses no
        more than HORIZON plain ones."""
        account = self.account(size)
        spent = min(loss / plain, HORIZON)
        account.balance = min(HORIZON, account.balance - spent)
        self._lost += loss
        self._spent += spent
        account.pause = HORIZON
        if self.left > 1:
            self.left -= 1
            return False
        going_on = self.left > 0
        lost = self._lost
        if self.budget > 0:
            account.pause = max(HORIZON, math.ceil(self._spent / self.budget))
        self._lost = 0.0
        self._spent = 0.0
        self.left = 0
        self.seconds += max(lost, 0.0)
        if lost < 0 and going_on:
            self.begin(size)
        return True


class Backoff:
    """Plain rounds without asking anew whether drafting pays, as long as the batch has about as
    many requests.

    These rounds are learned from all at once: behind a forward no cache is warm, and to learn from
    one takes several times as long as from one more."""

    def __init__(self) -> None:
        self._left = 0
        self._bucket = 0
        self._rounds: list[Round] = []

    def begin(self, rounds: int, size: int) -> None:
        """Begin so many rounds, from the next one on, of a batch of `size` requests."""
        self._left = rounds
        self._bucket = size_bucket(size)

    def goes_on(self, size: int) -> bool:
        """Return whether the coming round is one of them."""
        if self._left and self._bucket == size_bucket(size):
            self._left -= 1
            return True
        self._left = 0
        return False

    def add(self, round: Round) -> list[Round]:
        """Add a round that did not ask. Return those to learn from now: the last round of a backoff
        brings all."""
        self._rounds.append(round)
        return [] if self._left and len(self._rounds) < HORIZON else self.take()

    def take(self) -> list[Round]:
        """Return the rounds that are not learned from yet."""
        rounds = self._rounds
        self._rounds = []
        return rounds
