"""A drafter's answer in one round, and drafting with a model, level by level."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from smart_decoding.core.rule import NO_NODES
from smart_decoding.core.tree import fold, merge, of_expanded, slots

if TYPE_CHECKING:
    from smart_decoding.core.rule import TreeRule
    from smart_decoding.core.tree import DraftTrees, IntArray
    from smart_decoding.engine.request import Request

MODEL = 0  # the source of a model's nodes; other drafters' are 1, 2, ...


class Selection:
    """Follows rules by their own numpy code: the reference. Kernels have a native form of it."""

    def frontier(self, rule: TreeRule, trees: DraftTrees, level: int) -> IntArray:
        """See `TreeRule.frontier`."""
        return rule.frontier(trees, level)

    def select(self, rule: TreeRule, trees: DraftTrees) -> IntArray:
        """See `TreeRule.select`."""
        return rule.select(trees)


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


class LevelModel(Protocol):
    """A model that drafts one level at a time."""

    def pending_rows(self, requests: Sequence[Request]) -> int:
        """Count the rows of the first level."""

    def first_level(self, requests: Sequence[Request], rule: TreeRule) -> DraftTrees:
        """Propose the children of every root."""

    def next_level(
        self, requests: Sequence[Request], trees: DraftTrees, nodes: IntArray, rule: TreeRule
    ) -> int:
        """Append the children of `nodes`, all of one level. Return how many nodes the model ran;
        the others stay leaves."""


def draft_by_levels(
    model: LevelModel,
    requests: Sequence[Request],
    rule: TreeRule,
    interrupted: Callable[[], bool],
    proposed: DraftTrees,
    selection: Selection,
    clock: Callable[[], float] = time.perf_counter,
) -> Draft:
    """Draft as `rule` says, one level after another: on torch, and for policies in Python.

    proposed: nodes of free drafters; the model's equal nodes merge with them. interrupted: called
    after each level."""
    start = clock()
    width = model.pending_rows(requests)
    draft = Draft(added(proposed, model.first_level(requests, rule)), rule)
    for level in range(1, rule.levels + 1):
        draft.widths.append(width)
        draft.level_seconds.append(clock() - start)
        if interrupted():
            draft.interrupted = True
            return draft
        nodes = selection.frontier(rule, draft.trees, level)
        start = clock()
        width = _expand(model, requests, draft.trees, nodes, rule) if len(nodes) else 0
        if not width:
            break
    draft.kept = selection.select(rule, draft.trees)
    return draft


def added(proposed: DraftTrees, drafted: DraftTrees) -> DraftTrees:
    """Return the nodes of free drafters and of a model in one tree, equal nodes merged."""
    if not len(proposed):
        return drafted
    merge(proposed, drafted, MODEL)
    return proposed


def _expand(
    model: LevelModel,
    requests: Sequence[Request],
    trees: DraftTrees,
    nodes: IntArray,
    rule: TreeRule,
) -> int:
    if not trees.source.any():
        return model.next_level(requests, trees, nodes, rule)
    # The model can run a node only where it has run the node's parent.
    nodes = nodes[of_expanded(trees, slots(trees))[nodes]]
    before = len(trees)
    width = model.next_level(requests, trees, nodes, rule) if len(nodes) else 0
    fold(trees, before)
    return width
