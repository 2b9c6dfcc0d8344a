"""A rule for one round's trees, as data: the result of a policy's `plan`; and its `Draft`.

`expand` chooses the nodes to expand, `keep` the nodes to verify. The classes of `selection.py` are
data with a numpy implementation, and the CPU kernels follow the same data natively. Your own policy
may use any object with the same method instead: it is then called level by level.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from smart_decoding.core.tree import (
    ROOT,
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


@dataclass(slots=True)
class Draft:
    """A round's trees, and the nodes to verify.

    rule: the rule that made them. kept: nodes to verify. widths, level_seconds: rows and seconds of
    each level that a model ran. choosing: seconds of choosing nodes between these levels, where one
    call runs all. interrupted: a request arrived that can begin at once; the trees are dropped."""

    trees: DraftTrees
    rule: TreeRule | None = None
    kept: IntArray = field(default_factory=NO_NODES.copy)
    widths: list[int] = field(default_factory=list)
    level_seconds: list[float] = field(default_factory=list)
    choosing: float = 0.0
    interrupted: bool = False

    @property
    def seconds(self) -> float:
        """Seconds of the model's levels; other drafters cost next to nothing."""
        return sum(self.level_seconds)


class Expand(Protocol):
    """Chooses the nodes to expand."""

    def frontier(self, rule: TreeRule, trees: DraftTrees, level: int) -> IntArray:
        """Return ascending indices of the nodes of `level` (from 1 on) to expand next, or none to
        stop. The trees are scored."""
        ...


class Keep(Protocol):
    """Chooses the nodes to verify."""

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
        """Chooses the nodes to verify without the model."""
        ...

    def applies(self, rule: TreeRule, proposed: DraftTrees) -> bool:
        """Return whether to leave the model out, after free drafters have proposed these nodes. The
        trees are scored."""
        ...


@dataclass(frozen=True, slots=True)
class TreeRule:
    """A rule for one round's trees.

    levels: most levels of the model drafter; 0 leaves only the nodes of free drafters.
    children: proposals per expanded node (the drafter's top-k).
    limits: [batch] deepest useful node of each request. ends: tokens that end an answer.
    scores: source of accept_prob; None: the plain product of draft probabilities.
    skip_model: decides whether to leave the model out after the free drafters' proposals.
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
        request may use; None if no level is left."""
        levels = min(levels, int(limits.max(initial=0)))
        return cls(levels, children, limits, ends, expand, keep, scores) if levels else None

    def after_free(self, proposed: DraftTrees) -> TreeRule:
        """Return the rule for the rest of the round, once free drafters have proposed nodes:
        without the model's levels if `skip_model` applies."""
        if self.skip_model is None or not len(proposed):
            return self
        self.score(proposed)
        if not self.skip_model.applies(self, proposed):
            return self
        return replace(self, levels=0, keep=self.skip_model.keep, skip_model=None)

    def frontier(self, trees: DraftTrees, level: int) -> IntArray:
        """Return ascending indices of the nodes of `level` to expand next, or none to stop."""
        if level >= self.levels or not len(trees):
            return NO_NODES
        self.score(trees)
        return require_nodes(trees, self.expand.frontier(self, trees, level), "frontier()")

    def select(self, trees: DraftTrees) -> IntArray:
        """Return ascending indices of the nodes to verify, prefix-closed."""
        if not len(trees):
            return NO_NODES
        self.score(trees)
        nodes = require_nodes(trees, self.keep.select(self, trees), "select()")
        known = np.zeros(len(trees) + 1, np.bool_)  # the last one: the root, which is parent -1
        known[nodes] = known[ROOT] = True
        if not known[trees.parent[nodes]].all():
            raise ValueError("select() returned a node without its parent: add the parent")
        return nodes

    def score(self, trees: DraftTrees) -> None:
        """Set the trees' accept_prob."""
        if self.scores is None:
            trees.accept_prob = trees.path_prob
        else:
            self.scores.calibration.score(trees, self.scores.kind)

    def useful(self, trees: DraftTrees) -> BoolArray:
        """Return whether each node [nodes] could be emitted: within its request's depth limit and
        not below an end token."""
        result: BoolArray = trees.depth <= self.limits.take(trees.owner)
        ends = np.isin(trees.token, self.ends)
        if ends.any():
            result &= ~_has_marked_ancestor(trees, ends)
        return result

    def expandable(self, trees: DraftTrees, level: int) -> IntArray:
        """Return ascending indices of the nodes of `level` that the model drafter can expand and
        whose children could be useful.

        The model can expand a free drafter's node only if it has expanded the node's parent."""
        mask = (trees.depth == level) & (trees.depth < self.limits.take(trees.owner))
        ends = np.isin(trees.token, self.ends)
        if ends.any():
            mask &= ~(ends | _has_marked_ancestor(trees, ends))
        if trees.source.any():
            mask &= of_expanded(trees, slots(trees))
        return np.flatnonzero(mask)


def require_nodes(trees: DraftTrees, nodes: IntArray, source: str) -> IntArray:
    """Return a policy's set of nodes. Raises ValueError for what the kernels cannot follow."""
    nodes = np.asarray(nodes)
    if nodes.ndim != 1 or nodes.dtype != np.int64:
        shape = f"{nodes.dtype} of shape {nodes.shape}"
        raise ValueError(f"{source} must return indices as int64 of one dimension, not {shape}")
    ends = nodes[[0, -1]].tolist() if len(nodes) else [0, -1]
    if ends[0] < 0 or ends[1] >= len(trees) or (np.diff(nodes) <= 0).any():
        raise ValueError(f"{source} must return ascending indices below {len(trees)}, each once")
    return nodes


def expanded_widths(trees: DraftTrees) -> IntArray:
    """Return how many nodes the model drafter has expanded at each depth [levels], from the roots
    (depth 0) on."""
    depth = np.concatenate((np.zeros(trees.batch, np.int64), trees.depth))
    return np.bincount(depth[expanded_slots(trees, slots(trees))])


def _has_marked_ancestor(trees: DraftTrees, marked: BoolArray) -> BoolArray:
    below = np.append(marked, False)[trees.parent]  # index -1, the root, is never marked
    for _ in range(int(trees.depth.max()) - 1):
        below |= np.append(below, False)[trees.parent]
    return below
