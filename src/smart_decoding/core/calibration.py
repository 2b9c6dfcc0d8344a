"""Calibration: the probability that a drafter's token is accepted, from the drafter's confidence,
learned from verified rounds.

The calibration learns P(child accepted | parent accepted) by drafter, depth (6 and beyond together)
and kind of request. Kinds are greedy or not, with pictures or not, under a grammar or not: the same
confidence means something else in each. Bins are even in the arcsine of sqrt(draft_prob), so they
are finer near 0 and 1. With few observations a curve is shrunk towards its prior, times a factor
that all depths share. Curves are monotone in confidence.

Only children of accepted nodes are observed, pruned ones too; the others are censored. Whether a
child is observed depends only on its parent, so the conditional probabilities are unbiased under
any policy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from smart_decoding.core.tree import (
    ROOT,
    BoolArray,
    DraftTrees,
    FloatArray,
    IntArray,
    KindArray,
    of_expanded,
    sibling_ranks,
    slots,
)

# --- running means --------------------------------------------------------------------------------
#
# A running mean, for quantities that are learned round by round.


HORIZON = 32  # rounds for which an estimate or a decision holds; a backoff lasts as long


@dataclass(slots=True)
class RunningMean:
    """The mean of observed values; older ones fade. clip: an observation counts as no further from
    the mean than this. count: number of observations."""

    mean: float = 0.0
    clip: float = math.inf
    count: int = 0

    def observe(self, value: float) -> None:
        """Count a value; one that is not finite changes nothing."""
        if not math.isfinite(value):
            return
        self.count += 1
        error = value - self.mean
        if self.count > 1:
            error = min(max(error, -self.clip), self.clip)
        self.mean += error * max(1 / HORIZON, 1 / self.count)


# --- drift ----------------------------------------------------------------------------------------
#
# Page's CUSUM test, both ways: finds that a drafter has become much worse or better than its
# calibration.


MEMORY = 3000.0  # observed children that a calibration remembers of each curve, about
ODDS = 4.0  # the alternatives tested: acceptance odds four times lower, or higher
# Log likelihood ratio that raises the alarm. The mean time between false alarms is the memory of a
# calibration, at least (Lorden's bound).
THRESHOLD = math.log(MEMORY)


class DriftDetector:
    """Tests each source, a drafter with one kind of request, for worse and for better. State arrays
    have shape [2 (worse, better), sources]."""

    def __init__(self, sources: int) -> None:
        self.evidence = np.zeros((2, sources))
        self.hits = np.zeros((2, sources))
        self.expected = np.zeros((2, sources))

    def reserve(self, sources: int) -> None:
        """Make room for sources up to index `sources` - 1."""
        more = np.zeros((2, max(0, sources - self.evidence.shape[1])))
        self.evidence = np.concatenate((self.evidence, more), axis=1)
        self.hits = np.concatenate((self.hits, more), axis=1)
        self.expected = np.concatenate((self.expected, more), axis=1)

    def update(
        self, source: IntArray, expected: FloatArray, hit: BoolArray
    ) -> list[tuple[int, float]]:
        """Test observed children (arrays [observed]); return the sources that have changed, each
        with its ratio of accepted to expected children since the change."""
        size = self.evidence.shape[1]
        odds = expected / (1.0 - expected)
        base = np.log1p(odds)
        hits = np.bincount(source, hit, size)
        shift = math.log(ODDS) * hits
        self.evidence[0] += np.bincount(source, base - np.log1p(odds / ODDS), size) - shift
        self.evidence[1] += np.bincount(source, base - np.log1p(odds * ODDS), size) + shift
        self.hits += hits
        self.expected += np.bincount(source, expected, size)
        alive = self.evidence > 0
        self.evidence *= alive
        self.hits *= alive
        self.expected *= alive
        if self.evidence.max() < THRESHOLD:
            return []
        return [
            self._alarm(int(way), int(index))
            for way, index in np.argwhere(self.evidence >= THRESHOLD)
        ]

    def _alarm(self, way: int, index: int) -> tuple[int, float]:
        ratio = (self.hits[way, index] + 0.5) / (self.expected[way, index] + 0.5)
        for array in (self.evidence, self.hits, self.expected):
            array[:, index] = 0.0
        return index, float(ratio)


BINS = 16  # of a curve
FINE = 4 * BINS  # of the interpolated table
DEPTHS = 6  # that are learned separately; deeper nodes count with the last
KINDS = 2 * 2 * 2  # of requests: `BatchState.kind`
MAX_PROB = 1 - 1 / MEMORY  # highest probability that so many observations can support
# Most observations that older knowledge counts as: a stored bin, or a curve from before the drafter
# changed.
STORED = 40.0
PRIOR_WEIGHT = 8.0  # observations that a prior counts as

_RESOLUTION = FINE**2  # of probabilities: about the width of the first and the last fine bin
_TINY = np.finfo(float).tiny
_ANGLE: FloatArray = np.arcsin(np.sqrt(np.arange(_RESOLUTION + 1) / _RESOLUTION)) * (2 / math.pi)
FINE_OF: IntArray = np.rint(_ANGLE * (FINE - 1)).astype(np.int64)
_BIN_OF_FINE: IntArray = np.minimum(np.arange(FINE) * BINS // (FINE - 1), BINS - 1)
_CENTRES: FloatArray = (np.arange(BINS) + 0.5) / BINS
_INTERPOLATE: FloatArray = np.stack(
    [np.interp(np.arange(FINE) / (FINE - 1), _CENTRES, row) for row in np.eye(BINS)]
)

# Initial guess of acceptance over raw confidence, to the power of the depth. Raw confidence is too
# high, more so with depth (of a small head on new prompts).
TRUST = 0.9
# [BINS] draft_prob at each bin's centre.
BIN_PROBS: FloatArray = np.sin(_CENTRES * (math.pi / 2)) ** 2


def default_prior(sources: int) -> FloatArray:
    """Return the conditional acceptance probabilities [sources, DEPTHS, KINDS, BINS] to use where
    nothing is stored."""
    curve = TRUST ** np.arange(1, DEPTHS + 1)[:, None] * BIN_PROBS
    return np.broadcast_to(curve[None, :, None, :], (sources, DEPTHS, KINDS, BINS)).copy()


class Calibration:
    """Learns acceptance probabilities online. State arrays are [sources, DEPTHS, KINDS, BINS]."""

    def __init__(self, prior: FloatArray | None = None, counts: FloatArray | None = None) -> None:
        """Start from conditional probabilities `prior`, which count as `counts` observations (None:
        as none)."""
        self.prior = default_prior(2) if prior is None else prior
        self.counts = np.zeros_like(self.prior) if counts is None else counts
        self.hits = self.counts * self.prior
        self.drift = DriftDetector(len(self.prior) * KINDS)
        self.changes = 0  # alarms of `drift`
        self._before: dict[tuple[int, int], tuple[FloatArray, FloatArray, FloatArray]] = {}
        self._refresh()

    def score(self, trees: DraftTrees, kind: KindArray) -> FloatArray:
        """Set `trees.accept_prob` and return the conditional probabilities, both [nodes]; `kind` is
        [batch].

        Siblings are scaled down to sum to at most 1, so π(child) <= π(parent)."""
        if not len(trees):
            return np.zeros(0)
        conditional = self._lookup(self._cells(trees, kind))
        slot = slots(trees)
        conditional /= np.maximum(np.bincount(slot, conditional), 1.0).take(slot)
        trees.accept_prob = path_products(trees.parent, conditional, int(trees.depth.max()))
        return conditional

    def observe(
        self, trees: DraftTrees, nodes: IntArray, chosen: BoolArray, kind: KindArray
    ) -> None:
        """Learn from uncensored `nodes` [observed] and whether the target chose them
        (`Round.observed()`)."""
        if not len(nodes):
            return
        cells = self._cells(trees, kind, nodes)
        expected = self._lookup(cells)
        group, fine = np.divmod(cells, FINE)
        flat = group * BINS + _BIN_OF_FINE.take(fine)
        counts = np.bincount(flat, minlength=self.counts.size).reshape(self.counts.shape)
        hits = np.bincount(flat, chosen, minlength=self.counts.size).reshape(self.counts.shape)
        decay = np.exp(counts.sum(axis=3, keepdims=True) * (-1.0 / MEMORY))
        self.counts = self.counts * decay + counts
        self.hits = self.hits * decay + hits
        kinds = trees.source.take(nodes) * KINDS + group % KINDS
        changed = self.drift.update(kinds, expected, chosen)
        for drafter_kind, ratio in changed:
            self._rescale(*divmod(drafter_kind, KINDS), ratio)
        self.changes += len(changed)
        self._refresh()

    def curve(self, source: int, shares: FloatArray) -> FloatArray:
        """Return the conditional probabilities [DEPTHS, BINS] of one drafter, averaged over kinds.
        shares: [KINDS] each kind's share of the batch."""
        self.reserve(source)
        result: FloatArray = shares @ self._coarse[source]
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return curves and counts as plain lists: `from_state` starts a new session from them."""
        return {
            "curve": np.round(self._coarse, 5).tolist(),
            "counts": np.round(self.counts, 2).tolist(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], weight: float = STORED) -> Calibration:
        """Start from a stored state as prior; each bin counts as at most `weight` observations. In
        states from before grammars were kinds, the curves without grammar serve as their prior,
        which counts as none.

        Raises KeyError or ValueError if `state` is not one."""
        prior = np.asarray(state["curve"], np.float64)
        counts = np.asarray(state["counts"], np.float64)
        if prior.ndim > 2 and prior.shape[2] == KINDS // 2 and counts.shape == prior.shape:
            prior = np.concatenate((prior, prior), axis=2)
            counts = np.concatenate((counts, np.zeros_like(counts)), axis=2)
        fits = prior.shape[1:] == (DEPTHS, KINDS, BINS)
        if not fits or counts.shape != prior.shape:
            raise ValueError("not a calibration state")
        if not (np.isfinite(counts).all() and (prior >= 0).all() and (prior <= 1).all()):
            raise ValueError("not a calibration state: values out of range")
        return cls(prior, np.clip(counts, 0.0, weight))

    def bins(self, prob: FloatArray) -> IntArray:
        """Return the bin [n] of each draft probability."""
        return _BIN_OF_FINE.take(_fine(prob))

    def _cells(self, trees: DraftTrees, kind: KindArray, nodes: IntArray | None = None) -> IntArray:
        """Return the flat index of each node's fine bin: ((source * DEPTHS + depth) * KINDS + kind)
        * FINE + fine."""
        cells: IntArray = trees.source * DEPTHS + (np.minimum(trees.depth, DEPTHS) - 1)
        cells = (cells * KINDS + kind.take(trees.owner)) * FINE + _fine(trees.draft_prob)
        return cells if nodes is None else cells.take(nodes)

    def _lookup(self, cells: IntArray) -> FloatArray:
        try:
            return self.table.take(cells)
        except IndexError:  # a new drafter
            self.reserve(int(cells.max()) // (DEPTHS * KINDS * FINE))
            return self.table.take(cells)

    def reserve(self, source: int) -> None:
        """Make room for drafters up to index `source`."""
        missing = source + 1 - len(self.prior)
        if missing > 0:
            self.prior = np.concatenate((self.prior, default_prior(missing)))
            empty = np.zeros_like(self.prior[:missing])
            self.counts = np.concatenate((self.counts, empty))
            self.hits = np.concatenate((self.hits, empty))
            self.drift.reserve((source + 1) * KINDS)
            self._refresh()

    def _rescale(self, source: int, kind: int, ratio: float) -> None:
        """Scale the curves of a drafter that has changed, with little weight, so that it is soon
        relearned.

        The curves of before a change for the worse are kept, and restored after a change for the
        better."""
        at = source, slice(None), kind
        known = self.prior[at].copy(), self.counts[at].copy(), self.hits[at].copy()
        prior, counts, hits = known
        if ratio < 1:
            self._before.setdefault((source, kind), known)
            self._set(at, prior * ratio, counts, hits * ratio)
        elif (source, kind) in self._before:
            self._set(at, *self._before.pop((source, kind)))
        else:
            better = _better(hits / np.maximum(counts, _TINY), ratio) * counts
            self._set(at, _better(prior, ratio), counts, better)

    def _set(
        self, at: tuple[int, slice, int], prior: FloatArray, counts: FloatArray, hits: FloatArray
    ) -> None:
        weight = min(1.0, STORED / max(float(counts.sum()), 1.0))
        self.prior[at] = np.clip(prior, 1 - MAX_PROB, MAX_PROB)
        self.counts[at] = counts * weight
        self.hits[at] = hits * weight

    def _refresh(self) -> None:
        pool_hits = self.hits.sum(axis=1, keepdims=True)
        pool_expected = (self.counts * self.prior).sum(axis=1, keepdims=True)
        pooled = (pool_hits + 1.0) / (pool_expected + 1.0)
        centre = np.minimum(self.prior * pooled, MAX_PROB)
        raw = (self.hits + PRIOR_WEIGHT * centre) / (self.counts + PRIOR_WEIGHT)
        rising = np.maximum.accumulate(raw, axis=3)
        falling = np.minimum.accumulate(raw[..., ::-1], axis=3)[..., ::-1]
        # Both are monotone, hence their mean.
        self._coarse = np.minimum(0.5 * (rising + falling), MAX_PROB)
        self.table = (self._coarse @ _INTERPOLATE).ravel()


def _fine(prob: FloatArray) -> IntArray:
    """Return the fine bin [n] of each draft probability; values out of range are clipped."""
    return FINE_OF.take((np.fmin(np.fmax(prob, 0.0), 1.0) * _RESOLUTION).astype(np.int64))


def _better(prob: FloatArray, ratio: float) -> FloatArray:
    """Return probabilities with odds `ratio` times higher, so that high ones stay below 1."""
    return prob * ratio / (1.0 + prob * (ratio - 1.0))


def path_products(parent: IntArray, conditional: FloatArray, depth: int) -> FloatArray:
    """Return the product of `conditional` over each node's path, by pointer doubling: log2(depth)
    steps for any tree."""
    count = len(parent)
    product = np.empty(count + 1)
    product[:count] = conditional
    product[count] = 1.0  # the root's, reached by index -1
    if depth > 1:
        above = np.empty(count + 1, np.int64)
        above[:count] = parent
        above[count] = ROOT
        for step in range((depth - 1).bit_length()):
            if step:
                above = above[above]
            product *= product[above]
    return product[:-1]


# --- forecast -------------------------------------------------------------------------------------
#
# A forecast of levels that are not drafted yet: the mean child's acceptance, by depth and rank.
#
# The forecast keeps a histogram of the drafter's confidences, by depth and rank among siblings. The
# calibration turns it into probabilities at each call, so a change of the drafter's quality reaches
# the forecast at once.


WIDEST = 8  # children beyond the eighth bring next to nothing
NODES = 64  # most nodes of a request to verify: EAGLE-2's tree has 59
# Initial guess of draft probabilities: they fall with the rank's square, and sum to 1.
_FALLING: FloatArray = np.arange(1.0, WIDEST + 1) ** -2
_PRIOR_PROBS: FloatArray = _FALLING / _FALLING.sum()


class Forecast:
    """Forecasts a node's children. It keeps a running histogram [DEPTHS, WIDEST, BINS] of
    draft_prob, and the weight [DEPTHS] of the expanded nodes behind it."""

    def __init__(self, calibration: Calibration) -> None:
        self.calibration = calibration
        self.histogram = np.zeros((DEPTHS, WIDEST, BINS))
        self.histogram[:, np.arange(WIDEST), calibration.bins(_PRIOR_PROBS)] = PRIOR_WEIGHT
        self.weight = np.full(DEPTHS, PRIOR_WEIGHT)

    def children(self, shares: FloatArray) -> FloatArray:
        """Return mean conditional acceptance probabilities [DEPTHS, WIDEST] of the k-th child at
        depth 1, 2, ...

        shares: [KINDS] each kind's share of the batch."""
        curve = self.calibration.curve(0, shares)
        mean = (self.histogram @ curve[:, :, None])[:, :, 0] / self.weight[:, None]
        result: FloatArray = mean / np.maximum(mean.sum(axis=1, keepdims=True), 1.0)
        return result

    def observe(self, trees: DraftTrees) -> None:
        """Learn from all drafted nodes, which are scored. Each is weighted by its parent's
        accept_prob, so that likely paths count most."""
        rank = sibling_ranks(trees)
        weight_of = np.append(trees.accept_prob, 1.0)  # the root's, reached by index -1
        weight = weight_of[trees.parent]
        if trees.source.any():  # count only children of nodes that the model drafter expanded
            weight = weight * of_expanded(trees, slots(trees))
        depth = np.minimum(trees.depth, DEPTHS) - 1
        bins = self.calibration.bins(trees.draft_prob)
        cell = (depth * WIDEST + np.minimum(rank, WIDEST - 1)) * BINS + bins
        kept = np.where(rank < WIDEST, weight, 0.0)
        new = np.bincount(cell, kept, self.histogram.size).reshape(self.histogram.shape)
        first = rank == 0  # one for each parent
        parents = np.bincount(depth[first], weight[first], DEPTHS)
        decay = np.where(parents > 0, 1.0 - 1.0 / HORIZON, 1.0)
        self.histogram = self.histogram * decay[:, None, None] + new / trees.batch
        self.weight = self.weight * decay + parents / trees.batch

    def state_dict(self) -> dict[str, Any]:
        """Return histogram and weights as plain lists."""
        return {
            "histogram": np.round(self.histogram, 4).tolist(),
            "weight": np.round(self.weight, 4).tolist(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], calibration: Calibration) -> Forecast:
        """Start from a stored state, which counts as PRIOR_WEIGHT expanded nodes per depth. Raises
        KeyError or ValueError."""
        histogram = np.asarray(state["histogram"], np.float64)
        weight = np.asarray(state["weight"], np.float64)
        fits = histogram.shape == (DEPTHS, WIDEST, BINS) and weight.shape == (DEPTHS,)
        if not fits or not (weight > 0).all():
            raise ValueError("not a forecast state")
        forecast = cls(calibration)
        forecast.histogram = histogram * (PRIOR_WEIGHT / weight)[:, None, None]
        return forecast
