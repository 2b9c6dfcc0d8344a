"""Draft trees: what a drafter proposes in one round, for every request of the batch.

All trees of a round live in one struct of arrays, `DraftTrees`, since a policy chooses over the whole batch: one sort,
one scan, no Python loop over requests. The root of a tree (the request's last committed token) is not a node: a node at
depth 1 has parent -1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

IntArray: TypeAlias = NDArray[np.int64]
FloatArray: TypeAlias = NDArray[np.float64]
BoolArray: TypeAlias = NDArray[np.bool_]
KindArray: TypeAlias = NDArray[np.uint8]  # kinds of requests that calibration tells apart

ROOT = -1

_NO_INTS = np.zeros(0, dtype=np.int64)
_NO_FLOATS = np.zeros(0, dtype=np.float64)


@dataclass(slots=True)
class DraftTrees:
    """The nodes of all requests of one round, parents before children.

    Arrays all have shape [nodes]:
        owner: index of the request in the batch, in [0, batch).
        token: proposed token id.
        parent: index of the parent node in these arrays, or ROOT.
        depth: 1 for a child of the root.
        draft_prob: the drafter's probability of `token` given its parent, in [0, 1].
        path_prob: product of `draft_prob` from the root to the node (uncalibrated).
        accept_prob: calibrated probability that the whole path is accepted; NaN until a policy has scored the node.
        source: index of the drafter that proposed the node.
    """

    batch: int
    owner: IntArray
    token: IntArray
    parent: IntArray
    depth: IntArray
    draft_prob: FloatArray
    path_prob: FloatArray
    accept_prob: FloatArray
    source: IntArray

    @classmethod
    def empty(cls, batch: int) -> DraftTrees:
        """Trees without nodes for `batch` requests: plain decoding."""
        return cls(batch, _NO_INTS, _NO_INTS, _NO_INTS, _NO_INTS, _NO_FLOATS, _NO_FLOATS, _NO_FLOATS, _NO_INTS)

    def __len__(self) -> int:
        return len(self.token)

    def append(
        self, owner: ArrayLike, token: ArrayLike, parent: ArrayLike, draft_prob: ArrayLike, source: int = 0
    ) -> None:
        """Adds nodes below existing ones (or ROOT). All arguments have shape [new nodes]; owners of children must be
        their parents' owners."""
        owner_, token_ = np.asarray(owner, np.int64), np.asarray(token, np.int64)
        parent_, prob = np.asarray(parent, np.int64), np.asarray(draft_prob, np.float64)
        at_root = parent_ == ROOT
        if len(self):
            depth = np.where(at_root, 1, self.depth[parent_] + 1)
            path = np.where(at_root, prob, self.path_prob[parent_] * prob)
        else:
            depth, path = np.ones_like(parent_), prob
        self.owner = np.concatenate((self.owner, owner_))
        self.token = np.concatenate((self.token, token_))
        self.parent = np.concatenate((self.parent, parent_))
        self.depth = np.concatenate((self.depth, depth))
        self.draft_prob = np.concatenate((self.draft_prob, prob))
        self.path_prob = np.concatenate((self.path_prob, path))
        self.accept_prob = np.concatenate((self.accept_prob, np.full(len(token_), np.nan)))
        self.source = np.concatenate((self.source, np.full(len(token_), source, np.int64)))

    def take(self, keep: IntArray) -> DraftTrees:
        """The trees pruned to the nodes `keep` (ascending indices, prefix-closed; ValueError if not)."""
        renumber = np.full(len(self) + 1, -2, np.int64)  # the last entry serves parent == ROOT (-1)
        renumber[keep] = np.arange(len(keep))
        renumber[ROOT] = ROOT
        parent = renumber[self.parent[keep]]
        if len(parent) and parent.min() < ROOT:
            raise ValueError("a kept node has lost its parent: the selection is not prefix-closed")
        return DraftTrees(
            self.batch,
            self.owner[keep],
            self.token[keep],
            parent,
            self.depth[keep],
            self.draft_prob[keep],
            self.path_prob[keep],
            self.accept_prob[keep],
            self.source[keep],
        )

    def nodes_of(self, owner: int) -> IntArray:
        """Indices of one request's nodes, ascending."""
        return np.flatnonzero(self.owner == owner)

    def path(self, node: int) -> list[int]:
        """Node indices from the first level down to `node`."""
        nodes = []
        while node != ROOT:
            nodes.append(node)
            node = int(self.parent[node])
        return nodes[::-1]

    def ancestor_mask(self) -> BoolArray:
        """[nodes, nodes]: entry (i, j) is true iff j is i or an ancestor of i."""
        mask = np.eye(len(self), dtype=np.bool_)
        for node, parent in enumerate(self.parent):
            if parent != ROOT:
                mask[node] |= mask[parent]
        return mask


def join(many: Sequence[DraftTrees]) -> DraftTrees:
    """The trees of several batches side by side, as those of one batch."""
    first_owner = np.cumsum([0] + [trees.batch for trees in many])
    first_node = np.cumsum([0] + [len(trees) for trees in many])
    shift = np.diff(first_node)
    parent = np.concatenate([trees.parent for trees in many])
    parent += np.where(parent == ROOT, 0, np.repeat(first_node[:-1], shift))
    owner = np.concatenate([trees.owner for trees in many]) + np.repeat(first_owner[:-1], shift)

    def column(name: str) -> Any:
        return np.concatenate([getattr(trees, name) for trees in many])

    return DraftTrees(int(first_owner[-1]), owner, column("token"), parent, column("depth"), column("draft_prob"),
                      column("path_prob"), column("accept_prob"), column("source"))  # fmt: skip
