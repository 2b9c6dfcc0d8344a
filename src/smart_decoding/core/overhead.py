"""What a round takes beside its forwards, learned from real rounds."""

from __future__ import annotations


def about(size: int) -> int:
    """Batches of one request, of two or three, of four to seven, ... are thought of together."""
    return size.bit_length()


class Overhead:
    """Seconds that a plain round takes beside its forward, and what a speculating one takes beyond
    that, by size.

    Plain decoding rests, so resting rounds are its measure: plain rounds that were planned take
    longer."""

    GAIN, ENOUGH, CLIP = 1 / 32, 4, 2.0  # one slow round counts as at most twice the usual

    def __init__(self, seconds: float) -> None:
        self._usual = 0.0, seconds  # what was learned last, of any size
        self._mean: dict[
            tuple[int, bool], float
        ] = {}  # by `about` the size, and whether the round speculated
        self._seen: dict[tuple[int, bool], int] = {}

    def of(self, size: int) -> tuple[float, float]:
        """For a batch of `size` requests: of a plain round, and how much more a speculating one
        takes."""
        plain, drafting = ((about(size), speculated) for speculated in (False, True))
        if min(self._seen.get(plain, 0), self._seen.get(drafting, 0)) >= self.ENOUGH:
            self._usual = self._mean[plain], max(0.0, self._mean[drafting] - self._mean[plain])
        return self._usual

    def has_rested(self, size: int) -> bool:
        """Whether enough resting rounds of such batches were seen."""
        return self._seen.get((about(size), False), 0) >= self.ENOUGH

    def observe(self, size: int, seconds: float, speculated: bool) -> None:
        """After a round that speculated, or rested, and prefilled nothing."""
        key = about(size), speculated
        seen, mean = self._seen.get(key, 0), self._mean.get(key, seconds)
        self._mean[key] = mean + max(self.GAIN, 1 / (seen + 1)) * (
            min(seconds, self.CLIP * mean) - mean
        )
        self._seen[key] = seen + 1
