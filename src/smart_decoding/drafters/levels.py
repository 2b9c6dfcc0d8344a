"""What drafters with a model of their own share: one level per pass over the whole batch, keys in the target's pages.

Row t of a request lies at position t and reads token t + `ahead`: a draft model reads plain tokens (0), an EAGLE head
pairs each token with the target's features of the position before it (1). Before it can draft, the model must have
processed every row of the committed tokens: the next first level catches up in one pass. While speculation is off, rows
wait in a bounded window: what is older is dropped, and the model then sees only the context from there on.

Positions of pictures have no tokens. A model that sees reads their embeddings instead; for any other its context begins
behind the last picture, at that page's start.

Keys lie in pages with the target's numbers, those of tree nodes in scratch pages behind them. A page whose rows are all
there is remembered by its tokens and all tokens before them, so that prefix caching serves the drafter too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from smart_decoding.core.policies.protocol import DraftPlan
from smart_decoding.core.tree import ROOT, DraftTrees, FloatArray, IntArray
from smart_decoding.engine.kv import PAGE, Ints
from smart_decoding.engine.request import Request
from smart_decoding.engine.rows import Rows

WINDOW = 512  # rows that may wait for a request

Draw: TypeAlias = tuple[int, int, int]  # a request's seed and sample, and the output position of a token


@dataclass(slots=True)
class State:
    """One request: its rows [start, length) are in the model's cache, but for those to be run `again`.

    keys: what identifies each page's content."""

    start: int
    length: int
    again: list[int] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)


S = TypeVar("S", bound=State)


