"""When to leave the option predicted best, so that predictions stay true; and when not to ask.

Every option but the best is explored in turn, as often as a budget allows: a share of the time. An
exploration is a run of a few rounds, so that its price of switching is paid once. Its price is
earned beforehand: what the option is predicted to lose, and what it needs before its first token,
as a model that has to read prompts. A run is charged what it really lost. A run that gained is
followed by another one at once: a drafter that has recovered is back soon.

Lone requests have an overdraft: short answers would end before a run was earned. All is counted in
plain rounds, whose length is known for every batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from smart_decoding.core.batch import size_bucket
from smart_decoding.core.calibration import HORIZON

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from smart_decoding.core.batch import Round

RUN = 2  # rounds of an exploration
# Plain rounds that lone requests may spend before they are earned, once: a model can read a prompt.
OVERDRAFT = HORIZON / 2


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
        self._overdraft = OVERDRAFT  # what of it is left
        self._lost = 0.0  # seconds, by the run that is going on
        self._spent = 0.0  # plain rounds, by the same, beyond its overdraft

    def account(self, size: int) -> Account:
        """Return the account of batches of about this size."""
        start = 2 * HORIZON * self.budget
        return self._accounts.setdefault(size_bucket(size), Account(start))

    def wait(self, size: int, price: float = 0.0) -> float:
        """Return how many more rounds in the best option pay for a run. price: in plain rounds. A
        lone request may use the overdraft."""
        if self.budget <= 0:
            return math.inf
        account = self.account(size)
        missing = min(price, HORIZON) - account.balance - (self._overdraft if size == 1 else 0.0)
        return max(account.pause, math.ceil(missing / self.budget))

    def begin(self, size: int, price: float = 0.0) -> None:
        """Begin a run with the coming round."""
        account = self.account(size)
        missing = min(price, HORIZON) - account.balance
        overdraft = min(max(missing, 0.0), self._overdraft) if size == 1 else 0.0
        self._overdraft -= overdraft
        account.balance += overdraft
        self.left = RUN
        self.count += 1
        self._lost = 0.0
        self._spent = -overdraft

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


# --- credit of requests ---------------------------------------------------------------------------
#
# Long rounds are paid by requests that gain little from them. Each request may be up to `slowdown`
# times as slow, per token, as plain decoding would be. What rounds bring it beyond that is its
# credit, in plain rounds. The coming round may last as long as the poorest request's credit allows.
# So the slowdown is bounded over a request's whole answer, not in every round.
#
# Credit is earned by expected tokens, times what the request has had of those: a few drafts that
# happen to be rejected are bad luck, which evens out, and no reason to stop.

START = 1.0  # plain rounds of credit that a request begins with, so that drafting can begin
FIRST = 2.0  # drafted tokens that a request is taken to have had as expected, before any are known
MOST = 16.0  # plain rounds of credit that count: old gains are no reason to wait for long
LONGEST = 2.0  # plain rounds, for any credit: what long rounds cost is known least
STEPS = 4  # an octave, to which lengths are cut: equal ones share predictions


@dataclass(slots=True)
class RequestCredit:
    """Plain rounds that one request has paid and not earned by plain rounds' tokens, and drafted
    tokens that it has had, and that were expected."""

    paid: float = -START
    had: float = 0.0
    expected: float = 0.0

    def observe(self, tokens: float, expected: float, plain_rounds: float, slowdown: float) -> None:
        """Count a round that lasted so many plain ones."""
        self.had += tokens - 1
        self.expected += expected - 1
        self.paid += plain_rounds - slowdown
        self.paid += max(0.0, self.credit(slowdown) - MOST)

    def credit(self, slowdown: float) -> float:
        """Return the credit in plain rounds: of drafted tokens, those expected count, as far as
        they have come."""
        known = FIRST + self.expected
        drafted = self.expected * (FIRST + self.had) / known if known > 0 else self.had
        return slowdown * drafted - self.paid


class Credit:
    """Accounts of the requests."""

    def __init__(self, slowdown: float) -> None:
        self.slowdown = slowdown
        self._known: dict[Hashable, RequestCredit] = {}
        self._later = 0.0  # plain rounds of catching up that are not charged yet

    def longest_round(self, requests: Sequence[Hashable]) -> float:
        """Return how many plain rounds the coming round of these requests may last; 0: none but a
        plain one."""
        if self.slowdown == math.inf:
            return math.inf
        most = min(self.slowdown + self._poorest(requests), max(LONGEST, self.slowdown))
        return 2.0 ** (math.floor(STEPS * math.log2(most)) / STEPS) if most >= 1 else 0.0

    def recovery(self, requests: Sequence[Hashable]) -> int:
        """Return after how many plain rounds all have the credit of a new request."""
        missing = START - self._poorest(requests)
        if missing <= 0 or self.slowdown == 1:
            return 0
        return math.ceil(missing / (self.slowdown - 1))

    def observe(
        self,
        requests: Sequence[Hashable],
        tokens: Sequence[float],
        expected: Sequence[float],
        plain_rounds: float,
        later: float = 0.0,
    ) -> None:
        """Learn of a round that lasted so many plain ones. tokens, expected: [requests], or more.
        later: further ones, of catching up: about HORIZON rounds have the good of it, and share
        it."""
        if self.slowdown == math.inf:
            return
        self._later += later
        plain_rounds += self._later / HORIZON
        self._later -= self._later / HORIZON
        known = self._known
        for request, had, hoped in zip(requests, tokens, expected, strict=False):
            account = known.get(request)
            if account is None:
                account = known[request] = RequestCredit()
            account.observe(had, hoped, plain_rounds, self.slowdown)
        if len(known) > HORIZON * HORIZON:  # most of them have ended
            self._known = {request: known[request] for request in requests}

    def _poorest(self, requests: Sequence[Hashable]) -> float:
        """Requests without a name are new in every round."""
        known = self._known
        each = (known[r].credit(self.slowdown) if r in known else START for r in requests)
        return min(each, default=START)
