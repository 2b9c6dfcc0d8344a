"""Trees of several drafters as one: the same token below the same parent is one node."""

from __future__ import annotations

import numpy as np

from smart_decoding.core.tree import ROOT, DraftTrees


def merge(trees: DraftTrees, other: DraftTrees, source: int) -> None:
    """Adds another drafter's nodes."""
    first = len(trees)
    parents = np.where(other.parent == ROOT, ROOT, other.parent + first)
    trees.adopt(other, range(len(other)), parents.tolist(), source)
    if first:
        fold(trees, first)


def fold(trees: DraftTrees, first: int) -> None:
    """Where a node from `first` on proposes what one before it does, they become that one."""
    places = dict(zip(_keys(trees, 0, first), range(first), strict=True))
    place = [*range(first)]  # of each node
    new: list[int] = []
    parents: list[int] = []
    for node, (owner, above, token) in enumerate(_keys(trees, first, len(trees)), start=first):
        parent = ROOT if above == ROOT else place[above]
        place.append(places.get((owner, parent, token), first + len(new)))
        if place[node] == first + len(new):
            new.append(node)
            parents.append(parent)
            continue
        same = place[node]
        trees.draft_prob[same] = max(trees.draft_prob[same], trees.draft_prob[node])
        trees.source[same] = min(trees.source[same], trees.source[node])
    if len(new) == len(trees) - first:
        return
    end = first + len(new)
    trees.ints[:, first:end] = trees.ints[:, new]
    trees.floats[:, first:end] = trees.floats[:, new]
    trees.grown(end)
    trees.parent[first:] = parents
    for depth in range(1, int(trees.depth.max()) + 1):
        nodes = np.flatnonzero(trees.depth == depth)
        above_prob = 1.0 if depth == 1 else trees.path_prob[trees.parent[nodes]]
        trees.path_prob[nodes] = above_prob * trees.draft_prob[nodes]


def _keys(trees: DraftTrees, first: int, end: int) -> list[tuple[int, int, int]]:
    """Owner, parent and token of the nodes [first, end): what no two nodes share."""
    columns = [c[first:end].tolist() for c in (trees.owner, trees.parent, trees.token)]
    return list(zip(*columns, strict=True))
