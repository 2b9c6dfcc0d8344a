"""Drafting a round's trees by a rule: level by level, or all levels in one call of the drafter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from smart_decoding.core.rule import NO_NODES
from smart_decoding.core.selection import is_data

if TYPE_CHECKING:
    from smart_decoding.core.batch import BatchState
    from smart_decoding.core.rule import TreeRule
    from smart_decoding.core.tree import DraftTrees, IntArray
    from smart_decoding.engine.protocols import Clock, Drafter, Grown
    from smart_decoding.engine.request import Request


class Selection:
    """Follows rules as they say themselves, in numpy: the reference. A backend may have a native
    form of the same."""

    def frontier(self, rule: TreeRule, trees: DraftTrees, level: int) -> IntArray:
        """See `TreeRule.frontier`."""
        return rule.frontier(trees, level)

    def select(self, rule: TreeRule, trees: DraftTrees) -> IntArray:
        """See `TreeRule.select`."""
        return rule.select(trees)


@runtime_checkable
class ProposesFirst(Protocol):
    """A drafter whose free ones propose before its model drafts."""

    def propose(self, requests: Sequence[Request], rule: TreeRule) -> DraftTrees:
        """What they propose. The next `start` or `grow` goes on from it."""
        ...


@dataclass(slots=True)
class Draft:
    """A round's trees, and what they took.

    rule: that was followed. kept: nodes to verify. widths, level_seconds: rows and seconds of each
    level that the model ran. seconds: all that the drafter took. interrupted: a request arrived
    that can begin at once; the trees are dropped."""

    trees: DraftTrees
    rule: TreeRule | None = None
    kept: IntArray = field(default_factory=NO_NODES.copy)
    widths: list[int] = field(default_factory=list)
    level_seconds: list[float] = field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = False


def draft_trees(
    drafter: Drafter,
    selection: Selection,
    rule: TreeRule,
    batch: BatchState,
    requests: Sequence[Request],
    arrived: Callable[[], bool],
    clock: Clock,
) -> Draft:
    """Drafts as `rule` says; between levels `arrived` may interrupt it. A rule of somebody's own is
    asked level by level, as one is whose drafter does not follow it by itself."""
    width = batch.size + batch.catch_up_rows
    rule = _beside_proposals(drafter, rule, requests)
    start = clock()
    if drafter.grow is not None and rule.levels and is_data(rule):
        grown = drafter.grow(requests, rule)
        if grown is not None:
            draft = _grown(rule, grown, width, clock() - start, arrived())
            if grown.kept is None and not draft.interrupted:
                draft.kept = selection.select(rule, draft.trees)
            return draft
    draft = Draft(drafter.start(requests, rule), rule)
    draft.seconds = clock() - start
    for level in range(1, rule.levels + 1):
        draft.widths.append(width)
        draft.level_seconds.append(clock() - start)
        if arrived():
            draft.interrupted = True
            return draft
        nodes = selection.frontier(rule, draft.trees, level)
        if not len(nodes):
            break
        start = clock()
        width = drafter.expand(requests, draft.trees, nodes, rule)
        draft.seconds += clock() - start
        if not width:
            break
    draft.kept = selection.select(rule, draft.trees)
    return draft


def _beside_proposals(drafter: Drafter, rule: TreeRule, requests: Sequence[Request]) -> TreeRule:
    """The rule, without the model where what free drafters propose now is enough."""
    if rule.alone is None or not isinstance(drafter, ProposesFirst):
        return rule
    return rule.beside(drafter.propose(requests, rule))


def _grown(
    rule: TreeRule, grown: Grown, first_width: int, seconds: float, interrupted: bool
) -> Draft:
    """What came of one call, which took `seconds`."""
    drafting = seconds - grown.choosing
    deeper = grown.seconds[1:]
    level_seconds = [drafting - sum(deeper), *deeper]
    widths = [first_width, *grown.expanded]
    kept = NO_NODES if grown.kept is None else grown.kept
    return Draft(grown.trees, rule, kept, widths, level_seconds, drafting, interrupted)
