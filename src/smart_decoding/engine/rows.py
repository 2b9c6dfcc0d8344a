"""The rows of one forward pass: which tokens, at which positions, reading which keys.

Linear layers run exactly these rows, ragged trees included. A row reads the positions 0 ..
context_len-1 of its request through the block table, then the `ancestors` slots: its ancestors in
the draft tree, and itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from smart_decoding.core.tree import ROOT, DraftTrees, FloatArray, IntArray
from smart_decoding.engine.kv import NO_STATE

if TYPE_CHECKING:
    from smart_decoding.engine.media import MultimodalEmbeddings

Ints: TypeAlias = NDArray[np.int32]
# A request's seed and sample, and the output position of a token.
Draw: TypeAlias = tuple[int, int, int]
# Children of each row, best first, and their probabilities: [rows, k].
Ranked: TypeAlias = tuple[IntArray, FloatArray]
WINDOW = 512  # rows of a request that may wait for a drafter, with the features that they need


@dataclass(slots=True)
class Rows:
    """Rows of a forward. The rows of one request are neighbours: a group.

    token, position, slot_mapping, context_len: [rows]; slot = page * PAGE + offset of the row's own
    key and value. ancestors_start: [rows + 1] offsets into `ancestors`, slots that follow the
    directly read positions in order. query_start_loc: [groups + 1] first row of each group;
    block_table_start: [groups] offset of its block table in `pages`. logit_rows: rows whose logits
    are required, or None for all. mm_embeds: embeddings of pictures, which replace the tokens' own,
    each from a row on. rotary: [rows, 3] rotary positions (time, height, width), or None for
    `position`. states: [groups] places of recurrent states, -1: none; or None.
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
    states: IntArray | None = None

    def __len__(self) -> int:
        return len(self.token)

    @property
    def groups(self) -> int:
        """How many requests have rows."""
        return len(self.query_start_loc) - 1


@dataclass(frozen=True, slots=True)
class LevelRequest:
    """The children required of every row. k: how many at most. temperature: [rows]. draws: [rows]
    the noise that the target will draw the child with, so that the model can guess with the same
    noise; empty if all temperatures are 0."""

    k: int
    temperature: FloatArray
    draws: Sequence[Draw] = ()


@dataclass(frozen=True, slots=True)
class DraftInputs:
    """Inputs of a model that drafts a whole round in one call.

    rows: all waiting rows. request: for the children of nodes at depth 0, 1, ... levels - 1,
    request by request. slots: for the keys of nodes."""

    rows: Rows
    request: LevelRequest
    slots: range


@dataclass(slots=True)
class Span:
    """Consecutive committed tokens of one request: a root, or a chunk of a prompt.

    tokens: token ids from position `start` on; slots: [>= tokens] slots of their keys, then of the
    root's tree nodes; pages: the request's block table. mm_embeds, rotary: as in Rows, mm_embeds
    from the span's first row on. state: the place of its recurrent state, -1: none."""

    tokens: Sequence[int]
    start: int
    slots: Sequence[int] | Ints
    pages: Ints
    mm_embeds: MultimodalEmbeddings = ()
    rotary: IntArray | None = None
    state: int = NO_STATE


class RowLayout(NamedTuple):
    """Rows of a forward. last: [spans] each span's last row; node_row: [nodes] each tree node's
    row."""

    rows: Rows
    last: list[int]
    node_row: list[int]


