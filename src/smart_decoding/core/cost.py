"""What a round costs: measured tables of seconds, interpolated, and corrected by the times of real
rounds.

    round = overhead + first_seconds(roots, waiting) + sum over deeper levels of
    draft_seconds(width)
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
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import isotonic_regression, nnls  # type: ignore[import-untyped, unused-ignore]

from smart_decoding.core.correction import Correction
from smart_decoding.core.tree import FloatArray, IntArray

# a forward that takes this multiple of the smallest one is bound by arithmetic, not by reading
# weights
RISEN = 1.6
_DRAFT, _FIRST, _CAUGHT_UP = 0, -1, -2  # keys of `_dense` beside batch sizes


@dataclass(frozen=True, slots=True)
class VerifySample:
    """One timed target forward: sequences, rows in all (roots included), mean KV tokens per
    sequence, seconds; or the means of several `rounds`."""

    batch: int
    rows: int
    context: float
    seconds: float
    rounds: int = 1


@dataclass(frozen=True, slots=True)
class DraftSample:
    """One timed level of the model drafter: expanded rows, mean KV tokens per sequence, seconds.

    waiting: of a first level, whose `width` rows are the roots, the rows that it caught up with
    beside them."""

    width: int
    context: float
    seconds: float
    waiting: int | None = None


Sample: TypeAlias = VerifySample | DraftSample


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds over a count of rows: linear between points, constant before the first, linear beyond
    the last with the mean slope of the upper half (one flat last step must not make further rows
    look free)."""

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def dense(self, size: int) -> FloatArray:
        """Seconds at 0, 1, ... size - 1 rows."""
        grid: FloatArray = np.arange(size, dtype=np.float64)
        values: FloatArray = np.interp(grid, self.rows, self.seconds)
        last = self.rows[-1]
        values[last:] = self.seconds[-1] + self._slope() * (grid[last:] - last)
        return values

    def _slope(self) -> float:
        last = self.rows[-1]
        if len(self.rows) == 1:
            return self.seconds[-1] / max(last, 1)
        half = max(i for i, rows in enumerate(self.rows[:-1]) if rows <= last / 2 or i == 0)
        return max(0.0, (self.seconds[-1] - self.seconds[half]) / (last - self.rows[half]))


# Used where nothing was measured: a forward bound by reading weights, 2 % more per row. Real rounds
# correct it.
DEFAULT_VERIFY = {1: Curve((1, 101), (0.02, 0.06))}
DEFAULT_DRAFT = Curve((1, 101), (0.002, 0.004))


