"""What a round costs: measured tables of seconds, interpolated, and corrected by the times of real
rounds.

    round = overhead + first_seconds(roots, waiting) + sum of draft_seconds(width) of deeper levels
            + verify_seconds(batch, rows, context)

The first level is a thing of its own: it finds the caches full of the target's weights, and catches
up with `waiting` rows, of which nothing but keys is wanted. Deeper ones find the drafter's weights
where the first has left them. So either has a speed of its own, which is not the target's.

`context` is always the mean number of KV tokens per sequence. Attention adds `row_token` seconds
per row and context token (arithmetic) and `sequence_token` per sequence and context token (reading
the cache); the tables hold the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from smart_decoding.core.correction import MAX_ROWS, Correction
from smart_decoding.core.cost_fit import (
    DraftSample,
    Sample,
    VerifySample,
    fit_levels,
    fit_verify,
    is_usable,
)
from smart_decoding.core.curve import Curve

if TYPE_CHECKING:
    from smart_decoding.core.tree import FloatArray, IntArray

__all__ = ["CostModel", "Curve", "DraftSample", "Sample", "VerifySample"]

# Used where nothing was measured, and corrected by real rounds: a forward of 20 ms, bound by
# reading weights, with 2 % more per further row; drafting a level takes a tenth of it.
SMALLEST = 0.02
FURTHER_ROW = 0.02
LEVEL = 0.1
_DEFAULT = Curve((1, 2), (SMALLEST, SMALLEST * (1 + FURTHER_ROW)))
DEFAULT_VERIFY = {1: _DEFAULT}
DEFAULT_DRAFT = Curve(_DEFAULT.rows, tuple(LEVEL * s for s in _DEFAULT.seconds))

_Key: TypeAlias = int | str  # of a dense table: the batch size of a verification, or a field


@dataclass(frozen=True, slots=True)
class CostModel:
    """Predicts seconds. Immutable: `corrected` returns the next model, sharing the tables.

    verify: batch size -> curve over rows at context 0; between batch sizes linear in log batch,
    constant outside. draft: curve over expanded rows of one level of the model drafter at context
    0. overhead_seconds: fixed cost of a round that speculates, beyond its forwards. first: over the
    roots of a first level (None: as any other). waiting: what rows that wait add to it, over their
    number.
    """

    verify: Mapping[int, Curve]
    draft: Curve
    row_token: float = 0.0
    sequence_token: float = 0.0
    draft_token: float = 0.0
    overhead_seconds: float = 0.0
    verify_correction: Correction = field(default_factory=Correction)
    draft_correction: Correction = field(default_factory=Correction)
    first: Curve | None = None
    waiting: Curve | None = None
    first_correction: Correction = field(default_factory=Correction)
    _dense: dict[_Key, FloatArray] = field(default_factory=dict, repr=False, compare=False)
    _stall: tuple[float, ...] = field(default=(), repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self._stall:  # a corrected model gets it from the one before
            object.__setattr__(self, "_stall", _stall_of(next(iter(self.verify.values()))))

    @classmethod
    def default(cls) -> CostModel:
        """A guess for when no profile exists; corrected by the first real rounds."""
        return cls(DEFAULT_VERIFY, DEFAULT_DRAFT)

    @classmethod
    def from_table(
        cls,
        verify: Mapping[int, Mapping[int, float]],
        draft: Mapping[int, float] | None = None,
        overhead_seconds: float = 0.0,
    ) -> CostModel:
        """From explicit tables {batch: {rows: seconds}} and {width: seconds}, taken as they are, of
        any shape."""
        curves = {b: Curve.from_table(table) for b, table in sorted(verify.items()) if table}
        return cls(
            curves or DEFAULT_VERIFY,
            Curve.from_table(draft) if draft else DEFAULT_DRAFT,
            overhead_seconds=overhead_seconds,
        )

    @classmethod
    def fit(cls, samples: Iterable[Sample], overhead_seconds: float = 0.0) -> CostModel:
        """Fits measured samples. Unusable ones are ignored; what nothing remains for falls back to
        the default curves."""
        usable = [s for s in samples if is_usable(s)]
        verify = fit_verify([s for s in usable if isinstance(s, VerifySample)])
        levels = fit_levels([s for s in usable if isinstance(s, DraftSample)])
        known = math.isfinite(overhead_seconds) and overhead_seconds > 0
        return cls(
            verify.curves or DEFAULT_VERIFY,
            levels.draft or DEFAULT_DRAFT,
            verify.row_token,
            verify.sequence_token,
            levels.draft_token,
            overhead_seconds if known else 0.0,
            first=levels.first,
            waiting=levels.waiting,
        )

    # --- predictions ---

    def verify_seconds(self, batch: int, rows: ArrayLike, context: float) -> FloatArray:
        """Seconds of one target forward of `rows` rows in all (integers of any shape, roots
        included)."""
        rows_: IntArray = np.asarray(rows, np.int64)
        try:
            base = self._table(batch, 0)[rows_]
        except IndexError:
            base = self._table(batch, int(rows_.max()) + 1)[rows_]
        attention = rows_ * (self.row_token * context)
        sequences = batch * self.sequence_token * context
        table = base + attention + sequences
        return self.verify_correction.seconds(rows_, table, self._stall_seconds(rows_))

    def verify_curve(self, batch: int, first: int, count: int, context: float) -> FloatArray:
        """Seconds at first, first + 1, ... first + count - 1 rows: `verify_seconds` for a scan over
        tree sizes."""
        rows = slice(first, first + count)
        each = np.arange(first, first + count)
        attention = each * (self.row_token * context)
        attention += batch * self.sequence_token * context
        table = self._table(batch, first + count)[rows] + attention
        return self.verify_correction.seconds(rows, table, self._stall_seconds(each))

    def draft_seconds(self, width: ArrayLike, context: float) -> FloatArray:
        """Seconds of one level of the model drafter, not the first, that expands `width` rows."""
        width_: IntArray = np.asarray(width, np.int64)
        base = self._table("draft", int(width_.max()) + 1)[width_]
        table = base + width_ * (self.draft_token * context)
        return self.draft_correction.seconds(width_, table, 0.0)

    def first_seconds(self, roots: int, waiting: ArrayLike, context: float) -> FloatArray:
        """Seconds of the first level for `roots` requests, which catches up with `waiting` rows
        beside one of each."""
        waiting_: IntArray = np.asarray(waiting, np.int64)
        if not self._knows_first:
            return self.draft_seconds(roots + waiting_, context)
        caught_up = self._table("waiting", int(waiting_.max()) + 1)[waiting_]
        table = caught_up + self._first_level(roots, context)
        return self.first_correction.seconds(roots + waiting_, table, 0.0)

    def levels_seconds(self, roots: int, widths: Sequence[int], context: float) -> list[float]:
        """Seconds of each level of a round, of which the first one's width is the roots and all
        that waits."""
        if not widths:
            return []
        first = float(self.first_seconds(roots, widths[0] - roots, context))
        if len(widths) == 1:
            return [first]
        return [first, *self.draft_seconds(list(widths[1:]), context).tolist()]

    # --- corrections ---

    def corrected(self, observed: Sample) -> CostModel:
        """The model after one real step; absurd times count little, unusable ones nothing."""
        if not is_usable(observed):
            return self
        if isinstance(observed, VerifySample):
            return self._corrected_by_verify(observed)
        if observed.waiting is not None and self._knows_first:
            return self._corrected_by_first(observed, observed.waiting)
        return self._corrected_by_level(observed)

    def _corrected_by_verify(self, s: VerifySample) -> CostModel:
        attention = s.context * (self.row_token * s.rows + self.sequence_token * s.batch)
        table = self._at(s.batch, s.rows) + attention
        stalled = float(self._stall_seconds(s.rows))
        correction = self.verify_correction.updated(s.rows, table, stalled, s.seconds, s.rounds)
        return replace(self, verify_correction=correction)

    def _corrected_by_first(self, s: DraftSample, waiting: float) -> CostModel:
        table = self._at("waiting", waiting) + self._first_level(s.width, s.context)
        correction = self.first_correction.updated(s.width + waiting, table, 0.0, s.seconds)
        return replace(self, first_correction=correction)

    def _corrected_by_level(self, s: DraftSample) -> CostModel:
        width = s.width + (s.waiting or 0)
        table = self._at("draft", width) + self.draft_token * width * s.context
        correction = self.draft_correction.updated(width, table, 0.0, s.seconds)
        return replace(self, draft_correction=correction)

    # --- on disk ---

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers; corrections belong to the running machine and are left out."""
        levels = {"draft": self.draft, "first": self.first, "waiting": self.waiting}
        return {
            "verify": {str(batch): curve.to_lists() for batch, curve in self.verify.items()},
            **{name: curve.to_lists() for name, curve in levels.items() if curve is not None},
            "row_token": self.row_token,
            "sequence_token": self.sequence_token,
            "draft_token": self.draft_token,
            "overhead_seconds": self.overhead_seconds,
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> CostModel:
        """The inverse of `to_dict`. Raises KeyError, TypeError or ValueError for anything else."""
        curves = {int(batch): Curve.from_lists(c) for batch, c in state["verify"].items()}
        names = ("row_token", "sequence_token", "draft_token", "overhead_seconds")
        row, sequence, level, overhead = (float(state[name]) for name in names)
        usable = all(math.isfinite(x) and x >= 0 for x in (row, sequence, level, overhead))
        if not curves or not usable:
            raise ValueError("not a cost profile")
        draft = Curve.from_lists(state["draft"])
        first, waiting = (
            Curve.from_lists(state[name]) if name in state else None
            for name in ("first", "waiting")
        )
        return cls(curves, draft, row, sequence, level, overhead, first=first, waiting=waiting)

    # --- tables ---

    @property
    def _knows_first(self) -> bool:
        return self.first is not None and self.waiting is not None

    def _first_level(self, roots: float, context: float) -> float:
        """The table's seconds of a first level in which nothing waits."""
        return self._at("first", roots) + roots * self.draft_token * context

    def _stall_seconds(self, rows: IntArray | float) -> FloatArray:
        """Seconds of a verification in which its arithmetic waits for the weights: all of the
        smallest one's, fewer with every further row."""
        weights, most = self._stall
        result: FloatArray = weights * np.maximum(0.0, 1.0 - (rows - 1) / most)
        return result

    def _table(self, key: _Key, size: int) -> FloatArray:
        """Dense seconds over rows, computed once and grown on demand."""
        table = self._dense.get(key)
        if table is None or len(table) < size:
            length = MAX_ROWS if size <= MAX_ROWS else 2 * size
            if isinstance(key, str):
                curve: Curve = getattr(self, key)
                table = curve.dense(length)
            else:
                table = self._at_batch(key, length)
            self._dense[key] = table
        return table

    def _at(self, key: _Key, rows: float) -> float:
        """A table's seconds at a mean of several rows."""
        low = int(rows)
        table = self._table(key, low + 2)
        left, right = table[low : low + 2].tolist()
        return float(left + (rows - low) * (right - left))

    def _at_batch(self, batch: int, length: int) -> FloatArray:
        known = sorted(self.verify)
        below = max((b for b in known if b <= batch), default=known[0])
        above = min((b for b in known if b >= batch), default=known[-1])
        table = self.verify[below].dense(length)
        if above != below:
            share = math.log(batch / below) / math.log(above / below)
            table += share * (self.verify[above].dense(length) - table)
        return table


def _stall_of(curve: Curve) -> tuple[float, float]:
    """Seconds of the smallest forward, in which the arithmetic waits for the weights, and the rows
    whose arithmetic takes about as long: where the curve has risen to twice that."""
    risen = np.flatnonzero(curve.dense(MAX_ROWS) > 2.0 * curve.seconds[0])
    return float(curve.seconds[0]), max(float(risen[0]) if len(risen) else float(MAX_ROWS), 2.0)
