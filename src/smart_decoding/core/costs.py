"""The cost model of a round: measured tables of seconds, interpolated, and corrected by the times
of real rounds.

    round = overhead + first_seconds(roots, waiting) + sum of draft_seconds(width) of deeper levels
            + verify_seconds(batch, rows, context)

The first level has a table and a speed of its own: it finds the caches full of the target's
weights, and catches up with `waiting` rows, which only need keys. Deeper levels find the drafter's
weights in the caches. Both speeds differ from the target's.

A mixture's rows read experts of their own: `ExpertCosts` has the seconds of those beyond one row's.

`context` is always the mean number of KV tokens per sequence. Attention adds `row_token` seconds
per row and context token (arithmetic) and `sequence_token` per sequence and context token (reading
the cache); the tables hold all other seconds.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from smart_decoding.core.batch import size_bucket
from smart_decoding.core.calibration import RunningMean

if TYPE_CHECKING:
    from smart_decoding.core.tree import FloatArray, IntArray

# --- samples --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class VerifySample:
    """One timed target forward, or the means of several `rounds`. batch: sequences; rows: of all,
    roots included; context: mean KV tokens per sequence. experts: that the rows woke, in the mean
    of a mixture's layers; 0: not known, or there are none."""

    batch: int
    rows: float
    context: float
    seconds: float
    rounds: int = 1
    experts: float = 0.0


@dataclass(frozen=True, slots=True)
class DraftSample:
    """One timed level of the model drafter, or the means of several. width: expanded rows; context:
    mean KV tokens per sequence.

    waiting: rows that a first level caught up with, in addition to its `width` roots; None for a
    deeper level."""

    width: float
    context: float
    seconds: float
    waiting: float | None = None


Sample: TypeAlias = VerifySample | DraftSample


def is_usable(sample: Sample) -> bool:
    """Return whether a sample holds finite, positive numbers."""
    sizes = (sample.batch, sample.rows) if isinstance(sample, VerifySample) else (sample.width,)
    numbers = (*sizes, sample.context, sample.seconds)
    if not all(math.isfinite(x) for x in numbers):
        return False
    return min(sizes) >= 1 and sample.context >= 0 and sample.seconds > 0


# --- curves ---------------------------------------------------------------------------------------
#
# Seconds over a count of rows, as measured.


