"""Drafting a round's trees: level by level, or all levels in one call of the drafter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from smart_decoding.core.policies.protocol import BatchState, DraftPlan, Policy
from smart_decoding.core.tree import DraftTrees
from smart_decoding.engine.protocols import Clock, Drafter, Grow
from smart_decoding.engine.request import Request


@dataclass(slots=True)
class Draft:
    """A round's trees, and what they took.

    widths, level_seconds: rows and seconds of each level that the model ran. seconds: all that the
    drafter took. interrupted: a request arrived that can begin at once; the trees are dropped."""

    trees: DraftTrees
    widths: list[int] = field(default_factory=list)
    level_seconds: list[float] = field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = False


def draft_trees(
    drafter: Drafter,
    policy: Policy,
    plan: DraftPlan,
    batch: BatchState,
    requests: Sequence[Request],
    arrived: Callable[[], bool],
    clock: Clock,
) -> Draft:
    """Drafts as `plan` says; between levels `arrived` may interrupt it."""
    if plan.growth is not None and drafter.grow is not None:
        return _in_one_call(drafter.grow, plan, batch, requests, arrived, clock)
    start = clock()
    draft = Draft(drafter.start(requests, plan))
    draft.seconds = clock() - start
    width = batch.size + batch.catch_up_rows
    for level in range(1, plan.levels + 1):
        draft.widths.append(width)
        draft.level_seconds.append(clock() - start)
        if arrived():
            draft.interrupted = True
            break
        if level == plan.levels:
            break
        nodes = policy.frontier(plan, batch, draft.trees, level)
        if nodes is None or not len(nodes):
            break
        start = clock()
        width = drafter.expand(requests, draft.trees, nodes, plan)
        draft.seconds += clock() - start
        if not width:
            break
    return draft


def _in_one_call(
    grow: Grow,
    plan: DraftPlan,
    batch: BatchState,
    requests: Sequence[Request],
    arrived: Callable[[], bool],
    clock: Clock,
) -> Draft:
    """The same where the drafter follows `plan.growth` by itself."""
    start = clock()
    trees, expanded, level_seconds, choosing = grow(requests, plan)
    seconds = clock() - start - choosing
    level_seconds[0] = seconds - sum(level_seconds[1:])
    widths = [batch.size + batch.catch_up_rows, *expanded]
    return Draft(trees, widths, level_seconds, seconds, arrived())
