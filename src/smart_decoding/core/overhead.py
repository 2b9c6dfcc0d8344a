"""What a round takes beside its forwards, learned from real rounds."""

from __future__ import annotations

from collections import defaultdict

from smart_decoding.core.running import RunningMean


def size_bucket(size: int) -> int:
    """Batches of one request, of two or three, of four to seven, ... share what is learned."""
    return size.bit_length()


class Overhead:
    """Seconds beside the forwards, of plain rounds and of those that draft, by size bucket."""

    def __init__(self, drafting: float) -> None:
        self._drafting = drafting  # beyond a plain round, before anything is known
        self._means: defaultdict[tuple[int, bool], RunningMean] = defaultdict(RunningMean)

    def of(self, size: int, drafts: bool) -> float:
        """For a batch of `size` requests. A bucket that is unknown is as the nearest known one."""
        bucket = size_bucket(size)
        known = [key for key in self._means if key[1] == drafts]
        if known:
            return self._means[min(known, key=lambda key: abs(key[0] - bucket))].mean
        if drafts:
            return self.of(size, False) + self._drafting
        return 0.0

    def observe(self, size: int, drafts: bool, seconds: float) -> None:
        """After a round that prefilled nothing. A slow one, as the first of its kind often is,
        counts as at most twice the usual."""
        usual = self.of(size, drafts)
        self._means[size_bucket(size), drafts].observe(min(seconds, 2.0 * usual or seconds))
