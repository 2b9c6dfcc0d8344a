"""Draft trees: a drafter's proposals in one round, for every request of the batch.

All trees of a round live in one struct of arrays, `DraftTrees`. A policy chooses over the whole
batch by one sort and one scan, without a Python loop over requests. The root of a tree (the
request's last committed token) is not a node: a node at depth 1 has parent -1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

IntArray: TypeAlias = NDArray[np.int64]
FloatArray: TypeAlias = NDArray[np.float64]
BoolArray: TypeAlias = NDArray[np.bool_]
KindArray: TypeAlias = NDArray[np.uint8]  # kinds of requests with calibrations of their own

ROOT = -1
MODEL = 0  # the source of a model's nodes; other drafters' are 1, 2, ...

# Numbers of columns of each type.
_INTS = len(("owner", "token", "parent", "depth", "source"))
_FLOATS = len(("draft_prob", "path_prob", "accept_prob"))
_NO_INTS = np.zeros((_INTS, 0), np.int64)
_NO_FLOATS = np.zeros((_FLOATS, 0))


class DraftTrees:
    """The nodes of all requests of one round, parents before children.

    Columns lie in two blocks with spare room, `ints` [5, room] and `floats` [3, room], in the order
    of the properties below. A new level is a few copies, and native code finds all columns by two
    addresses.
    """

    __slots__ = ("_count", "batch", "floats", "ints")
    _count: int

    def __init__(
        self,
        batch: int,
        owner: ArrayLike,
        token: ArrayLike,
        parent: ArrayLike,
        depth: ArrayLike,
        draft_prob: ArrayLike,
        path_prob: ArrayLike,
        accept_prob: ArrayLike,
        source: ArrayLike,
    ) -> None:
        self.batch = batch
        self.ints: IntArray = np.array((owner, token, parent, depth, source), np.int64)
        self.floats: FloatArray = np.array((draft_prob, path_prob, accept_prob), np.float64)
        self._count = self.ints.shape[1]

    @classmethod
    def empty(cls, batch: int) -> DraftTrees:
        """Return trees without nodes for `batch` requests: plain decoding."""
        return cls._of(batch, _NO_INTS, _NO_FLOATS, 0)

    @classmethod
    def with_room(cls, batch: int, room: int) -> DraftTrees:
        """Return trees with room for `room` nodes and none yet, for native code to fill in; then
        call `set_length`."""
        return cls._of(batch, np.empty((_INTS, room), np.int64), np.empty((_FLOATS, room)), 0)

    def set_length(self, nodes: int) -> None:
        """Set the number of nodes that native code has filled in."""
        self._count = nodes

    @classmethod
    def _of(cls, batch: int, ints: IntArray, floats: FloatArray, count: int) -> DraftTrees:
        trees = cls.__new__(cls)
        trees.batch = batch
        trees.ints = ints
        trees.floats = floats
        trees._count = count
        return trees

    def __len__(self) -> int:
        return self._count

    @property
    def owner(self) -> IntArray:
        """[nodes] index of the request in the batch, in [0, batch)."""
        return self.ints[0, : self._count]

    @property
    def token(self) -> IntArray:
        """[nodes] proposed token id."""
        return self.ints[1, : self._count]

    @property
    def parent(self) -> IntArray:
        """[nodes] index of the parent node in these arrays, or ROOT."""
        return self.ints[2, : self._count]

    @property
    def depth(self) -> IntArray:
        """[nodes] 1 for a child of the root."""
        return self.ints[3, : self._count]

    @property
    def source(self) -> IntArray:
        """[nodes] index of the drafter that proposed the node."""
        return self.ints[4, : self._count]

    @property
    def draft_prob(self) -> FloatArray:
        """[nodes] the drafter's conditional probability of the token, in [0, 1]."""
        return self.floats[0, : self._count]

    @property
    def path_prob(self) -> FloatArray:
        """[nodes] product of `draft_prob` from the root to the node (uncalibrated)."""
        return self.floats[1, : self._count]

    @path_prob.setter
    def path_prob(self, value: ArrayLike) -> None:
        self.floats[1, : self._count] = value

    @property
    def accept_prob(self) -> FloatArray:
        """[nodes] calibrated probability that the whole path is accepted; NaN until a policy has
        scored the node."""
        return self.floats[2, : self._count]

    @accept_prob.setter
    def accept_prob(self, value: ArrayLike) -> None:
        self.floats[2, : self._count] = value

    def append(
        self,
        owner: ArrayLike,
        token: ArrayLike,
        parent: ArrayLike,
        draft_prob: ArrayLike,
        source: int = 0,
    ) -> None:
        """Add nodes below existing ones (or ROOT). All arguments have shape [new nodes]; owners of
        children must be their parents' owners."""
        above = np.asarray(parent, np.int64)
        prob = np.asarray(draft_prob, np.float64)
        start = self._count
        end = start + len(above)
        self._make_room(end)
        ints = self.ints[:, start:end]
        floats = self.floats[:, start:end]
        ints[0] = owner
        ints[1] = token
        ints[2] = above
        ints[4] = source
        floats[0] = prob
        floats[2] = np.nan
        if start:
            at_root = above == ROOT
            ints[3] = np.where(at_root, 0, self.ints[3].take(above)) + 1
            floats[1] = np.where(at_root, 1.0, self.floats[1].take(above)) * prob
        else:
            ints[3] = 1
            floats[1] = prob
        self._count = end

    def adopt(
        self, other: DraftTrees, nodes: Sequence[int], parents: Sequence[int], source: int
    ) -> None:
        """Add copies of `nodes` of other trees below `parents` in these. They keep their depth, and
        are not scored yet."""
        start = self._count
        end = start + len(nodes)
        self._make_room(end)
        self.ints[:, start:end] = other.ints[:, nodes]
        self.floats[:, start:end] = other.floats[:, nodes]
        self.ints[2, start:end] = parents
        self.ints[4, start:end] = source
        self.floats[2, start:end] = np.nan
        self._count = end

    def _make_room(self, nodes: int) -> None:
        if nodes <= self.ints.shape[1]:
            return
        ints = np.empty((_INTS, 2 * nodes), np.int64)
        floats = np.empty((_FLOATS, 2 * nodes))
        ints[:, : self._count] = self.ints[:, : self._count]
        floats[:, : self._count] = self.floats[:, : self._count]
        self.ints = ints
        self.floats = floats

    def take(self, keep: IntArray, batch: int | None = None) -> DraftTrees:
        """Return the trees pruned to the nodes `keep`: ascending indices, prefix-closed. batch:
        requests of the result, if there are more. Raises ValueError if `keep` is not closed."""
        batch = self.batch if batch is None else batch
        count = len(keep)
        if count == self._count:
            return self._of(batch, self.ints, self.floats, count)
        ints = self.ints.take(keep, axis=1)
        floats = self.floats.take(keep, axis=1)
        renumber = np.full(self._count + 1, -2, np.int64)  # the last entry serves parent == ROOT
        renumber[keep] = np.arange(count)
        renumber[ROOT] = ROOT
        ints[2] = renumber[ints[2]]
        if count and ints[2].min() < ROOT:
            raise ValueError("a kept node has lost its parent: the selection is not prefix-closed")
        return self._of(batch, ints, floats, count)

    def counts(self, nodes: IntArray | None = None) -> list[int]:
        """Return each request's number of nodes [batch], or of nodes in `nodes`."""
        owner = self.owner if nodes is None else self.owner[nodes]
        if self.batch == 1:
            return [len(owner)]
        counts: list[int] = np.bincount(owner, minlength=self.batch).tolist()
        return counts

    def nodes_of(self, owner: int) -> IntArray:
        """Return indices of one request's nodes, ascending."""
        return np.flatnonzero(self.owner == owner)

    def path(self, node: int) -> list[int]:
        """Return node indices from the first level down to `node`."""
        nodes = []
        while node != ROOT:
            nodes.append(node)
            node = int(self.parent[node])
        return nodes[::-1]


