"""What the levels that are not drafted yet will probably bring: the mean child, by depth and rank.

Kept is how the drafter's confidences are distributed (a histogram by depth and rank among
siblings); what they are worth is asked of the calibration when needed, so a change of the drafter's
quality reaches the forecast at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from smart_decoding.core.calibration import BINS, DEPTHS, PRIOR_WEIGHT, Calibration
from smart_decoding.core.running import HORIZON
from smart_decoding.core.tree import (
    DraftTrees,
    FloatArray,
    of_expanded,
    sibling_ranks,
    slots,
)

WIDEST = 8  # children beyond the eighth bring next to nothing
NODES = 64  # candidates of a request, the best ones, that may be verified: EAGLE-2's tree has 59
# Draft probabilities before anything is known: they fall off by the rank's square, and sum to 1.
_FALLING: FloatArray = np.arange(1.0, WIDEST + 1) ** -2
_PRIOR_PROBS: FloatArray = _FALLING / _FALLING.sum()


class Forecast:
    """Running histogram [DEPTHS, WIDEST, BINS] of draft_prob and the weight [DEPTHS] of expanded
    nodes behind it."""

    def __init__(self, calibration: Calibration) -> None:
        self.calibration = calibration
        self.histogram = np.zeros((DEPTHS, WIDEST, BINS))
        self.histogram[:, np.arange(WIDEST), calibration.bins(_PRIOR_PROBS)] = PRIOR_WEIGHT
        self.weight = np.full(DEPTHS, PRIOR_WEIGHT)

    def children(self, shares: FloatArray) -> FloatArray:
        """[DEPTHS, WIDEST] mean acceptance probability, given its parent's, of the k-th child at
        depth 1, 2, ...

        shares: [KINDS] of the kinds of requests."""
        curve = self.calibration.curve(0, shares)
        mean = (self.histogram @ curve[:, :, None])[:, :, 0] / self.weight[:, None]
        result: FloatArray = mean / np.maximum(mean.sum(axis=1, keepdims=True), 1.0)
        return result

    def observe(self, trees: DraftTrees) -> None:
        """Learns from all drafted nodes (scored), weighted by their parents' accept_prob: the paths
        that matter."""
        rank = sibling_ranks(trees)
        weight_of = np.append(trees.accept_prob, 1.0)  # the root's, reached by index -1
        weight = weight_of[trees.parent]
        if trees.source.any():  # only nodes that the model drafter expanded tell what it proposes
            weight = weight * of_expanded(trees, slots(trees))
        depth = np.minimum(trees.depth, DEPTHS) - 1
        bins = self.calibration.bins(trees.draft_prob)
        cell = (depth * WIDEST + np.minimum(rank, WIDEST - 1)) * BINS + bins
        kept = np.where(rank < WIDEST, weight, 0.0)
        new = np.bincount(cell, kept, self.histogram.size).reshape(self.histogram.shape)
        first = rank == 0  # one for each parent
        parents = np.bincount(depth[first], weight[first], DEPTHS)
        keep = np.where(parents > 0, 1.0 - 1.0 / HORIZON, 1.0)
        self.histogram = self.histogram * keep[:, None, None] + new / trees.batch
        self.weight = self.weight * keep + parents / trees.batch

    def state_dict(self) -> dict[str, Any]:
        """What is known, as plain lists."""
        return {
            "histogram": np.round(self.histogram, 4).tolist(),
            "weight": np.round(self.weight, 4).tolist(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], calibration: Calibration) -> Forecast:
        """Starts from a stored state, worth PRIOR_WEIGHT expanded nodes per depth. Raises KeyError
        or ValueError."""
        histogram = np.asarray(state["histogram"], np.float64)
        weight = np.asarray(state["weight"], np.float64)
        fits = histogram.shape == (DEPTHS, WIDEST, BINS) and weight.shape == (DEPTHS,)
        if not fits or not (weight > 0).all():
            raise ValueError("not a forecast state")
        forecast = cls(calibration)
        forecast.histogram = histogram * (PRIOR_WEIGHT / weight)[:, None, None]
        return forecast


def expected_subtree(children: FloatArray, depth: int, levels: int, ranks: int) -> FloatArray:
    """[levels * ranks] forecast conditional probabilities below one node whose children have depth
    `depth`, when each further level expands the best child only (the frontier's width in all stays
    what it is)."""
    rows = children[np.minimum(np.arange(depth - 1, depth - 1 + levels), DEPTHS - 1)]
    heads = np.cumprod(np.concatenate((np.ones(1), rows[:-1, 0])))
    result: FloatArray = (heads[:, None] * rows[:, :ranks]).ravel()
    return result
