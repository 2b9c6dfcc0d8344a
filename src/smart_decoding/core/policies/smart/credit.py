"""How long a round of several requests may last, so that none of them pays for the others' drafts.

Long rounds are paid by requests that gain little from them. Each request may be up to `slowdown`
times as slow, per token, as plain decoding would be. What rounds bring it beyond that is its
credit, in plain rounds. The coming round may last as long as the poorest request's credit allows.
So the slowdown is bounded over a request's whole answer, not in every round.

Credit is earned by expected tokens, times what the request has had of those: a few drafts that
happen to be rejected are bad luck, which evens out, and no reason to stop.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from smart_decoding.core.calibration import HORIZON

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