def slots(trees: DraftTrees) -> IntArray:
    """Return the row [nodes] of each node's parent: roots are 0 .. batch - 1, node i is batch + i.
    Siblings share a slot."""
    slot: IntArray = trees.parent + trees.batch
    np.copyto(slot, trees.owner, where=trees.parent < 0)
    return slot


def sibling_ranks(trees: DraftTrees) -> IntArray:
    """Return each node's rank [nodes] among its siblings by draft_prob: 0 is the largest, ties go
    to the lower index."""
    slot = slots(trees)
    order = np.lexsort((-trees.draft_prob, slot))
    sorted_slot = slot[order]
    rank = np.empty(len(trees), np.int64)
    rank[order] = np.arange(len(trees)) - np.searchsorted(sorted_slot, sorted_slot)
    return rank


def of_expanded(trees: DraftTrees, slot: IntArray) -> BoolArray:
    """Return whether the model drafter has expanded each node's parent [nodes], so that it proposed
    the node or a sibling. slot: `slots(trees)`."""
    return expanded_slots(trees, slot)[slot]


def expanded_slots(trees: DraftTrees, slot: IntArray) -> BoolArray:
    """Return whether the model drafter has expanded each root, then each node [batch + nodes].
    slot: `slots(trees)`."""
    expanded = np.zeros(trees.batch + len(trees), np.bool_)
    expanded[slot[trees.source == 0]] = True
    return expanded