_TINY = float(np.finfo(float).tiny)


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds over rows: linear between points and constant before the first. Beyond the last point
    it has the mean slope of the upper half: one flat last step must not make further rows look
    free."""

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    @classmethod
    def from_table(cls, table: Mapping[int, float]) -> Curve:
        """Return the curve through {rows: seconds}. Raises ValueError for unusable numbers."""
        rows = sorted(table)
        seconds = [float(table[r]) for r in rows]
        if not rows or rows[0] < 0 or not all(math.isfinite(s) and s > 0 for s in seconds):
            raise ValueError("a cost curve needs positive, finite seconds at row counts from 0")
        return cls(tuple(int(r) for r in rows), tuple(seconds))

    @classmethod
    def monotone(cls, samples: Mapping[float, list[float]]) -> Curve:
        """Return the curve of medians per whole row count, made non-decreasing by isotonic
        regression of their logarithms."""
        rows = sorted(samples)
        logs = np.log([float(np.median(samples[r])) for r in rows])
        weights = np.array([len(samples[r]) for r in rows], np.float64)
        seconds = np.exp(non_decreasing(logs, weights)).tolist()
        return cls(tuple(int(r) for r in rows), tuple(seconds))

    def beyond_first(self) -> Curve:
        """Return the seconds that rows beyond the first point add; tiny instead of zero."""
        return Curve(self.rows, tuple(max(s - self.seconds[0], _TINY) for s in self.seconds))

    def dense(self, size: int) -> FloatArray:
        """Return the seconds at 0, 1, ... size - 1 rows."""
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

    def to_lists(self) -> list[list[float]]:
        """Return rows and seconds; `from_lists` is the inverse."""
        return [list(self.rows), list(self.seconds)]

    @classmethod
    def from_lists(cls, lists: list[list[float]]) -> Curve:
        """Return the curve of `to_lists`. Raises TypeError or ValueError for anything else."""
        return cls.from_table(dict(zip(*lists, strict=True)))


def non_decreasing(values: FloatArray, weights: FloatArray) -> FloatArray:
    """Return the non-decreasing sequence closest to `values` by weighted least squares. Decreasing
    neighbours merge at their mean (pool adjacent violators)."""
    blocks: list[tuple[float, float, int]] = []  # mean, weight, values
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        blocks.append((value, weight, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (low, first, n), (high, second, m) = blocks[-2:]
            mean = (low * first + high * second) / (first + second)
            blocks[-2:] = [(mean, first + second, n + m)]
    return np.repeat([mean for mean, _, _ in blocks], [count for _, _, count in blocks])


# --- correction -----------------------------------------------------------------------------------
#
# Online correction of a cost table by the times of real steps: a Kalman filter (extended, as one
# state acts within a logarithm). Its states are log factors:
#
#   speed    of every step: a shared machine becomes slower or faster as a whole.
#   memory   of reading the weights: other programs leave more or less memory bandwidth. This is the
#            whole cost of a few rows, and nothing of many, which are bound by arithmetic.
#   octaves  errors of the table at 1, 2, 4, ... rows, linear in log rows between them.
#
# The states' uncertainty decides how far a step of 24 rows corrects the cost of one row. A rare
# exploration settles the states that many steps of one size leave uncertain.


MAX_ROWS = 8192  # initial size of a dense table
NOISE = 0.06  # standard deviation of the logarithm of one step's time
# Standard deviations beyond which an observation is a surprise. It is clipped, so that outliers
# move little; and the speed becomes less certain, as the machine may have changed.
SURPRISE = 2.0
OCTAVES: FloatArray = np.arange(9.0)  # log2 of 1, 2, ... 256 rows
SPEED, MEMORY = 0, 1  # places of the states; those of the octaves follow
# Prior standard deviations.
ERROR = 0.1  # of a table, at each octave
PRIOR: FloatArray = np.array([0.2, 0.8, *[ERROR] * len(OCTAVES)])
# Each observation shrinks all states a little and makes them a little less certain. The variance
# of an unobserved state grows back to its prior, and no further. A machine changes within seconds,
# the table's errors stay.
LESSON = 1 / 16  # prior deviations
WALK: FloatArray = np.where(PRIOR > ERROR, LESSON, LESSON / 4)
KEEP: FloatArray = np.sqrt(1.0 - WALK**2)
_WALKED: FloatArray = np.diag((WALK * PRIOR) ** 2)


@dataclass(frozen=True, slots=True, eq=False)
class Correction:
    """The filter's state. logs: [states] log factors. covariance: [states, states].

    All are logarithms, so that a step that only reads weights is linear in them: with a curve, the
    filter would drift along it."""

    logs: FloatArray = field(default_factory=lambda: np.zeros(len(PRIOR)))
    covariance: FloatArray = field(default_factory=lambda: np.diag(PRIOR**2))

    def seconds(self, table: FloatArray, weights: FloatArray | float) -> FloatArray:
        """Return the seconds of a table, corrected by speed and memory. weights: the part of them
        in which a step only waits for the weights."""
        now: FloatArray = table + math.expm1(self.logs[MEMORY]) * np.minimum(weights, table)
        now *= math.exp(self.logs[SPEED])
        return now

    def of_rows(self, rows: IntArray) -> FloatArray:
        """Return the further factors of verifications of so many rows."""
        octaves = np.interp(np.log2(np.maximum(rows, 1)), OCTAVES, self.logs[2:])
        factors: FloatArray = np.exp(octaves)
        return factors

    def updated(
        self,
        table: float,
        weights: float,
        seconds: float,
        steps: int = 1,
        rows: float = 0.0,
    ) -> Correction:
        """Return the correction after a step of `seconds`, or the means of `steps`; `table` and
        `weights` as in `seconds()`. rows: of a verification; 0: it was a drafter's level.

        Unusable times (NaN, zero, negative) change nothing."""
        if not (math.isfinite(seconds) and seconds > 0 and table > 0):
            return self
        logs = KEEP * self.logs
        covariance = np.outer(KEEP, KEEP) * self.covariance + _WALKED
        weights = min(weights, table)  # in a noisy profile they may take longer
        now = table + math.expm1(logs[MEMORY]) * weights
        slope = np.zeros(len(PRIOR))  # of the log seconds, by each state
        slope[SPEED] = 1.0
        if rows:
            slope[2:] = _at_octaves(rows)
        error = math.log(seconds / now) - float(slope @ logs)
        slope[MEMORY] = math.exp(logs[MEMORY]) * weights / now
        # Covariance of the log seconds with each state, and their standard deviation.
        with_states = covariance @ slope
        spread = math.sqrt(float(slope @ with_states) + NOISE**2 / steps)
        error /= spread
        clipped = min(max(error, -SURPRISE), SURPRISE) / spread
        covariance -= np.outer(with_states, with_states) / spread**2
        if abs(error) > SURPRISE:
            covariance[SPEED, SPEED] += (0.5 * PRIOR[SPEED]) ** 2
        return Correction(logs + with_states * clipped, covariance)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Correction)
            and np.array_equal(self.logs, other.logs)
            and np.array_equal(self.covariance, other.covariance)
        )

    __hash__ = None  # type: ignore[assignment]


def _at_octaves(rows: float) -> FloatArray:
    """Return the weight of each octave's error at so many rows."""
    weights: FloatArray = np.maximum(0.0, 1.0 - np.abs(OCTAVES - min(math.log2(rows), OCTAVES[-1])))
    return weights


