"""The rows of one forward pass: which tokens, at which positions, seeing which keys.

Linear layers see exactly these rows, ragged trees included. A row reads the positions 0 .. direct-1 of its request
through the block table, then the `extra` slots: its ancestors in the draft tree, and itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from smart_decoding.core.tree import DraftTrees, IntArray
from smart_decoding.engine.media import Inserts

Ints: TypeAlias = NDArray[np.int32]

_NONE = np.zeros(0, np.int32)


@dataclass(slots=True)
class Rows:
    """Rows of a forward, those of one request next to each other (a group).

    token, position, slot, direct: [rows]; slot = page * PAGE + offset of the row's own key and value.
    extra_at: [rows + 1] offsets into `extra`, slots that follow the directly read positions in order.
    group_row: [groups + 1] first row of each group; group_pages: [groups] offset of its block table in `pages`.
    logit_rows: rows whose logits are wanted, or None for all.
    inserts: embeddings that stand in for the tokens' own, from a row on: those of pictures.
    rotary: [rows, 3] rotary positions (time, height, width) where they are not `position`, or None.
    """

    token: IntArray
    position: IntArray
    slot: Ints
    direct: Ints
    extra_at: Ints
    extra: Ints
    group_row: Ints
    group_pages: Ints
    pages: Ints
    logit_rows: IntArray | None = None
    inserts: Inserts = ()
    rotary: IntArray | None = None

    def __len__(self) -> int:
        return len(self.token)


@dataclass(slots=True)
class Span:
    """Consecutive committed tokens of one request: a root, or a chunk of a prompt.

    tokens: token ids from position `start` on; slots: [>= tokens] where their keys go (tree nodes follow the root);
    pages: the request's block table. inserts, rotary: as in Rows, inserts from the span's first row on."""

    tokens: Sequence[int]
    start: int
    slots: Sequence[int]
    pages: Ints
    inserts: Inserts = ()
    rotary: IntArray | None = None


def build_rows(spans: Sequence[Span], trees: DraftTrees, want_all: Sequence[bool]) -> tuple[Rows, IntArray, IntArray]:
    """Rows of a batch: one group per span, followed in its group by the request's tree nodes.

    trees: nodes of the first `trees.batch` spans, each of which then holds one token, the root.
    want_all: per span, whether the last row's logits are wanted (false: none, an unfinished prompt).
    Returns the rows, each span's last committed row [spans], and each node's row [nodes]."""
    nodes = np.bincount(trees.owner, minlength=len(spans)).tolist() if len(trees) else [0] * len(spans)
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    group_row, last_row, group_pages = [0], [], [0]
    for span, below in zip(spans, nodes, strict=True):
        count = len(span.tokens)
        last_row.append(len(tokens) + count - 1)
        tokens.extend(span.tokens)
        tokens.extend([0] * below)  # filled in below, like their positions
        positions.extend(range(span.start, span.start + count + below))
        slots.extend(span.slots[: count + below])
        group_row.append(len(tokens))
        group_pages.append(group_pages[-1] + len(span.pages))
    total = len(tokens)
    token, position, last = np.array(tokens, np.int64), np.array(positions, np.int64), np.array(last_row, np.int64)
    slot, direct = np.array(slots, np.int32), position.astype(np.int32)
    direct += 1
    extra_at, extra, node_row = np.zeros(total + 1, np.int32), _NONE, np.zeros(0, np.int64)
    if len(trees):
        node_row = _node_rows(trees, last)
        root = last[trees.owner]
        token[node_row] = trees.token
        position[node_row] = position[root] + trees.depth
        direct[node_row] = position[root] + 1
        extra_at, extra = _ancestors(trees, node_row, slot, total)
    pages = np.concatenate([span.pages for span in spans])
    rows = Rows(token, position, slot, direct, extra_at, extra, np.array(group_row, np.int32),
                np.array(group_pages[:-1], np.int32), pages)  # fmt: skip
    if any(span.inserts for span in spans):
        rows.inserts = [(group_row[i] + at, part) for i, span in enumerate(spans) for at, part in span.inserts]
    if any(span.rotary is not None for span in spans):
        rows.rotary = _rotary(spans, trees, position, group_row, last, node_row)
    wanted = last if all(want_all) else last[np.asarray(want_all, np.bool_)]
    if len(wanted) + len(node_row) < total:
        rows.logit_rows = np.concatenate((wanted, node_row))
    return rows, last, node_row


def _rotary(
    spans: Sequence[Span],
    trees: DraftTrees,
    position: IntArray,
    group_row: Sequence[int],
    last: IntArray,
    node_row: IntArray,
) -> IntArray:
    """[rows, 3] the spans' own rotary positions, else the plain ones; a node lies its depth behind its root."""
    rotary = np.repeat(position[:, None], 3, axis=1)
    for i, span in enumerate(spans):
        if span.rotary is not None:
            rotary[group_row[i] : int(last[i]) + 1] = span.rotary
    if len(trees):
        rotary[node_row] = rotary[last[trees.owner]] + trees.depth[:, None]
    return rotary


def _node_rows(trees: DraftTrees, last: IntArray) -> IntArray:
    """[nodes] a request's nodes follow its root, in their order."""
    order = np.argsort(trees.owner, kind="stable")
    owner = trees.owner[order]
    rank = np.arange(len(order)) - np.searchsorted(owner, owner)
    rows = np.empty(len(order), np.int64)
    rows[order] = last[owner] + 1 + rank
    return rows


def _ancestors(trees: DraftTrees, node_row: IntArray, slot: Ints, total: int) -> tuple[Ints, Ints]:
    """`extra_at` and `extra`: for each node row the slots of its ancestors from the first level down, and its own."""
    deepest = int(trees.depth.max())
    paths = np.zeros((len(trees), deepest), np.int32)
    own = slot[node_row]
    paths[np.arange(len(trees)), trees.depth - 1] = own
    for depth in range(2, deepest + 1):
        nodes = np.flatnonzero(trees.depth == depth)
        paths[nodes, : depth - 1] = paths[trees.parent[nodes], : depth - 1]
    sizes = np.zeros(total, np.int64)
    sizes[node_row] = trees.depth
    order = np.argsort(node_row)
    extra = paths[order][np.arange(deepest) < trees.depth[order, None]]
    return np.concatenate(([0], np.cumsum(sizes))).astype(np.int32), extra
