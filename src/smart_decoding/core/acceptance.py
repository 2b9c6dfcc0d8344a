"""Reference acceptance: the oracle that every backend's walk is tested against.

Drafts are deterministic children (point masses): the target's token is drawn at each row of the
walk; the walk goes down if that token is a child and stops otherwise, emitting it as the bonus
token. The output is distributed exactly as the target's, whatever rule chose the nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from smart_decoding.core.tree import ROOT, DraftTrees, IntArray

# Rows of the verifying forward: roots are 0 .. batch - 1, node i is row batch + i. The target's
# token at each.
Sampler: TypeAlias = Callable[[list[int]], Iterable[int]]

_NONE = np.zeros(0, np.int64)
_NO_PATH: list[int] = []


@dataclass(frozen=True, slots=True)
class Acceptance:
    """What one round yields.

    root_next: [batch] the target's token after each root.
    next_token: [nodes] the target's token after each accepted node, -1 where the walk did not come.
    emitted: per request, the accepted tokens followed by the bonus token.
    path: per request, the indices of the accepted nodes, first level first.
    """

    root_next: IntArray
    next_token: IntArray
    emitted: list[list[int]]
    path: list[list[int]]


def accept(trees: DraftTrees, sample: Sampler) -> Acceptance:
    """Walks down all trees at once, level by level; `sample` is asked once per level, only for
    visited rows."""
    batch = trees.batch
    if not len(trees):  # plain decoding, as cheap as can be
        first = [int(token) for token in sample(list(range(batch)))]
        emitted = [[token] for token in first]
        return Acceptance(np.array(first, np.int64), _NONE, emitted, [_NO_PATH] * batch)
    children = _children(trees)
    after = [-1] * (batch + len(trees))  # the target's token after each visited row
    paths: list[list[int]] = [[] for _ in range(batch)]
    emitted = [[] for _ in range(batch)]
    owners = rows = list(range(batch))
    while rows:
        ahead = []
        following = []
        for owner, row, token in zip(owners, rows, map(int, sample(rows)), strict=True):
            after[row] = token
            emitted[owner].append(token)
            below = children.get((row, token))
            if below is not None:
                paths[owner].append(below)
                ahead.append(owner)
                following.append(batch + below)
        owners = ahead
        rows = following
    all_after = np.array(after, np.int64)
    return Acceptance(all_after[:batch], all_after[batch:], emitted, paths)


def _children(trees: DraftTrees) -> dict[tuple[int, int], int]:
    """(row, token) -> node; of equal siblings the first one counts."""
    children: dict[tuple[int, int], int] = {}
    nodes = zip(trees.owner.tolist(), trees.parent.tolist(), trees.token.tolist(), strict=True)
    for node, (owner, parent, token) in enumerate(nodes):
        row = owner if parent == ROOT else trees.batch + parent
        children.setdefault((row, token), node)
    return children
