"""How long a round of several requests may last, so that none of them pays for the others' drafts.

Long rounds are paid by requests that gain little from them. Each request may be up to `slowdown`
times as slow, per token, as plain decoding would be. What a round brings it beyond that is credit,
in plain rounds, and the coming round may last as long as the poorest request's credit allows. So
the limit is one of each whole answer. What a model must read before it drafts is left out.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

START = 1.0  # plain rounds of credit that a request begins with, so that drafting can begin
MOST = 16.0  # plain rounds of credit that count: old gains are no reason to wait for long
LONGEST = 4.0  # plain rounds; no round that pays lasts longer
STEPS = 4  # of a plain round, to which limits are cut: equal ones share predictions


class Fairness:
    """Credit of the running requests, in plain rounds."""

    def __init__(self, slowdown: float) -> None:
        self.slowdown = slowdown
        self._credit: dict[Hashable, float] = {}

    def limit(self, requests: Sequence[Hashable]) -> float:
        """Return how many plain rounds the coming round may last for these requests. Those without
        a name have no credit."""
        if self.slowdown == math.inf:
            return math.inf
        credit = self._credit
        poorest = min((credit.get(request, START) for request in requests), default=START)
        return min(LONGEST, math.floor(STEPS * max(0.0, self.slowdown + poorest)) / STEPS)

    def observe(
        self, requests: Sequence[Hashable], tokens: Sequence[int], plain_rounds: float
    ) -> None:
        """Learn of a round that lasted so many plain ones; tokens: [requests]."""
        if not requests:
            return
        known = self._credit
        self._credit = {
            request: min(MOST, known.get(request, START) + self.slowdown * count - plain_rounds)
            for request, count in zip(requests, tokens, strict=True)
        }
