"""Degenerate loops: an answer that repeats a block of tokens over and over.

Small models loop often, and a loop flatters speculation (it is easily predicted), so that the
benchmark cuts every answer where its loop starts, by this one function, for every policy.

A loop is a block of 1 to 128 tokens that has just occurred at least three times in a row, 24 tokens
or more in all. Three, since twice is common in ordinary text (a refrain, a test after its twin); 24
tokens, since short blocks do repeat in code and tables (`0, 0, 0,`, rules of dashes). A text that
changes a little each time, such as a running number, is not a loop.
"""

from __future__ import annotations

from collections.abc import Iterable

MAX_PERIOD = 128
MIN_REPETITIONS = 3
MIN_TOKENS = 24


class LoopDetector:
    """Finds a loop as tokens arrive. Per token only the places of the same token among the last
    MAX_PERIOD count."""

    def __init__(self) -> None:
        self._last: dict[int, int] = {}  # token -> index of its last occurrence
        # index -> index of the same token's occurrence before it, or -1
        self._before: list[int] = []
        # period -> how many tokens up to now equal the one a period earlier
        self._runs: dict[int, int] = {}
        self.start: int | None = None

    def push(self, token: int) -> bool:
        """Take the next token; true once a loop is there. Then `start` is the index of its first
        superfluous token: the start of the block's second repetition, from where on the answer only
        repeats itself."""
        if self.start is not None:
            return True
        now = len(self._before)
        runs = {}
        earlier = before = self._last.get(token, -1)
        while earlier >= 0 and now - earlier <= MAX_PERIOD:
            period = now - earlier
            run = runs[period] = self._runs.get(period, 0) + 1
            # A tail of `run` tokens that each equal the one a period earlier is a block of run +
            # period tokens.
            if run + period >= max(MIN_REPETITIONS * period, MIN_TOKENS):
                self.start = now + 1 - run
                return True  # the shortest period: the latest occurrences come first
            earlier = self._before[earlier]
        self._last[token] = now
        self._runs = runs
        self._before.append(before)
        return False


def loop_start(tokens: Iterable[int]) -> int | None:
    """Index from which `tokens` merely repeats itself, or None: cut the answer to
    tokens[:loop_start(tokens)]."""
    detector = LoopDetector()
    for token in tokens:
        if detector.push(token):
            break
    return detector.start
