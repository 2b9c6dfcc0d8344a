"""Degenerate loops: an answer that repeats a block of tokens over and over.

Small models loop often, and a loop is easily predicted, which flatters speculation. So the
benchmark cuts every answer of every policy where its loop starts, by this function.

A loop is a block of 1 to 128 tokens that has just occurred at least three times in a row, 24 tokens
or more in all. Two repetitions are common in ordinary text, such as a refrain. Short blocks repeat
in code and tables, such as `0, 0, 0,`. A text that changes a little each time, such as a running
number, is not a loop.
"""

from __future__ import annotations

from collections.abc import Iterable

MAX_PERIOD = 128
MIN_REPETITIONS = 3
MIN_TOKENS = 24


class LoopDetector:
    """Finds a loop as tokens arrive. A token costs one step for each place of the same token among
    the last MAX_PERIOD.

    min_tokens: of a loop, all its repetitions together."""

    def __init__(self, min_tokens: int = MIN_TOKENS) -> None:
        self._min_tokens = min_tokens
        self._last: dict[int, int] = {}  # token -> index of its last occurrence
        # index -> index of the same token's occurrence before it, or -1
        self._before: list[int] = []
        # period -> how many tokens up to now equal the one a period earlier
        self._runs: dict[int, int] = {}
        self.start: int | None = None

    def push(self, token: int) -> bool:
        """Take the next token; return True once there is a loop. Then `start` is the index where
        the block's second repetition starts: from there on the answer only repeats itself."""
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
            if run + period >= max(MIN_REPETITIONS * period, self._min_tokens):
                self.start = now + 1 - run
                return True  # the shortest period: the latest occurrences come first
            earlier = self._before[earlier]
        self._last[token] = now
        self._runs = runs
        self._before.append(before)
        return False


def loop_start(tokens: Iterable[int], min_tokens: int = MIN_TOKENS) -> int | None:
    """Return the index from which `tokens` only repeats itself, or None: cut the answer to
    tokens[:loop_start(tokens)]. min_tokens: as of `LoopDetector`."""
    detector = LoopDetector(min_tokens)
    for token in tokens:
        if detector.push(token):
            break
    return detector.start