class RowsBuilder:
    """Lays out the rows of a forward: for each request `begin`, then its committed tokens, then
    its nodes.

    It uses plain lists: with cold caches between two forwards, one numpy call takes as long as
    several nodes in a list."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._positions: list[int] = []
        self._slots: list[int] = []
        self._context_len: list[int] = []
        self._ancestors_start = [0]
        self._ancestors: list[int] = []
        self._query_start_loc: list[int] = []
        self._tables: list[Ints] = []
        self._mm_embeds: list[tuple[int, Any]] = []

    def __len__(self) -> int:
        return len(self._tokens)

    def begin(self, pages: Ints) -> None:
        """Begin the next group; pages: its block table."""
        self._query_start_loc.append(len(self))
        self._tables.append(pages)

    def embed(self, parts: MultimodalEmbeddings, offset: int = 0) -> None:
        """Add embeddings for the coming rows, from their row `offset` on."""
        first = len(self) + offset
        self._mm_embeds += [(first + row, part) for row, part in parts]

    def add_committed(
        self, tokens: Sequence[int], positions: Sequence[int], slots: Iterable[int], start: int = 0
    ) -> None:
        """Add rows that read the positions from `start` up to their own; all arguments are
        [rows]."""
        self._tokens.extend(tokens)
        self._positions.extend(positions)
        self._slots.extend(slots)  # of an array, too
        self._context_len += [position + 1 - start for position in positions]
        self._ancestors_start += [len(self._ancestors)] * len(tokens)

    def add_node(self, token: int, position: int, context_len: int, path: Sequence[int]) -> int:
        """Add a tree node's row; return its number. path: the slots of its ancestors and its
        own."""
        self._tokens.append(token)
        self._positions.append(position)
        self._slots.append(path[-1])
        self._context_len.append(context_len)
        self._ancestors.extend(path)
        self._ancestors_start.append(len(self._ancestors))
        return len(self) - 1

    def build(self) -> Rows:
        """Return the rows, with logits required of all."""
        starts = itertools.accumulate(map(len, self._tables[:-1]), initial=0)
        slot_mapping, context_len, ancestors_start, ancestors, query_start_loc, table_start = (
            _arrays(
                self._slots,
                self._context_len,
                self._ancestors_start,
                self._ancestors,
                [*self._query_start_loc, len(self)],
                list(starts),
            )
        )
        return Rows(
            np.array(self._tokens, np.int64),
            np.array(self._positions, np.int64),
            slot_mapping,
            context_len,
            ancestors_start,
            ancestors,
            query_start_loc,
            table_start,
            self._tables[0] if len(self._tables) == 1 else np.concatenate(self._tables),
            mm_embeds=self._mm_embeds,
        )


def build_rows(spans: Sequence[Span], trees: DraftTrees, emits: Sequence[bool]) -> RowLayout:
    """Return the rows of a batch: one group per span, with the span's tokens, then the request's
    tree nodes, the best chain first.

    trees: nodes of the first `trees.batch` spans, each of which then holds one token, the root.
    emits: per span, whether the last row's logits are required; False for an unfinished prompt."""
    builder = RowsBuilder()
    parents = trees.parent.tolist()
    depths = trees.depth.tolist()
    tokens = trees.token.tolist()
    last: list[int] = []
    node_row = [0] * len(parents)
    paths: dict[int, list[int]] = {ROOT: []}  # node -> slots of its ancestors and its own
    groups = _best_chain_first(trees.owner.tolist(), parents, len(spans))
    for span, nodes in zip(spans, groups, strict=True):
        count = len(span.tokens)
        end = span.start + count
        builder.begin(span.pages)
        builder.embed(span.mm_embeds)
        builder.add_committed(span.tokens, range(span.start, end), span.slots[:count])
        last.append(len(builder) - 1)
        for node, slot in zip(nodes, span.slots[count : count + len(nodes)], strict=True):
            path = paths[node] = [*paths[parents[node]], slot]
            node_row[node] = builder.add_node(tokens[node], end - 1 + depths[node], end, path)
    layout = RowLayout(builder.build(), last, node_row)
    if any(span.rotary is not None for span in spans):
        layout.rows.rotary = _rotary(spans, trees, layout)
    if any(span.state != NO_STATE for span in spans):
        layout.rows.states = np.array([span.state for span in spans], np.int64)
    roots = [row for row, emit in zip(last, emits, strict=True) if emit]
    if len(roots) + len(node_row) < len(builder):
        layout.rows.logit_rows = np.array(roots + node_row, np.int64)
    return layout


def _arrays(*lists: Sequence[int]) -> list[Ints]:
    """Return the lists as parts of one array: one numpy call in place of many."""
    edges = itertools.accumulate(map(len, lists), initial=0)
    joined = np.array(list(itertools.chain(*lists)), np.int32)
    return [joined[start:end] for start, end in itertools.pairwise(edges)]


def _best_chain_first(owners: Sequence[int], parents: Sequence[int], spans: int) -> list[list[int]]:
    """Return each request's nodes: first the chain of first children from the root on, then the
    others.

    Drafters list the best child first. The best chain takes the rows, and so the slots, right
    behind the root: if it is accepted, its keys need not be moved."""
    tips = [ROOT] * spans
    chains: list[list[int]] = [[] for _ in range(spans)]
    others: list[list[int]] = [[] for _ in range(spans)]
    for node, (owner, parent) in enumerate(zip(owners, parents, strict=True)):
        if parent == tips[owner]:
            tips[owner] = node
            chains[owner].append(node)
        else:
            others[owner].append(node)
    return [chain + other for chain, other in zip(chains, others, strict=True)]


def _rotary(spans: Sequence[Span], trees: DraftTrees, layout: RowLayout) -> IntArray:
    """Return rotary positions [rows, 3]: the spans' own, else the plain ones. A node's is its
    root's plus its depth."""
    rotary = np.repeat(layout.rows.position[:, None], 3, axis=1)
    for span, last in zip(spans, layout.last, strict=True):
        if span.rotary is not None:
            rotary[last + 1 - len(span.tokens) : last + 1] = span.rotary
    if len(trees):
        roots = np.array(layout.last)[trees.owner]
        rotary[layout.node_row] = rotary[roots] + trees.depth[:, None]
    return rotary
