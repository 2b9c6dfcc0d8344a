"""Drafting with an EAGLE head: one level per pass, over the whole batch at once.

Pair t of a request is (the target's features at position t, token t + 1). Before it can draft, the head must have
processed every pair of the committed tokens; pairs wait in `features` and are caught up in one pass by the next first
level. While speculation is off they wait in a bounded window: what is older is dropped, and the head then sees only
the context from there on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np

from smart_decoding.core.policies.protocol import DraftPlan
from smart_decoding.core.tree import ROOT, DraftTrees, FloatArray, IntArray
from smart_decoding.engine.kv import PAGE
from smart_decoding.engine.request import Request
from smart_decoding.engine.rows import Rows

WINDOW = 512  # pairs that may wait for a request


Draw: TypeAlias = tuple[int, int, int]  # a request's seed and sample, and the output position of a token


class Head(Protocol):
    """What the drafter needs of a head; arrays of the backend are opaque."""

    taps: tuple[int, ...]

    def project(self, parts: Sequence[Any]) -> Any:
        """Tapped states [n_i, taps * hidden] of several requests -> features [sum n_i, hidden]."""
        ...

    def run(self, rows: Rows, g: Any) -> Any:
        """One pass: outputs [rows, hidden]."""
        ...

    def rank(
        self, out: Any, rows: IntArray, k: int, temperature: FloatArray, draws: Sequence[Draw]
    ) -> tuple[IntArray, FloatArray]:
        """The k best children of outputs `rows` and their probabilities: [rows, k]. `draws` tells which noise the
        target will draw the child with, where the temperature [rows] is not 0: the head can guess with the same."""
        ...

    def take(self, outs: Sequence[Any], rows: IntArray) -> Any:
        """Rows of the concatenation of earlier outputs."""
        ...


@dataclass(slots=True)
class _State:
    """One request: pairs [start, length) are in the head's cache; `parts` hold the features of [length, length + n)."""

    start: int = 0
    length: int = 0
    waiting: int = 0
    parts: list[Any] = field(default_factory=list)


