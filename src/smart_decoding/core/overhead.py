"""What a round takes beside its forwards, learned from real rounds."""

from __future__ import annotations


def size_bucket(size: int) -> int:
    """Batches of one request, of two or three, of four to seven, ... share what is learned."""
    return size.bit_length()


class Overhead:
    """Seconds that a plain round takes beside its forward, and what a drafting one takes beyond
    that, by size.

    Rounds of a backoff are the measure of plain decoding: plain rounds that were planned take
    longer."""

    GAIN = 1 / 32
    ENOUGH = 4  # rounds
    CLIP = 2.0  # one slow round counts as at most twice the usual

    def __init__(self, seconds: float) -> None:
        self._usual = 0.0, seconds  # what was learned last, of any size
        # Both by bucket of sizes, and whether the round drafted.
        self._mean: dict[tuple[int, bool], float] = {}
        self._seen: dict[tuple[int, bool], int] = {}

    def of(self, size: int) -> tuple[float, float]:
        """For a batch of `size` requests: of a plain round, and how much more a drafting one
        takes."""
        if self._knows(size, False) and self._knows(size, True):
            plain = self._mean[size_bucket(size), False]
            drafting = self._mean[size_bucket(size), True]
            self._usual = plain, max(0.0, drafting - plain)
        return self._usual

    def knows_plain(self, size: int) -> bool:
        """Whether enough plain rounds of such batches were seen."""
        return self._knows(size, False)

    def _knows(self, size: int, speculated: bool) -> bool:
        return self._seen.get((size_bucket(size), speculated), 0) >= self.ENOUGH

    def observe(self, size: int, seconds: float, speculated: bool) -> None:
        """After a round that drafted, or one of a backoff, and prefilled nothing."""
        key = size_bucket(size), speculated
        seen = self._seen.get(key, 0)
        mean = self._mean.get(key, seconds)
        gain = max(self.GAIN, 1 / (seen + 1))
        self._mean[key] = mean + gain * (min(seconds, self.CLIP * mean) - mean)
        self._seen[key] = seen + 1
