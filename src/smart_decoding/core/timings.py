"""The times of real rounds, until costs are corrected by them.

Costs are corrected by means over several rounds, of forwards of about as many rows. The rate of
those rounds depends on the mean. Of single times the filter would cut the outliers, and believe
that forwards with a heavy tail, as shared machines have them, are faster than they are.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from smart_decoding.core.costs import DraftSample, VerifySample

if TYPE_CHECKING:
    from smart_decoding.core.batch import Round
    from smart_decoding.core.costs import Sample


class _Kind(Enum):
    """Forwards that are alike."""

    VERIFY = "verify"
    FIRST = "first"
    LEVEL = "level"


@dataclass(slots=True)
class _Sums:
    """Of forwards: how many, their rows, contexts and seconds, and the rows waiting at them."""

    count: int = 0
    rows: int = 0
    context: float = 0.0
    seconds: float = 0.0
    waiting: int = 0

    def add(self, rows: int, context: float, seconds: float, waiting: int = 0) -> None:
        self.count += 1
        self.rows += rows
        self.context += context
        self.seconds += seconds
        self.waiting += waiting

    def mean(self, kind: _Kind, size: int) -> Sample:
        n = self.count
        rows = self.rows / n
        context = self.context / n
        seconds = self.seconds / n
        if kind is _Kind.VERIFY:
            # Plain rounds are many, and all alike. A drafting round's mean counts as one: were it
            # believed more, a few slow ones would say that drafting does not pay.
            return VerifySample(size, rows, context, seconds, n if rows == size else 1)
        waiting = self.waiting / n if kind is _Kind.FIRST else None
        return DraftSample(rows, context, seconds, waiting)


class Timings:
    """Sums by kind of forward, batch size, and octave of the rows."""

    def __init__(self) -> None:
        self._sums: defaultdict[tuple[_Kind, int, int], _Sums] = defaultdict(_Sums)

    def add(self, round: Round) -> None:
        """Counts a round."""
        context = round.batch.mean_context
        self._of(_Kind.VERIFY, round, round.verify_rows).add(
            round.verify_rows, context, round.verify_seconds
        )
        waiting = round.batch.catch_up_rows
        kind = _Kind.FIRST
        for width, seconds in zip(round.level_widths, round.level_seconds, strict=True):
            self._of(kind, round, width).add(width - waiting, context, seconds, waiting)
            kind = _Kind.LEVEL
            waiting = 0

    def _of(self, kind: _Kind, round: Round, rows: int) -> _Sums:
        return self._sums[kind, round.batch.size, rows.bit_length()]

    def take(self) -> list[Sample]:
        """The means of each; they begin anew."""
        samples = [sums.mean(kind, size) for (kind, size, _), sums in self._sums.items()]
        self._sums.clear()
        return samples