class EagleDrafter:
    """A model drafter. `pool_pages`: pages shared with the target; tree nodes use the scratch pages behind them."""

    name, free, wants_logits = "eagle", False, False

    def __init__(self, head: Head, pool_pages: int, scratch_pages: int, max_levels: int = 8) -> None:
        self._head, self.max_levels, self.taps = head, max_levels, head.taps
        self._scratch_slot, self._scratch_size = pool_pages * PAGE, scratch_pages * PAGE
        self._has_keys = np.zeros(pool_pages, np.bool_)  # pages whose pairs the head has processed
        self._states: dict[int, _State] = {}
        self._outs: list[Any] = []
        self._row_of = np.zeros(0, np.int64)  # node -> row of its own output, once it was expanded
        self._rows = 0

    def pending_rows(self, requests: Sequence[Request]) -> int:
        return sum(self._states[id(r)].waiting if id(r) in self._states else 1 for r in requests)

    # ------------------------------------------------------------------------------------------- drafting

    def start(self, requests: Sequence[Request], plan: DraftPlan) -> DraftTrees:
        """Catches up and proposes the first level's children of every root."""
        trees = DraftTrees.empty(len(requests))
        self._outs, self._rows = [], 0
        self._row_of = np.zeros(0, np.int64)
        if not plan.levels:
            return trees
        states = [self._states[id(r)] for r in requests]
        rows, last = self._pair_rows(requests, states)
        g = self._head.project([part for s in states for part in s.parts])
        out = self._head.run(rows, g)
        for request, state in zip(requests, states, strict=True):
            self._mark(request, state.length, state.length + state.waiting)
            state.length += state.waiting
            state.waiting, state.parts = 0, []
        self._temperature = np.array([r.params.temperature for r in requests], np.float64)
        out = self._head.take([out], last)
        self._outs.append(out)
        self._rows = len(requests)
        owner = np.arange(len(requests))
        self._append(requests, trees, out, owner, np.full(len(requests), ROOT), owner, plan.children)
        return trees

    def expand(self, requests: Sequence[Request], trees: DraftTrees, nodes: IntArray, plan: DraftPlan) -> None:
        """Runs the head on `nodes` and appends their children."""
        nodes = nodes[: max(0, self._scratch_size - self._rows)]
        if not len(nodes):
            return
        self._grow(len(trees))
        nodes = nodes[np.argsort(trees.owner[nodes], kind="stable")]
        parent = trees.parent[nodes]
        at = np.where(parent == ROOT, trees.owner[nodes], self._row_of[parent])
        g = self._head.take(self._outs, at)
        self._row_of[nodes] = self._rows + np.arange(len(nodes))
        out = self._head.run(self._node_rows(requests, trees, nodes), g)
        self._outs.append(out)
        self._rows += len(nodes)
        self._append(requests, trees, out, np.arange(len(nodes)), nodes, trees.owner[nodes], plan.children)

    def _append(
        self,
        requests: Sequence[Request],
        trees: DraftTrees,
        out: Any,
        rows: IntArray,
        parents: IntArray,
        owner: IntArray,
        children: int,
    ) -> None:
        temperature = self._temperature[owner]
        draws: list[Draw] = []
        if temperature.any():
            depth = np.where(parents == ROOT, 0, trees.depth[parents] if len(trees) else 0)
            draws = [
                (r.seed, r.sample, len(r.output) + below)
                for r, below in zip((requests[i] for i in owner), depth.tolist(), strict=True)
            ]
        ids, probs = self._head.rank(out, rows, children, temperature, draws)
        k = ids.shape[1]
        trees.append(np.repeat(owner, k), ids.reshape(-1), np.repeat(parents, k), probs.reshape(-1))

    def _grow(self, nodes: int) -> None:
        if nodes > len(self._row_of):
            self._row_of = np.concatenate((self._row_of, np.full(nodes - len(self._row_of), -1, np.int64)))

    # -------------------------------------------------------------------------------------------- rows

    def _pair_rows(self, requests: Sequence[Request], states: Sequence[_State]) -> tuple[Rows, IntArray]:
        """Rows of all waiting pairs, and each request's last row."""
        token, position, slot, direct, tables = [], [], [], [], []
        for request, state in zip(requests, states, strict=True):
            at = np.arange(state.length, state.length + state.waiting)
            pages = np.array(request.table.pages, np.int32)
            token.append(request.tokens[state.length + 1 : state.length + 1 + state.waiting])
            position.append(at)
            slot.append(pages[at // PAGE] * PAGE + at % PAGE)
            direct.append(at + 1 - state.start)
            tables.append(pages[state.start // PAGE :])
        counts = np.cumsum([0] + [len(x) for x in position])
        total = int(counts[-1])
        none = np.zeros(0, np.int32)
        rows = _rows(np.concatenate(token), np.concatenate(position), np.concatenate(slot), np.concatenate(direct),
                     np.zeros(total + 1, np.int32), none, counts, tables)  # fmt: skip
        return rows, counts[1:] - 1

    def _node_rows(self, requests: Sequence[Request], trees: DraftTrees, nodes: IntArray) -> Rows:
        """Rows of expanded nodes (sorted by owner): all true pairs, then the expanded ancestors and the node itself."""
        owner, depth = trees.owner[nodes], trees.depth[nodes]
        present = owner[np.flatnonzero(np.diff(owner, prepend=-1))]  # sorted already
        length = np.array([self._states[id(r)].length for r in requests])
        start = np.array([self._states[id(r)].start for r in requests])
        slot = self._scratch(self._row_of[nodes], len(requests))
        deepest = int(depth.max())
        paths = np.zeros((len(nodes), deepest), np.int64)
        node = nodes.copy()
        for step in range(deepest):
            alive = node != ROOT
            paths[alive, depth[alive] - 1 - step] = self._scratch(self._row_of[node[alive]], len(requests))
            node = np.where(alive, trees.parent[node], ROOT)
        extra = paths[np.arange(deepest) < depth[:, None]]
        tables = [np.array(requests[i].table.pages, np.int32)[start[i] // PAGE :] for i in present]
        edges = np.append(np.searchsorted(owner, present), len(nodes))
        return _rows(trees.token[nodes], length[owner] - 1 + depth, slot, length[owner] - start[owner],
                     np.concatenate(([0], np.cumsum(depth))), extra, edges, tables)  # fmt: skip

    def _scratch(self, row: IntArray, roots: int) -> IntArray:
        return self._scratch_slot + row - roots

    # ------------------------------------------------------------------------------------------- state

    def extend(self, request: Request, features: Any, first: int, tokens: Sequence[int]) -> None:
        state = self._states.get(id(request))
        if state is None:
            state = self._states[id(request)] = _State(start=self._reusable(request, first), length=first)
        self._has_keys[request.table.pages[first // PAGE : (first + len(tokens) + PAGE - 1) // PAGE]] = False
        state.parts.append(features)
        state.waiting += len(tokens)
        if state.waiting > WINDOW:
            self._drop_old(state)

    def observe_logits(self, tokens: IntArray, logits: Any) -> None:
        """Not wanted."""

    def release(self, request: Request) -> None:
        self._states.pop(id(request), None)

    def _drop_old(self, state: _State) -> None:
        """Keeps the younger half of the window, from a page's start on; the head forgets what lies before."""
        end = state.length + state.waiting
        start = -(-(end - WINDOW // 2) // PAGE) * PAGE
        skip = start - state.length
        while skip and len(state.parts[0]) <= skip:
            skip -= len(state.parts.pop(0))
        if skip:
            state.parts[0] = state.parts[0][skip:]
        state.start = state.length = start
        state.waiting = end - start

    def _reusable(self, request: Request, first: int) -> int:
        """Start of the run of cached pages before `first` whose keys the head still has (prefix caching)."""
        page = first // PAGE
        while page and self._has_keys[request.table.pages[page - 1]]:
            page -= 1
        return page * PAGE

    def _mark(self, request: Request, first: int, end: int) -> None:
        """Remembers which whole pages hold the head's keys."""
        pages = request.table.pages[-(-first // PAGE) : end // PAGE]
        if first % PAGE and end // PAGE > first // PAGE:
            pages = [request.table.pages[first // PAGE], *pages]
        self._has_keys[pages] = True


def _rows(
    token: Any, position: Any, slot: Any, direct: Any, extra_at: Any, extra: Any, edges: Any, tables: list[Any]
) -> Rows:
    def i32(x: Any) -> Any:
        return np.ascontiguousarray(x, np.int32)

    starts = np.cumsum([0] + [len(t) for t in tables[:-1]])
    return Rows(np.asarray(token, np.int64), np.asarray(position, np.int64), i32(slot), i32(direct), i32(extra_at),
                i32(extra), i32(edges), i32(starts), i32(np.concatenate(tables)))  # fmt: skip
