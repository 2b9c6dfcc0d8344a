"""Whether probabilities came true: drafted tokens in bins of what was predicted, against what the
target chose."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from smart_decoding.core.tree import ROOT

if TYPE_CHECKING:
    from smart_decoding.core.policies.base import Round

BINS = 10  # of equal width

Floats = NDArray[np.float64]


def _nothing() -> Floats:
    return np.zeros((3, BINS))


@dataclass(slots=True)
class Reliability:
    """Sums per bin, [3, BINS]: tokens, predicted probabilities, tokens that the target chose.

    draft: the drafter's own confidence; calibrated: the policy's P(accepted | parent accepted),
    where its rule has scores. Both were said before the outcome was known. Only children of
    accepted nodes count, as the others were never tested."""

    draft: Floats = field(default_factory=_nothing)
    calibrated: Floats = field(default_factory=_nothing)

    def __add__(self, other: Reliability) -> Reliability:
        return Reliability(self.draft + other.draft, self.calibrated + other.calibrated)

    def add(self, done: Round) -> None:
        """Counts one round's drafted tokens, pruned ones too."""
        trees = done.trees
        if not len(trees):
            return
        nodes, chosen = done.observed()
        self.draft += _binned(trees.draft_prob[nodes], chosen)
        if done.rule is None or done.rule.scores is None:
            return
        parent = trees.parent[nodes]
        with np.errstate(invalid="ignore", divide="ignore"):
            conditional = trees.accept_prob[nodes] / np.where(
                parent == ROOT, 1.0, trees.accept_prob[parent]
            )
        self.calibrated += _binned(conditional, chosen)

    def to_dict(self) -> dict[str, dict[str, list[float]]]:
        """Per bin that was used: mean prediction, share chosen, count. Without tokens a part is
        left out."""
        parts = {"draft": self.draft, "calibrated": self.calibrated}
        return {name: _shares(sums) for name, sums in parts.items() if sums[0].any()}


def _binned(predicted: Floats, chosen: NDArray[np.bool_]) -> Floats:
    known = np.isfinite(predicted)
    predicted, chosen = np.clip(predicted[known], 0.0, 1.0), chosen[known]
    which = np.minimum((predicted * BINS).astype(np.int64), BINS - 1)
    return np.stack(
        [np.bincount(which, weights, BINS) for weights in (np.ones(len(which)), predicted, chosen)]
    )


def _shares(sums: Floats) -> dict[str, list[float]]:
    count, predicted, chosen = sums[:, sums[0] > 0]
    return {
        "predicted": list(predicted / count),
        "chosen": list(chosen / count),
        "count": list(count),
    }