# --- experts --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Share:
    """A learned number in [0, 1]: the mean of the first lessons, then of the later ones."""

    value: float = 1.0
    lessons: int = 0

    def learned(self, value: float) -> Share:
        """Return the share after one more lesson."""
        weight = max(LESSON, 1.0 / (1 + self.lessons))
        clipped = min(max(value, 0.0), 1.0)
        return Share(self.value + weight * (clipped - self.value), self.lessons + 1)


@dataclass(frozen=True, slots=True)
class ExpertCosts:
    """Seconds of the experts that rows wake beyond those of one row: verification by a mixture may
    take two to three times as long for them (Cascade, arXiv:2506.20675).

    count, per_row: a layer's experts, and those of one row. seconds: of one further expert in each
    layer. requests, nodes: as how many rows with experts of their own a further request's row
    counts, and a further node's. Rows of 1 draw their experts anew, those of 0 have the same ones.
    A layer with n drawn rows has count * (1 - (1 - per_row / count) ** n) experts awake."""

    count: int
    per_row: int
    seconds: float
    requests: Share = field(default_factory=Share)
    nodes: Share = field(default_factory=Share)

    def awake(self, batch: int, rows: FloatArray | IntArray | float) -> FloatArray:
        """Return how many experts of a layer so many rows are expected to wake."""
        further = self.nodes.value * (np.asarray(rows) - batch)
        drawn = 1.0 + self.requests.value * (batch - 1) + further
        result: FloatArray = self.count * (1.0 - (1.0 - self.per_row / self.count) ** drawn)
        return result

    def further_seconds(self, awake: FloatArray | float) -> FloatArray:
        """Return the seconds of the experts beyond one row's."""
        result: FloatArray = self.seconds * np.maximum(0.0, np.asarray(awake) - self.per_row)
        return result

    def learned(self, sample: VerifySample) -> ExpertCosts:
        """Return what a forward says of how far rows share experts."""
        batch, rows, missed = sample.batch, sample.rows, 1.0 - self.per_row / self.count
        asleep = 1.0 - sample.experts / self.count
        if not sample.experts or not 0 < asleep < 1 or not 0 < missed < 1:
            return self  # all are awake, so nothing is said
        further = math.log(asleep) / math.log(missed) - 1.0
        if rows > batch:
            own = (further - self.requests.value * (batch - 1)) / (rows - batch)
            return replace(self, nodes=self.nodes.learned(own))
        if batch == 1:
            return self
        return replace(self, requests=self.requests.learned(further / (batch - 1)))


__all__ = ["CostModel", "Curve", "DraftSample", "ExpertCosts", "Sample", "VerifySample"]

# Initial guess without measurements, corrected by real rounds: a forward of 20 ms, bound by reading
# weights, 2 % more per further row; a drafted level takes a tenth of it.
SMALLEST = 0.02
FURTHER_ROW = 0.02
LEVEL = 0.1
_DEFAULT = Curve((1, 2), (SMALLEST, SMALLEST * (1 + FURTHER_ROW)))
DEFAULT_VERIFY = {1: _DEFAULT}
DEFAULT_DRAFT = Curve(_DEFAULT.rows, tuple(LEVEL * s for s in _DEFAULT.seconds))

_Key: TypeAlias = int | str  # of a dense table: batch size of a verification, or name of a field


