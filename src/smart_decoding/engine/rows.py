"""The rows of one forward pass: which tokens, at which positions, seeing which keys.

Linear layers see exactly these rows, ragged trees included. A row reads the positions 0 ..
context_len-1 of its request through the block table, then the `ancestors` slots: its ancestors in
the draft tree, and itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from smart_decoding.core.tree import ROOT, DraftTrees, IntArray
from smart_decoding.engine.media import MultimodalEmbeddings

Ints: TypeAlias = NDArray[np.int32]


@dataclass(slots=True)
class Rows:
    """Rows of a forward, those of one request next to each other (a group).

    token, position, slot_mapping, context_len: [rows]; slot = page * PAGE + offset of the row's own
    key and value. ancestors_start: [rows + 1] offsets into `ancestors`, slots that follow the
    directly read positions in order. query_start_loc: [groups + 1] first row of each group;
    block_table_start: [groups] offset of its block table in `pages`. logit_rows: rows whose logits
    are wanted, or None for all. mm_embeds: embeddings that stand in for the tokens' own, from a row
    on: those of pictures. rotary: [rows, 3] rotary positions (time, height, width) where they are
    not `position`, or None.
    """

    token: IntArray
    position: IntArray
    slot_mapping: Ints
    context_len: Ints
    ancestors_start: Ints
    ancestors: Ints
    query_start_loc: Ints
    block_table_start: Ints
    pages: Ints
    logit_rows: IntArray | None = None
    mm_embeds: MultimodalEmbeddings = ()
    rotary: IntArray | None = None

    def __len__(self) -> int:
        return len(self.token)


@dataclass(slots=True)
class Span:
    """Consecutive committed tokens of one request: a root, or a chunk of a prompt.

    tokens: token ids from position `start` on; slots: [>= tokens] where their keys go (tree nodes
    follow the root); pages: the request's block table. mm_embeds, rotary: as in Rows, mm_embeds
    from the span's first row on."""

    tokens: Sequence[int]
    start: int
    slots: Sequence[int] | Ints
    pages: Ints
    mm_embeds: MultimodalEmbeddings = ()
    rotary: IntArray | None = None


def build_rows(
    spans: Sequence[Span], trees: DraftTrees, want_all: Sequence[bool]
) -> tuple[Rows, list[int], list[int]]:
    """Rows of a batch: one group per span, followed in its group by the request's tree nodes, the
    best chain first.

    trees: nodes of the first `trees.batch` spans, each of which then holds one token, the root.
    want_all: per span, whether the last row's logits are wanted (false: none, an unfinished
    prompt). Returns the rows, each span's last committed row [spans], and each node's row [nodes].

    Plain lists: between two forwards caches are cold, and each numpy call takes as long as several
    nodes do here."""
    owners = trees.owner.tolist()
    below = [0] * len(spans)
    for owner in owners:
        below[owner] += 1
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    query_start_loc, last, block_table_start = [0], [], [0]
    for span, nodes in zip(spans, below, strict=True):
        count = len(span.tokens)
        last.append(len(tokens) + count - 1)
        tokens.extend(span.tokens)
        positions.extend(range(span.start, span.start + count))
        slots.extend(span.slots[: count + nodes])
        if nodes:  # filled in below
            tokens += [0] * nodes
            positions += [0] * nodes
        query_start_loc.append(len(tokens))
        block_table_start.append(block_table_start[-1] + len(span.pages))
    total = len(tokens)
    context_len = [position + 1 for position in positions]
    node_row: list[int] = []
    ancestors_start, ancestors = [0] * (total + 1), list[int]()
    if owners:
        seen: list[
            list[int]
        ] = []  # by each node: its ancestors' slots from the first level down, and its own
        of_row: dict[int, list[int]] = {}
        parents = trees.parent.tolist()
        chain, ends = _best_chains(owners, parents, len(spans))
        free = [row + 1 + count for row, count in zip(last, ends, strict=True)]
        nodes_ = zip(
            owners, parents, trees.depth.tolist(), trees.token.tolist(), chain, strict=True
        )
        for owner, parent, depth, token, best in nodes_:
            row = root = last[owner]
            if best:
                row += depth
            else:
                row = free[owner]
                free[owner] = row + 1
            tokens[row], positions[row], context_len[row] = (
                token,
                positions[root] + depth,
                context_len[root],
            )
            path = [*seen[parent], slots[row]] if parent >= 0 else [slots[row]]
            node_row.append(row)
            seen.append(path)
            of_row[row] = path
        for row in range(total):
            ancestors += of_row.get(row, ())
            ancestors_start[row + 1] = len(ancestors)
    slot, context_len_, at, more, group, first = arrays(
        slots, context_len, ancestors_start, ancestors, query_start_loc, block_table_start[:-1]
    )
    pages = spans[0].pages if len(spans) == 1 else np.concatenate([span.pages for span in spans])
    position = np.array(positions, np.int64)
    rows = Rows(
        np.array(tokens, np.int64), position, slot, context_len_, at, more, group, first, pages
    )
    if any(span.mm_embeds for span in spans):
        rows.mm_embeds = [
            (query_start_loc[i] + at, part)
            for i, span in enumerate(spans)
            for at, part in span.mm_embeds
        ]
    if any(span.rotary is not None for span in spans):
        rows.rotary = _rotary(spans, trees, position, query_start_loc, last, node_row)
    wanted = [row for row, want in zip(last, want_all, strict=True) if want]
    if len(wanted) + len(node_row) < total:
        rows.logit_rows = np.array(wanted + node_row, np.int64)
    return rows, last, node_row


def arrays(*lists: Sequence[int]) -> list[Ints]:
    """The lists as parts of one array: one call of numpy in place of many."""
    edges = itertools.accumulate(map(len, lists), initial=0)
    joined = np.array(list(itertools.chain(*lists)), np.int32)
    return [joined[start:end] for start, end in itertools.pairwise(edges)]


def _best_chains(
    owners: Sequence[int], parents: Sequence[int], spans: int
) -> tuple[list[bool], list[int]]:
    """Which nodes are their request's first child of the first child of ..., and how many those are
    for each request.

    Drafters list the best child first. These nodes take the rows, and so the slots, right behind
    their root: where they are accepted their keys lie where they belong, and need not be moved."""
    tips, lengths = [ROOT] * spans, [0] * spans
    chain = []
    for node, (owner, parent) in enumerate(zip(owners, parents, strict=True)):
        best = parent == tips[owner]
        chain.append(best)
        if best:
            tips[owner] = node
            lengths[owner] += 1
    return chain, lengths


def _rotary(
    spans: Sequence[Span],
    trees: DraftTrees,
    position: IntArray,
    query_start_loc: Sequence[int],
    last: Sequence[int],
    node_row: Sequence[int],
) -> IntArray:
    """[rows, 3] the spans' own rotary positions, else the plain ones; a node lies its depth behind
    its root."""
    rotary = np.repeat(position[:, None], 3, axis=1)
    for i, span in enumerate(spans):
        if span.rotary is not None:
            rotary[query_start_loc[i] : last[i] + 1] = span.rotary
    if len(trees):
        rotary[node_row] = rotary[np.array(last)[trees.owner]] + trees.depth[:, None]
    return rotary
