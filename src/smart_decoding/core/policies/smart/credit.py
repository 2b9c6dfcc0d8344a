"""How long a round of several requests may last, so that none of them pays for the others' drafts.

Long rounds are paid by requests that gain little from them. Each request may be up to `slowdown`
times as slow, per token, as plain decoding would be. What rounds bring it beyond that is its
credit, in plain rounds. The coming round may last as long as the poorest request's credit allows.
So the slowdown is bounded over a request's whole answer, not in every round.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

from smart_decoding.core.calibration import HORIZON

START = 1.0  # plain rounds of credit that a request begins with, so that drafting can begin
MOST = 16.0  # plain rounds of credit that count: old gains are no reason to wait for long
LONGEST = 2.0  # plain rounds, for any credit: what long rounds cost is known least
STEPS = 4  # an octave, to which lengths are cut: equal ones share predictions


class Credit:
    """Credit of the requests, in plain rounds."""

    def __init__(self, slowdown: float) -> None:
        self.slowdown = slowdown
        self._known: dict[Hashable, float] = {}

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
        self, requests: Sequence[Hashable], tokens: Sequence[int], plain_rounds: float
    ) -> None:
        """Learn of a round that lasted so many plain ones; tokens: [requests], or more."""
        known = self._known
        for request, count in zip(requests, tokens, strict=False):
            before = known.get(request, START)
            known[request] = min(MOST, before + self.slowdown * count - plain_rounds)
        if len(known) > HORIZON * HORIZON:  # most of them have ended
            self._known = {request: known[request] for request in requests}

    def _poorest(self, requests: Sequence[Hashable]) -> float:
        """Requests without a name are new in every round."""
        known = self._known
        return min((known.get(request, START) for request in requests), default=START)