@dataclass(frozen=True, slots=True)
class CostModel:
    """Predicts seconds. Immutable: `corrected` returns the next model, sharing the tables.

    verify: batch size -> curve over rows at context 0; between batch sizes linear in log batch,
    constant outside. draft: curve over expanded rows of one level of the model drafter at context
    0, first: over the roots of a first level (None: as any other). waiting: what rows that wait add
    to it, over their number. overhead_seconds: fixed cost of a round that speculates, beyond its
    forwards.
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
    _dense: dict[int, FloatArray] = field(default_factory=dict, repr=False, compare=False)
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
        curves = {batch: _curve(table) for batch, table in sorted(verify.items()) if table}
        return cls(
            curves or DEFAULT_VERIFY,
            _curve(draft) if draft else DEFAULT_DRAFT,
            overhead_seconds=overhead_seconds,
        )

    @classmethod
    def fit(cls, samples: Iterable[Sample], overhead_seconds: float = 0.0) -> CostModel:
        """Fits measured samples: attention by non-negative least squares, the rest a monotone table
        of medians.

        Unusable samples are ignored; what nothing remains for falls back to the default curves."""
        usable = [s for s in samples if _usable(s)]
        verify = [s for s in usable if isinstance(s, VerifySample)]
        levels = [s for s in usable if isinstance(s, DraftSample)]
        draft = [s for s in levels if s.waiting is None]
        row_token, sequence_token = _attention(verify)
        cells: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for v in verify:
            attention = v.context * (row_token * v.rows + sequence_token * v.batch)
            cells[v.batch][v.rows].append(max(v.seconds - attention, 0.05 * v.seconds))
        draft_token, _ = _attention([VerifySample(0, d.width, d.context, d.seconds) for d in draft])
        widths: dict[int, list[float]] = defaultdict(list)
        for d in draft:
            widths[d.width].append(
                max(d.seconds - draft_token * d.width * d.context, 0.05 * d.seconds)
            )
        roots: dict[int, list[float]] = defaultdict(list)
        caught_up: dict[int, list[float]] = defaultdict(list)
        for d in (s for s in levels if s.waiting is not None):
            if not d.waiting:
                roots[d.width].append(
                    max(d.seconds - draft_token * d.width * d.context, 0.05 * d.seconds)
                )
            if d.width == 1:
                caught_up[d.waiting or 0].append(d.seconds)
        overhead = (
            overhead_seconds if math.isfinite(overhead_seconds) and overhead_seconds > 0 else 0.0
        )
        return cls(
            {batch: _monotone(cell) for batch, cell in sorted(cells.items())} or DEFAULT_VERIFY,
            _monotone(widths) if widths else DEFAULT_DRAFT,
            row_token,
            sequence_token,
            draft_token,
            overhead,
            first=_monotone(roots) if roots else None,
            waiting=_beyond_the_first(_monotone(caught_up))
            if len(caught_up) > 1 and 0 in caught_up
            else None,
        )

    def verify_seconds(self, batch: int, rows: ArrayLike, context: float) -> FloatArray:
        """Seconds of one target forward of `rows` rows in all (integers of any shape, roots
        included)."""
        rows_: IntArray = np.asarray(rows, np.int64)
        try:
            base = self._table(batch, 0)[rows_]
        except IndexError:
            base = self._table(batch, int(rows_.max()) + 1)[rows_]
        return self._corrected(
            rows_, base + rows_ * (self.row_token * context) + batch * self.sequence_token * context
        )

    def verify_curve(self, batch: int, first: int, count: int, context: float) -> FloatArray:
        """Seconds at first, first + 1, ... first + count - 1 rows: `verify_seconds` for a scan over
        tree sizes."""
        rows = slice(first, first + count)
        attention = np.arange(first, first + count) * (self.row_token * context)
        attention += batch * self.sequence_token * context
        return self._corrected(rows, self._table(batch, first + count)[rows] + attention)

    def _corrected(self, rows: IntArray | slice, table: FloatArray) -> FloatArray:
        """A verification's seconds by the table, as they are now."""
        at = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
        return self.verify_correction.seconds(rows, table, self._stall_seconds(at))

    def _stall_seconds(self, rows: IntArray | int) -> FloatArray:
        """Seconds of a verification in which its arithmetic waits for the weights: all of the
        smallest one's, fewer with every further row."""
        weights, most = self._stall
        result: FloatArray = weights * np.maximum(0.0, 1.0 - (rows - 1) / most)
        return result

    def draft_seconds(self, width: ArrayLike, context: float) -> FloatArray:
        """Seconds of one level of the model drafter, not the first, that expands `width` rows."""
        width_: IntArray = np.asarray(width, np.int64)
        base = self._table(_DRAFT, int(width_.max()) + 1)[width_]
        return self.draft_correction.seconds(
            width_, base + width_ * (self.draft_token * context), 0.0
        )

    def first_seconds(self, roots: int, waiting: ArrayLike, context: float) -> FloatArray:
        """Seconds of the first level for `roots` requests, which catches up with `waiting` rows
        beside one of each."""
        waiting_: IntArray = np.asarray(waiting, np.int64)
        if self.first is None or self.waiting is None:
            return self.draft_seconds(roots + waiting_, context)
        return self.first_correction.seconds(
            roots + waiting_, self._first_level(roots, waiting_, context), 0.0
        )

    def levels_seconds(self, roots: int, widths: Sequence[int], context: float) -> list[float]:
        """Seconds of each level of a round, of which the first one's width is the roots and all
        that waits."""
        if not widths:
            return []
        first = float(self.first_seconds(roots, widths[0] - roots, context))
        return (
            [first, *self.draft_seconds(list(widths[1:]), context).tolist()]
            if len(widths) > 1
            else [first]
        )

    def _first_level(self, roots: int, waiting: IntArray, context: float) -> FloatArray:
        """The table's seconds of a first level."""
        roots_ = float(self._table(_FIRST, roots + 1)[roots]) + roots * self.draft_token * context
        caught_up: FloatArray = self._table(_CAUGHT_UP, int(waiting.max()) + 1)[waiting]
        return caught_up + roots_

    def corrected(self, observed: Sample) -> CostModel:
        """The model after one real step; absurd times count little, unusable ones nothing."""
        if not _usable(observed):
            return self
        if isinstance(observed, VerifySample):
            rows, context = observed.rows, observed.context
            attention = context * (self.row_token * rows + self.sequence_token * observed.batch)
            base = float(self._table(observed.batch, rows + 1)[rows]) + attention
            stalled, rounds = float(self._stall_seconds(rows)), observed.rounds
            verify = self.verify_correction.updated(rows, base, stalled, observed.seconds, rounds)
            return self._with(verify, self.draft_correction, self.first_correction)
        width = observed.width
        if observed.waiting is not None and self.first is not None and self.waiting is not None:
            base = float(self._first_level(width, np.array(observed.waiting), observed.context))
            first = self.first_correction.updated(
                width + observed.waiting, base, 0.0, observed.seconds
            )
            return self._with(self.verify_correction, self.draft_correction, first)
        width += observed.waiting or 0
        base = (
            float(self._table(_DRAFT, width + 1)[width])
            + self.draft_token * width * observed.context
        )
        draft = self.draft_correction.updated(width, base, 0.0, observed.seconds)
        return self._with(self.verify_correction, draft, self.first_correction)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers; corrections belong to the running machine and are left out."""
        return {
            "verify": {
                str(batch): [list(c.rows), list(c.seconds)] for batch, c in self.verify.items()
            },
            "draft": [list(self.draft.rows), list(self.draft.seconds)],
            **{
                name: [list(c.rows), list(c.seconds)]
                for name, c in (("first", self.first), ("waiting", self.waiting))
                if c is not None
            },
            "row_token": self.row_token,
            "sequence_token": self.sequence_token,
            "draft_token": self.draft_token,
            "overhead_seconds": self.overhead_seconds,
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> CostModel:
        """The inverse of `to_dict`. Raises KeyError, TypeError or ValueError for anything else."""
        curves = {int(b): _curve(dict(zip(*c, strict=True))) for b, c in state["verify"].items()}
        draft = _curve(dict(zip(*state["draft"], strict=True)))
        first, waiting = (
            _curve(dict(zip(*state[name], strict=True))) if name in state else None
            for name in ("first", "waiting")
        )
        row, sequence, level, overhead = (
            float(state[name])
            for name in ("row_token", "sequence_token", "draft_token", "overhead_seconds")
        )
        if not curves or not all(
            math.isfinite(x) and x >= 0 for x in (row, sequence, level, overhead)
        ):
            raise ValueError("not a cost profile")
        return cls(curves, draft, row, sequence, level, overhead, first=first, waiting=waiting)

    def _with(self, verify: Correction, draft: Correction, first: Correction) -> CostModel:
        tables = (self.verify, self.draft, self.row_token, self.sequence_token, self.draft_token)
        levels = (self.first, self.waiting, first)
        return CostModel(
            *tables, self.overhead_seconds, verify, draft, *levels, self._dense, self._stall
        )

    def _table(self, batch: int, size: int) -> FloatArray:
        """Dense seconds over rows at `batch`, or of another curve, computed once and grown on
        demand."""
        table = self._dense.get(batch)
        if table is None or len(table) < size:
            length = 512 if size <= 512 else 2 * size
            curve = {_DRAFT: self.draft, _FIRST: self.first, _CAUGHT_UP: self.waiting}.get(batch)
            table = self._at_batch(batch, length) if curve is None else curve.dense(length)
            self._dense[batch] = table
        return table

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
    whose arithmetic takes about as long: where the curve has risen well above that."""
    risen = np.flatnonzero(curve.dense(512) > RISEN * curve.seconds[0])
    return float(curve.seconds[0]), max(float(risen[0]) if len(risen) else 512.0, 2.0)