class LevelDrafter(ABC, Generic[S]):
    """Drafts with a model. `pool_pages`: pages shared with the target; `scratch_pages`: pages behind them for nodes."""

    name: str
    ahead: ClassVar[int]
    free, wants_logits = False, False
    taps: tuple[int, ...] = ()
    sees = False  # whether the model reads the embeddings of pictures; else it drafts from the text behind them

    def __init__(self, pool_pages: int, scratch_pages: int, max_levels: int = 8) -> None:
        self.max_levels = max_levels
        self._scratch_slot, self._scratch_size = pool_pages * PAGE, scratch_pages * PAGE
        self._kept = np.zeros(pool_pages + scratch_pages, np.int64)  # page -> key of the content it holds, or 0
        self._states: dict[int, S] = {}
        self._row_of = np.zeros(0, np.int64)  # node -> row of its own output, once it was expanded
        self._rows = 0  # outputs so far: one for each root, then one for each expanded node

    def pending_rows(self, requests: Sequence[Request]) -> int:
        return sum(self._waiting(r, self._states[id(r)]) if id(r) in self._states else 1 for r in requests)

    # ------------------------------------------------------------------------- what differs between the models

    @abstractmethod
    def _admit(self, request: Request, first: int) -> S:
        """The state of a request of which the target has processed [0, first), found in the prefix cache."""

    @abstractmethod
    def _first(self, rows: Rows, last: IntArray, states: Sequence[S]) -> Any:
        """Runs all waiting rows; the outputs of each request's `last` row."""

    @abstractmethod
    def _deeper(self, rows: Rows, above: IntArray) -> Any:
        """Runs nodes; the outputs of all rows. above: numbers of the outputs that they are children of."""

    @abstractmethod
    def _rank(self, out: Any, k: int, temperature: FloatArray, draws: Sequence[Draw]) -> tuple[IntArray, FloatArray]:
        """The k best children of every row of `out`, best first, and their probabilities: [rows, k]. `draws` tells
        which noise the target will draw the child with, where the temperature [rows] is not 0: the model can guess
        with the same."""

    def _receive(self, request: Request, state: S, features: Any, first: int) -> None:
        """Features of the target that arrived with committed rows."""

    def _drop(self, state: S, rows: int) -> None:
        """The `rows` oldest of the waiting rows will never be run."""

    def _table(self, request: Request, state: S) -> Ints:
        """The request's pages in the model's cache."""
        return np.array(request.table.pages, np.int32)

    # ------------------------------------------------------------------------------------------------ drafting

    def start(self, requests: Sequence[Request], plan: DraftPlan) -> DraftTrees:
        """Catches up and proposes the first level's children of every root."""
        trees = DraftTrees.empty(len(requests))
        self._row_of, self._rows = np.zeros(0, np.int64), len(requests)
        if not plan.levels:
            return trees
        states = [self._states[id(r)] for r in requests]
        out = self._first(*self._waiting_rows(requests, states), states)
        for request, state in zip(requests, states, strict=True):
            self._advance(request, state)
        self._append(requests, trees, out, np.full(len(requests), ROOT), np.arange(len(requests)), plan.children)
        return trees

    def expand(self, requests: Sequence[Request], trees: DraftTrees, nodes: IntArray, plan: DraftPlan) -> None:
        """Runs the model on `nodes` and appends their children."""
        nodes = nodes[: max(0, self._scratch_size + len(requests) - self._rows)]
        if not len(nodes):
            return
        self._row_of = np.append(self._row_of, np.full(len(trees) - len(self._row_of), -1, np.int64))
        nodes = nodes[np.argsort(trees.owner[nodes], kind="stable")]
        parent = trees.parent[nodes]
        above = np.where(parent == ROOT, trees.owner[nodes], self._row_of[parent])
        self._row_of[nodes] = self._rows + np.arange(len(nodes))
        out = self._deeper(self._node_rows(requests, trees, nodes), above)
        self._rows += len(nodes)
        self._append(requests, trees, out, nodes, trees.owner[nodes], plan.children)

    def _append(
        self,
        requests: Sequence[Request],
        trees: DraftTrees,
        out: Any,
        parents: IntArray,
        owner: IntArray,
        children: int,
    ) -> None:
        temperature = np.array([requests[i].params.temperature for i in owner], np.float64)
        draws: list[Draw] = []
        if temperature.any():
            depth = np.where(parents == ROOT, 0, trees.depth[parents] if len(trees) else 0)
            draws = [
                (r.seed, r.sample, len(r.output) + below)
                for r, below in zip((requests[i] for i in owner), depth.tolist(), strict=True)
            ]
        ids, probs = self._rank(out, children, temperature, draws)
        k = ids.shape[1]
        trees.append(np.repeat(owner, k), ids.reshape(-1), np.repeat(parents, k), probs.reshape(-1))

    # ---------------------------------------------------------------------------------------------------- rows

    def _waiting_rows(self, requests: Sequence[Request], states: Sequence[S]) -> tuple[Rows, IntArray]:
        """All waiting rows, and each request's last one."""
        token, position, slot, direct, tables = [], [], [], [], []
        inserts: list[tuple[int, Any]] = []
        count = 0
        for request, state in zip(requests, states, strict=True):
            end = self._end(request)
            at, pages = np.array([*state.again, *range(state.length, end)], np.int64), self._table(request, state)
            token.append([request.tokens[t + self.ahead] for t in at])
            position.append(at)
            slot.append(pages[at // PAGE] * PAGE + at % PAGE)
            direct.append(at + 1 - state.start)
            tables.append(pages[state.start // PAGE :])
            if request.media is not None and self.sees:
                parts = request.media.inserts(state.length + self.ahead, end - state.length)
                inserts += [(count + len(state.again) + first, part) for first, part in parts]
            count += len(at)
        edges = np.cumsum([0] + [len(x) for x in position])
        none = np.zeros(0, np.int32)
        rows = _rows(np.concatenate(token), np.concatenate(position), np.concatenate(slot), np.concatenate(direct),
                     np.zeros(int(edges[-1]) + 1, np.int32), none, edges, tables)  # fmt: skip
        rows.inserts = inserts
        return rows, edges[1:] - 1

    def _node_rows(self, requests: Sequence[Request], trees: DraftTrees, nodes: IntArray) -> Rows:
        """Rows of expanded nodes (sorted by owner), which see all true rows, the expanded ancestors and themselves."""
        owner, depth = trees.owner[nodes], trees.depth[nodes]
        present = owner[np.flatnonzero(np.diff(owner, prepend=-1))]  # sorted already
        states = [self._states[id(r)] for r in requests]
        length, start = np.array([s.length for s in states]), np.array([s.start for s in states])
        slot = self._scratch(self._row_of[nodes], len(requests))
        deepest = int(depth.max())
        paths = np.zeros((len(nodes), deepest), np.int64)
        node = nodes.copy()
        for step in range(deepest):
            alive = node != ROOT
            paths[alive, depth[alive] - 1 - step] = self._scratch(self._row_of[node[alive]], len(requests))
            node = np.where(alive, trees.parent[node], ROOT)
        extra = paths[np.arange(deepest) < depth[:, None]]
        tables = [self._table(requests[i], states[i])[start[i] // PAGE :] for i in present]
        edges = np.append(np.searchsorted(owner, present), len(nodes))
        return _rows(trees.token[nodes], length[owner] - 1 + depth, slot, length[owner] - start[owner],
                     np.concatenate(([0], np.cumsum(depth))), extra, edges, tables)  # fmt: skip

    def _scratch(self, row: IntArray, roots: int) -> IntArray:
        return self._scratch_slot + row - roots

    # --------------------------------------------------------------------------------------------------- state

    def extend(self, request: Request, features: Any, first: int, tokens: Sequence[int]) -> None:
        state = self._states.get(id(request))
        if state is None:
            state = self._states[id(request)] = self._admit(request, first)
        self._receive(request, state, features, first)
        end, window = first + len(tokens), WINDOW
        if request.media is not None and self.sees:
            window += request.media.length
        elif request.media is not None:
            self._begin(state, request.media.visual(end) // PAGE * PAGE)
        if end - state.length > window:  # keep the younger half, from a page's start on
            self._begin(state, -(-(end - window // 2) // PAGE) * PAGE)

    def _begin(self, state: S, start: int) -> None:
        """Rows before `start`, a page's, will not be run."""
        if start > state.length:
            self._drop(state, start - state.length)
            state.start = state.length = start
            state.again = []

    def observe_logits(self, tokens: IntArray, logits: Any) -> None:
        """Not wanted."""

    def release(self, request: Request) -> None:
        self._states.pop(id(request), None)

    def _end(self, request: Request) -> int:
        """Rows of the request's committed tokens."""
        return len(request.tokens) - self.ahead

    def _waiting(self, request: Request, state: S) -> int:
        return self._end(request) - state.length + len(state.again)

    def _advance(self, request: Request, state: S) -> None:
        """All waiting rows were run: their pages hold other content now, and whole ones can serve again."""
        first, state.length, state.again = state.length // PAGE, self._end(request), []
        pages = self._table(request, state)[first : -(-state.length // PAGE)]
        whole = state.length // PAGE
        self._kept[pages] = 0
        self._kept[pages[: whole - first]] = self._keys(request, state, whole)[first:]

    def _keys(self, request: Request, state: S, pages: int) -> list[int]:
        """For each of the request's first pages a number that stands for its tokens and all before them."""
        for page in range(len(state.keys), pages):
            before = state.keys[-1] if page else 0
            mark = request.table.marks.get(page, b"")
            state.keys.append(hash((before, mark, *request.tokens[page * PAGE : (page + 1) * PAGE])))
        return state.keys[:pages]


def _rows(
    token: ArrayLike,
    position: ArrayLike,
    slot: ArrayLike,
    direct: ArrayLike,
    extra_at: ArrayLike,
    extra: ArrayLike,
    edges: ArrayLike,
    tables: Sequence[Ints],
) -> Rows:
    def i32(x: ArrayLike) -> Ints:
        return np.ascontiguousarray(x, np.int32)

    starts = np.cumsum([0] + [len(t) for t in tables[:-1]])
    return Rows(np.asarray(token, np.int64), np.asarray(position, np.int64), i32(slot), i32(direct), i32(extra_at),
                i32(extra), i32(edges), i32(starts), i32(np.concatenate(tables)))  # fmt: skip
