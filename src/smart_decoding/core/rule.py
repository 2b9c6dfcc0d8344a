"""What of one round's trees is expanded and verified, as data: what a policy answers before it.

`expand` says which nodes are expanded, `keep` which are verified. Those of `selection.py` are data
with their meaning in numpy beside them, and the CPU kernels follow the same data natively. A policy
of your own may give any object with the same method instead: it is then asked level by level.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from smart_decoding.core.tree import (
    BoolArray,
    DraftTrees,
    IntArray,
    KindArray,
    expanded_slots,
    of_expanded,
    slots,
)

if TYPE_CHECKING:
    from smart_decoding.core.calibration import Calibration

NO_NODES: IntArray = np.zeros(0, np.int64)


class Expand(Protocol):
    """Decides what to expand."""

    def frontier(self, rule: TreeRule, trees: DraftTrees, level: int) -> IntArray:
        """Return ascending indices of the nodes of `level` (from 1 on) to expand next; none: stop.
        The trees are scored."""
        ...


class Keep(Protocol):
    """Decides what to verify."""

    def select(self, rule: TreeRule, trees: DraftTrees) -> IntArray:
        """Return ascending indices of the nodes to verify, prefix-closed. The trees are scored."""
        ...


class Scores(NamedTuple):
    """Calibrated probabilities. kind: [batch] `BatchState.kind`."""

    calibration: Calibration
    kind: KindArray


class Skip(Protocol):
    """Decides whether the model is left out."""

    @property
    def keep(self) -> Keep:
        """What is verified then."""
        ...

    def applies(self, rule: TreeRule, proposed: DraftTrees) -> bool:
        """Return whether it is, where free drafters propose these nodes. The trees are scored."""
        ...


@dataclass(frozen=True, slots=True)
class TreeRule:
    """One round's trees.

    levels: at most so many by the model drafter; 0 leaves what drafters without a model propose.
    children: proposals per expanded node (the drafter's top-k).
    limits: [batch] deepest useful node of each request. ends: tokens that end an answer.
    scores: what accept_prob is; None: the product of draft probabilities, as it comes.
    skip_model: whether the model is left out where free drafters propose.
    """

    levels: int
    children: int
    limits: IntArray
    ends: IntArray
    expand: Expand
    keep: Keep
    scores: Scores | None = None
    skip_model: Skip | None = None

    @classmethod
    def of(
        cls,
        limits: IntArray,
        levels: int,
        children: int,
        ends: IntArray,
        expand: Expand,
        keep: Keep,
        scores: Scores | None = None,
    ) -> TreeRule | None:
        """Return the rule for a batch of these `limits`, with no more levels than its longest
        request may use; None where that leaves none."""
        levels = min(levels, int(limits.max(initial=0)))
        return cls(levels, children, limits, ends, expand, keep, scores) if levels else None

    def after_free(self, proposed: DraftTrees) -> TreeRule:
        """Return the rule once free drafters have proposed nodes: without the model's levels where
        these promise more."""
        if self.skip_model is None or not len(proposed):
            return self
        self.score(proposed)
        if not self.skip_model.applies(self, proposed):
            return self
        return replace(self, levels=0, keep=self.skip_model.keep, skip_model=None)

    def frontier(self, trees: DraftTrees, level: int) -> IntArray:
        """Return ascending indices of the nodes of `level` to expand next; none: stop drafting."""
        if level >= self.levels or not len(trees):
            return NO_NODES
        self.score(trees)
        return self.expand.frontier(self, trees, level)

    def select(self, trees: DraftTrees) -> IntArray:
        """Return ascending indices of the nodes to verify, prefix-closed."""
        if not len(trees):
            return NO_NODES
        self.score(trees)
        return self.keep.select(self, trees)

    def score(self, trees: DraftTrees) -> None:
        """Set accept_prob."""
        if self.scores is None:
            trees.accept_prob = trees.path_prob
        else:
            self.scores.calibration.score(trees, self.scores.kind)

    def useful(self, trees: DraftTrees) -> BoolArray:
        """[nodes] whether a node could ever be emitted: within its request's depth limit and not
        below an end token."""
        result: BoolArray = trees.depth <= self.limits.take(trees.owner)
        ends = np.isin(trees.token, self.ends)
        if ends.any():
            result &= ~_has_marked_ancestor(trees, ends)
        return result

    def expandable(self, trees: DraftTrees, level: int) -> IntArray:
        """Return ascending indices of the nodes of `level` that the model drafter can expand and
        whose children could be useful.

        A node proposed by another drafter has a head state above it only where the model drafter
        expanded its parent."""
        mask = (trees.depth == level) & (trees.depth < self.limits.take(trees.owner))
        ends = np.isin(trees.token, self.ends)
        if ends.any():
            mask &= ~(ends | _has_marked_ancestor(trees, ends))
        if trees.source.any():
            mask &= of_expanded(trees, slots(trees))
        return np.flatnonzero(mask)


def expanded_widths(trees: DraftTrees) -> IntArray:
    """[levels] nodes that the model drafter has expanded, by their depth; roots (depth 0) first."""
    depth = np.concatenate((np.zeros(trees.batch, np.int64), trees.depth))
    return np.bincount(depth[expanded_slots(trees, slots(trees))])


def _has_marked_ancestor(trees: DraftTrees, marked: BoolArray) -> BoolArray:
    below = np.append(marked, False)[trees.parent]  # index -1, the root, is never marked
    for _ in range(int(trees.depth.max()) - 1):
        below |= np.append(below, False)[trees.parent]
    return below
