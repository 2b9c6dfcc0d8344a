"""Degenerate loops: an answer that repeats a block of tokens over and over.

Small models loop often, and a loop flatters speculation (it is easily predicted), so that the benchmark cuts every
answer where its loop starts, by this one function, for every policy.

A loop is a block of 1 to 128 tokens that has just occurred at least three times in a row, 24 tokens or more in all.
Three, since twice is common in ordinary text (a refrain, a test after its twin); 24 tokens, since short blocks do
repeat in code and tables (`0, 0, 0,`, rules of dashes). A text that changes a little each time, such as a running
number, is not a loop.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

MAX_PERIOD = 128
MIN_REPETITIONS = 3
MIN_TOKENS = 24


class LoopDetector:
    """Finds a loop as tokens arrive: O(MAX_PERIOD), one small array operation, per token."""

    def __init__(self) -> None:
        periods = np.arange(1, MAX_PERIOD + 1)
        # A tail of `run` tokens that each equal the one a period earlier is a block of run + period tokens.
        self._needed = np.maximum(MIN_REPETITIONS * periods, MIN_TOKENS) - periods
        self._run = np.zeros(MAX_PERIOD, np.int64)
        self._recent = np.full(MAX_PERIOD, -1, np.int64)  # [i] is the token i + 1 places back
        self._count = 0
        self.start: int | None = None

    def push(self, token: int) -> bool:
        """Takes the next token; true once a loop is there. Then `start` is the index of its first superfluous token:
        the start of the block's second repetition, from where on the answer only repeats itself."""
        if self.start is not None:
            return True
        self._run = np.where(self._recent == token, self._run + 1, 0)
        self._recent[1:] = self._recent[:-1]
        self._recent[0] = token
        self._count += 1
        looping = self._run >= self._needed
        if looping.any():
            self.start = self._count - int(self._run[np.argmax(looping)])  # argmax: the shortest period
        return self.start is not None


def loop_start(tokens: Iterable[int]) -> int | None:
    """Index from which `tokens` merely repeats itself, or None: cut the answer to tokens[:loop_start(tokens)]."""
    detector = LoopDetector()
    for token in tokens:
        if detector.push(token):
            break
    return detector.start
