"""Cost models from measured forwards: attention by non-negative least squares, all else a monotone
curve of medians."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from smart_decoding.core.costs import (
    DEFAULT_DRAFT,
    DEFAULT_VERIFY,
    CostModel,
    Curve,
    DraftSample,
    ExpertCosts,
    Sample,
    VerifySample,
    is_usable,
)

if TYPE_CHECKING:
    from smart_decoding.core.tree import FloatArray

LEAST = 0.05  # part of a forward's seconds that is not attention, whatever the fit says
Cells: TypeAlias = dict[float, list[float]]  # seconds measured, by rows


class VerifyFit(NamedTuple):
    """The fitted fields of `CostModel` for verification."""

    curves: dict[int, Curve]
    row_token: float
    sequence_token: float
    expert: float = 0.0


class LevelFit(NamedTuple):
    """The fitted fields of `CostModel` for draft levels; None without samples."""

    draft: Curve | None
    first: Curve | None
    waiting: Curve | None
    draft_token: float


def fit_costs(
    samples: Iterable[Sample],
    overhead_seconds: float = 0.0,
    experts: tuple[int, int] | None = None,
) -> CostModel:
    """Fit measured samples. Unusable ones are ignored; curves without samples are the defaults.
    experts: of a mixture's layer, how many there are, and how many a row has."""
    usable = [s for s in samples if is_usable(s)]
    verify = fit_verify([s for s in usable if isinstance(s, VerifySample)])
    levels = fit_levels([s for s in usable if isinstance(s, DraftSample)])
    known = math.isfinite(overhead_seconds) and overhead_seconds > 0
    return CostModel(
        verify.curves or DEFAULT_VERIFY,
        levels.draft or DEFAULT_DRAFT,
        verify.row_token,
        verify.sequence_token,
        levels.draft_token,
        overhead_seconds if known else 0.0,
        first=levels.first,
        waiting=levels.waiting,
        experts=ExpertCosts(*experts, verify.expert) if experts else None,
    )


def fit_verify(samples: Sequence[VerifySample]) -> VerifyFit:
    """Return curves by batch size, and the attention's slopes, of target forwards.

    Without attention, a row costs the same in every request. So all batches share one shape, which
    has far less noise than the few forwards of one batch, and differ by a factor."""
    if not samples:
        return VerifyFit({}, 0.0, 0.0)
    row_token, sequence_token = _attention(samples)
    expert = _expert(samples)
    own = min((s.experts for s in samples), default=0.0)  # one row's
    seconds = [
        _without(
            s.seconds,
            s.context * (row_token * s.rows + sequence_token * s.batch)
            + expert * (s.experts - own),
        )
        for s in samples
    ]
    factors = dict.fromkeys(sorted({s.batch for s in samples}), 1.0)
    shape = _shape(samples, seconds, factors)
    for _ in range(2):  # as the shape depends on the factors, and they on it
        of_rows: dict[float, float] = dict(zip(shape.rows, shape.seconds, strict=True))
        for batch in factors:
            mine = zip(samples, seconds, strict=True)
            ratios = [each / of_rows[s.rows] for s, each in mine if s.batch == batch]
            factors[batch] = float(np.median(ratios))
        shape = _shape(samples, seconds, factors)
    curves = {
        batch: Curve(shape.rows, tuple(factor * s for s in shape.seconds))
        for batch, factor in factors.items()
    }
    return VerifyFit(curves, row_token, sequence_token, expert)


def _expert(samples: Sequence[VerifySample]) -> float:
    """Return seconds of a further expert in each layer, from forwards that differ in nothing but
    their experts."""
    cells: dict[tuple[int, float, float], list[VerifySample]] = defaultdict(list)
    for sample in samples:
        cells[sample.batch, sample.rows, sample.context].append(sample)
    covariance = variance = 0.0
    for cell in cells.values():
        awake = np.array([s.experts for s in cell])
        seconds = np.array([s.seconds for s in cell])
        centred = (awake - awake.mean()) / seconds.mean()
        covariance += float(centred @ (seconds / seconds.mean()))
        variance += float(centred @ centred)
    return max(0.0, covariance / variance) if variance > 0 else 0.0


def _shape(
    samples: Sequence[VerifySample], seconds: Sequence[float], factors: Mapping[int, float]
) -> Curve:
    cells: Cells = defaultdict(list)
    for sample, each in zip(samples, seconds, strict=True):
        cells[sample.rows].append(each / factors[sample.batch])
    return Curve.monotone(cells)


def fit_levels(samples: Sequence[DraftSample]) -> LevelFit:
    """Return curves of first and deeper levels, and the seconds that waiting rows add to a first
    level."""
    deeper = [s for s in samples if s.waiting is None]
    draft_token, _ = _attention([VerifySample(0, s.width, s.context, s.seconds) for s in deeper])
    widths: Cells = defaultdict(list)
    roots: Cells = defaultdict(list)
    waiting: Cells = defaultdict(list)
    for s in samples:
        seconds = _without(s.seconds, draft_token * s.width * s.context)
        if s.waiting is None:
            widths[s.width].append(seconds)
            continue
        if not s.waiting:
            roots[s.width].append(seconds)
        if s.width == 1:
            waiting[s.waiting].append(s.seconds)
    caught_up = len(waiting) > 1 and 0 in waiting
    return LevelFit(
        Curve.monotone(widths) if widths else None,
        Curve.monotone(roots) if roots else None,
        Curve.monotone(waiting).beyond_first() if caught_up else None,
        draft_token,
    )


def _without(seconds: float, attention: float) -> float:
    return max(seconds - attention, LEAST * seconds)


def _attention(samples: Sequence[VerifySample]) -> tuple[float, float]:
    """Return seconds per (row, context token) and (sequence, context token), from cells measured at
    several contexts."""
    cells: dict[tuple[int, float], list[VerifySample]] = defaultdict(list)
    for sample in samples:
        cells[sample.batch, sample.rows].append(sample)
    features = []
    targets = []
    for (batch, rows), cell in cells.items():
        context = np.array([s.context for s in cell])
        seconds = np.array([s.seconds for s in cell])
        if np.ptp(context) > 0:
            centred = (context - context.mean()) / seconds.mean()
            features.append(np.stack((rows * centred, batch * centred), axis=1))
            targets.append((seconds - seconds.mean()) / seconds.mean())
    if not features:
        return 0.0, 0.0
    return non_negative(np.concatenate(features), np.concatenate(targets))


def non_negative(features: FloatArray, targets: FloatArray) -> tuple[float, float]:
    """Return x >= 0 with the least |features x - targets|, features [n, 2]: the least squares, or
    where one of them is negative, the better fit by a single column."""
    both = np.linalg.lstsq(features, targets, rcond=None)[0]
    if both.min() >= 0:
        return float(both[0]), float(both[1])
    squares = np.maximum((features**2).sum(axis=0), np.finfo(float).tiny)
    single = np.diag(np.maximum(features.T @ targets / squares, 0.0))
    errors = [float(((features @ x - targets) ** 2).sum()) for x in single]
    best = single[int(np.argmin(errors))]
    return float(best[0]), float(best[1])
