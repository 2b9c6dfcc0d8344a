"""Rounds of plain decoding without asking whether to draft: 2, 4, 8, ... while the answer is no."""

from __future__ import annotations


class Backoff:
    """Counts the rounds to go, for batches of about one size."""

    def __init__(self) -> None:
        self.rounds = 0
        self._size = 0
        self._last = 1

    def covers(self, size: int) -> bool:
        """Whether the coming round need not ask, which is counted. Requests come and go: up to an
        eighth fewer or a quarter more are about the same batch."""
        if self.rounds and 7 * self._size <= 8 * size <= 10 * self._size:
            self.rounds -= 1
            return True
        self.rounds = 0
        return False

    def begin(self, rounds: int, size: int) -> None:
        """The next `rounds` rounds need not ask."""
        self.rounds = rounds
        self._size = size

    def double(self, most: int, until: int, size: int) -> None:
        """Twice as many as the last time, at most `most`, but none beyond `until`."""
        self._last = min(2 * self._last, most)
        self.begin(min(self._last, until), size)

    def reset(self) -> None:
        """There was something to draft: the next backoff is short again."""
        self._last = 1