@dataclass(frozen=True, slots=True)
class CostModel:
    """Predicts seconds. Immutable: `corrected` returns the next model, sharing the tables.

    verify: batch size -> curve over rows at context 0; between batch sizes linear in log batch,
    constant outside. draft: curve over expanded rows of one level of the model drafter at context
    0. overhead_seconds: fixed cost of a round that speculates, beyond its forwards. first: curve
    over the roots of a first level (None: as any other level). waiting: curve over waiting rows, of
    the seconds that they add to the first level. experts: costs of a mixture's, which `verify` has
    for one row.
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
    experts: ExpertCosts | None = None
    _dense: dict[_Key, FloatArray] = field(default_factory=dict, repr=False, compare=False)
    _stall: tuple[float, ...] = field(default=(), repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self._stall:  # a corrected model has its predecessor's
            object.__setattr__(self, "_stall", _stall_of(next(iter(self.verify.values()))))

    @classmethod
    def default(cls) -> CostModel:
        """Return a guess, to use without a profile; the first real rounds correct it."""
        return cls(DEFAULT_VERIFY, DEFAULT_DRAFT)

    @classmethod
    def from_table(
        cls,
        verify: Mapping[int, Mapping[int, float]],
        draft: Mapping[int, float] | None = None,
        overhead_seconds: float = 0.0,
    ) -> CostModel:
        """Return a model of explicit tables {batch: {rows: seconds}} and {width: seconds}, of any
        shape."""
        curves = {b: Curve.from_table(table) for b, table in sorted(verify.items()) if table}
        return cls(
            curves or DEFAULT_VERIFY,
            Curve.from_table(draft) if draft else DEFAULT_DRAFT,
            overhead_seconds=overhead_seconds,
        )

    # --- predictions ---

    def verify_seconds(self, batch: int, rows: ArrayLike, context: float) -> FloatArray:
        """Return the seconds of one target forward of `rows` rows (integers of any shape), roots
        included."""
        rows_: IntArray = np.asarray(rows, np.int64)
        try:
            base = self._table(batch, 0)[rows_]
        except IndexError:
            base = self._table(batch, int(rows_.max()) + 1)[rows_]
        attention = rows_ * (self.row_token * context)
        sequences = batch * self.sequence_token * context
        table = base + attention + sequences
        return self._verified(table, batch, rows_)

    def verify_curve(self, batch: int, first: int, count: int, context: float) -> FloatArray:
        """Return the seconds at first, first + 1, ... first + count - 1 rows: `verify_seconds` for
        a scan over tree sizes."""
        rows = np.arange(first, first + count)
        attention = rows * (self.row_token * context)
        attention += batch * self.sequence_token * context
        table = self._table(batch, first + count)[first : first + count] + attention
        return self._verified(table, batch, rows)

    def _verified(self, table: FloatArray, batch: int, rows: IntArray) -> FloatArray:
        """Return the corrected seconds of forwards, with those of the experts that they wake."""
        weights = self._stall_seconds(rows)
        if self.experts is not None:
            further = self.experts.further_seconds(self.experts.awake(batch, rows))
            table = table + further
            weights = weights + further
        correction = self.verify_correction
        return correction.seconds(table, weights) * correction.of_rows(rows)

    def draft_seconds(self, width: ArrayLike, context: float) -> FloatArray:
        """Return the seconds of one level of the model drafter, not the first, that expands `width`
        rows."""
        width_: IntArray = np.asarray(width, np.int64)
        base = self._table("draft", int(width_.max()) + 1)[width_]
        table = base + width_ * (self.draft_token * context)
        return self.draft_correction.seconds(table, 0.0)

    def first_seconds(self, roots: int, waiting: ArrayLike, context: float) -> FloatArray:
        """Return the seconds of the first level for `roots` requests, which catches up with
        `waiting` rows in addition to one of each request."""
        waiting_: IntArray = np.asarray(waiting, np.int64)
        if not self._knows_first:
            return self.draft_seconds(roots + waiting_, context)
        caught_up = self._table("waiting", int(waiting_.max()) + 1)[waiting_]
        table = caught_up + self._first_level_seconds(roots, context)
        return self.first_correction.seconds(table, 0.0)

    def levels_seconds(self, roots: int, widths: Sequence[int], context: float) -> list[float]:
        """Return the seconds of each level of a round. The first width counts the roots and all
        waiting rows."""
        if not widths:
            return []
        first = float(self.first_seconds(roots, widths[0] - roots, context))
        if len(widths) == 1:
            return [first]
        return [first, *self.draft_seconds(list(widths[1:]), context).tolist()]

    # --- corrections ---

    def corrected(self, observed: Sample) -> CostModel:
        """Return the model corrected by one real step. Outliers count little, unusable times not at
        all."""
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
        experts = self.experts
        if experts is not None:
            awake = s.experts or experts.awake(s.batch, s.rows)
            further = float(experts.further_seconds(awake))
            table += further
            stalled += further
            experts = experts.learned(s)
        correction = self.verify_correction.updated(table, stalled, s.seconds, s.rounds, s.rows)
        return replace(self, verify_correction=correction, experts=experts)

    def _corrected_by_first(self, s: DraftSample, waiting: float) -> CostModel:
        table = self._at("waiting", waiting) + self._first_level_seconds(s.width, s.context)
        correction = self.first_correction.updated(table, 0.0, s.seconds)
        return replace(self, first_correction=correction)

    def _corrected_by_level(self, s: DraftSample) -> CostModel:
        width = s.width + (s.waiting or 0)
        table = self._at("draft", width) + self.draft_token * width * s.context
        correction = self.draft_correction.updated(table, 0.0, s.seconds)
        return replace(self, draft_correction=correction)

    # --- on disk ---

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and numbers, without corrections, which belong to the running
        machine."""
        levels = {"draft": self.draft, "first": self.first, "waiting": self.waiting}
        experts = self.experts
        return {
            **({} if experts is None else {"experts": _lasting(experts)}),
            "verify": {str(batch): curve.to_lists() for batch, curve in self.verify.items()},
            **{name: curve.to_lists() for name, curve in levels.items() if curve is not None},
            "row_token": self.row_token,
            "sequence_token": self.sequence_token,
            "draft_token": self.draft_token,
            "overhead_seconds": self.overhead_seconds,
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> CostModel:
        """Return the model of a `to_dict`. Raises KeyError, TypeError or ValueError for anything
        else."""
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
        experts = ExpertCosts(**state["experts"]) if "experts" in state else None
        if experts and not (0 < experts.per_row <= experts.count and experts.seconds >= 0):
            raise ValueError("not costs of experts")
        return cls(
            *(curves, draft, row, sequence, level, overhead),
            first=first,
            waiting=waiting,
            experts=experts,
        )

    # --- tables ---

    @property
    def _knows_first(self) -> bool:
        return self.first is not None and self.waiting is not None

    def _first_level_seconds(self, roots: float, context: float) -> float:
        """Return the table's seconds of a first level without waiting rows."""
        return self._at("first", roots) + roots * self.draft_token * context

    def _stall_seconds(self, rows: IntArray | float) -> FloatArray:
        """Return the seconds of a verification in which its arithmetic waits for the weights: all
        seconds of the smallest one, fewer with every further row."""
        weights, most = self._stall
        result: FloatArray = weights * np.maximum(0.0, 1.0 - (rows - 1) / most)
        return result

    def _table(self, key: _Key, size: int) -> FloatArray:
        """Return dense seconds over rows, computed once and extended on demand."""
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
        """Return a table's seconds at a mean number of rows, by interpolation."""
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


def _lasting(experts: ExpertCosts) -> dict[str, float]:
    """Return the fields that belong to the machine, not to the texts."""
    return {"count": experts.count, "per_row": experts.per_row, "seconds": experts.seconds}


def _stall_of(curve: Curve) -> tuple[float, float]:
    """Return the seconds of the smallest forward, which only waits for the weights, and the number
    of rows whose arithmetic takes about as long: where the curve has doubled."""
    risen = np.flatnonzero(curve.dense(MAX_ROWS) > 2.0 * curve.seconds[0])
    return float(curve.seconds[0]), max(float(risen[0]) if len(risen) else float(MAX_ROWS), 2.0)


# --- overhead -------------------------------------------------------------------------------------
#
# The seconds of a round outside its forwards, learned from real rounds.


class Overhead:
    """Learns the seconds outside the forwards, of plain and of drafting rounds, by size bucket."""

    def __init__(self, drafting: float) -> None:
        self._drafting = drafting  # initial guess of drafting, beyond a plain round
        self._means: defaultdict[tuple[int, bool], RunningMean] = defaultdict(RunningMean)

    def of(self, size: int, drafts: bool) -> float:
        """Return the seconds for a batch of `size` requests: its bucket's, or the nearest known
        bucket's."""
        bucket = size_bucket(size)
        if (bucket, drafts) in self._means:
            return self._means[bucket, drafts].mean
        known = [key for key in self._means if key[1] == drafts]
        if known:
            return self._means[min(known, key=lambda key: abs(key[0] - bucket))].mean
        if drafts:
            return self.of(size, False) + self._drafting
        return 0.0

    def observe(self, size: int, drafts: bool, seconds: float) -> None:
        """Learn from a round without prompts. A slow one, such as the first of its kind, counts as
        at most twice the usual."""
        usual = self.of(size, drafts)
        self._means[size_bucket(size), drafts].observe(min(seconds, 2.0 * usual or seconds))