def join(many: Sequence[DraftTrees]) -> DraftTrees:
    """Return the trees of several batches as trees of one batch, side by side."""
    first_owner = np.cumsum([0] + [trees.batch for trees in many])
    first_node = np.cumsum([0] + [len(trees) for trees in many])
    shift = np.diff(first_node)
    ints = np.concatenate([trees.ints[:, : len(trees)] for trees in many], axis=1)
    floats = np.concatenate([trees.floats[:, : len(trees)] for trees in many], axis=1)
    ints[0] += np.repeat(first_owner[:-1], shift)
    ints[2] += np.where(ints[2] == ROOT, 0, np.repeat(first_node[:-1], shift))
    return DraftTrees._of(int(first_owner[-1]), ints, floats, int(first_node[-1]))


# --- several drafters -----------------------------------------------------------------------------
#
# Trees of several drafters as one: the same token below the same parent is one node.


def added(proposed: DraftTrees, drafted: DraftTrees) -> DraftTrees:
    """Return the nodes of free drafters and of a model in one tree, equal nodes merged."""
    if not len(proposed):
        return drafted
    merge(proposed, drafted, MODEL)
    return proposed


def merge(trees: DraftTrees, other: DraftTrees, source: int) -> None:
    """Add another drafter's nodes; equal nodes become one."""
    first = len(trees)
    parents = np.where(other.parent == ROOT, ROOT, other.parent + first)
    trees.adopt(other, range(len(other)), parents.tolist(), source)
    if first:
        fold(trees, first)


def fold(trees: DraftTrees, first: int) -> None:
    """Merge each node from `first` on that equals an earlier node into the earlier one."""
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
    trees.set_length(end)
    trees.parent[first:] = parents
    for depth in range(1, int(trees.depth.max()) + 1):
        nodes = np.flatnonzero(trees.depth == depth)
        above_prob = 1.0 if depth == 1 else trees.path_prob[trees.parent[nodes]]
        trees.path_prob[nodes] = above_prob * trees.draft_prob[nodes]


def _keys(trees: DraftTrees, first: int, end: int) -> list[tuple[int, int, int]]:
    """Return owner, parent and token of the nodes [first, end): unique for each node."""
    columns = [c[first:end].tolist() for c in (trees.owner, trees.parent, trees.token)]
    return list(zip(*columns, strict=True))


# --- acceptance -----------------------------------------------------------------------------------
#
# Reference acceptance: every backend's walk is tested against it.
#
# Drafts are deterministic children (point masses). The target's token is drawn at each row of the
# walk. If it is a child, the walk goes down; otherwise it stops and emits the token as the bonus
# token. The output is distributed exactly as the target's, for any choice of nodes.


# Returns the target's token at each of these rows of the verifying forward: roots are rows 0 ..
# batch - 1, node i is row batch + i.
Sampler: TypeAlias = Callable[[list[int]], Iterable[int]]

_NONE = np.zeros(0, np.int64)
_NO_PATH: list[int] = []


@dataclass(frozen=True, slots=True)
class Acceptance:
    """The result of one round's walk.

    root_next: [batch] the target's token after each root.
    next_token: [nodes] the target's token after each accepted node, -1 after the others.
    emitted: per request, the accepted tokens followed by the bonus token.
    path: per request, the indices of the accepted nodes, first level first.
    """

    root_next: IntArray
    next_token: IntArray
    emitted: list[list[int]]
    path: list[list[int]]


def accept(trees: DraftTrees, sample: Sampler) -> Acceptance:
    """Walk down all trees at once, level by level. `sample` is called once per level, only for
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
    """Return a map (row, token) -> node; of equal siblings the first one counts."""
    children: dict[tuple[int, int], int] = {}
    nodes = zip(trees.owner.tolist(), trees.parent.tolist(), trees.token.tolist(), strict=True)
    for node, (owner, parent, token) in enumerate(nodes):
        row = owner if parent == ROOT else trees.batch + parent
        children.setdefault((row, token), node)
    return children