def _usable(sample: Sample) -> bool:
    sizes = (sample.batch, sample.rows) if isinstance(sample, VerifySample) else (sample.width,)
    numbers = (*sizes, sample.context, sample.seconds)
    return (
        all(math.isfinite(x) for x in numbers)
        and min(sizes) >= 1
        and sample.context >= 0
        and sample.seconds > 0
    )


def _curve(table: Mapping[int, float]) -> Curve:
    rows = sorted(table)
    seconds = [float(table[r]) for r in rows]
    if not rows or rows[0] < 0 or not all(math.isfinite(s) and s > 0 for s in seconds):
        raise ValueError("a cost curve needs positive, finite seconds at non-negative row counts")
    return Curve(tuple(int(r) for r in rows), tuple(seconds))


def _monotone(cells: Mapping[int, list[float]]) -> Curve:
    """Medians per row count, made non-decreasing by isotonic regression of their logarithms."""
    rows = sorted(cells)
    logs = np.log([float(np.median(cells[r])) for r in rows])
    fitted = isotonic_regression(
        logs, weights=np.array([len(cells[r]) for r in rows], np.float64)
    ).x
    return Curve(tuple(rows), tuple(float(s) for s in np.exp(fitted)))


def _beyond_the_first(curve: Curve) -> Curve:
    """What further rows add; no curve holds a zero."""
    return Curve(curve.rows, tuple(max(s - curve.seconds[0], 1e-9) for s in curve.seconds))


def _attention(samples: list[VerifySample]) -> tuple[float, float]:
    """Seconds per (row, context token) and (sequence, context token), from cells measured at
    several contexts."""
    cells: dict[tuple[int, int], list[VerifySample]] = defaultdict(list)
    for sample in samples:
        cells[sample.batch, sample.rows].append(sample)
    features, targets = [], []
    for (batch, rows), cell in cells.items():
        context = np.array([s.context for s in cell])
        seconds = np.array([s.seconds for s in cell])
        if np.ptp(context) > 0:
            centred = (context - context.mean()) / seconds.mean()
            features.append(np.stack((rows * centred, batch * centred), axis=1))
            targets.append((seconds - seconds.mean()) / seconds.mean())
    if not features:
        return 0.0, 0.0
    solution, _ = nnls(np.concatenate(features), np.concatenate(targets))
    return float(solution[0]), float(solution[1])
