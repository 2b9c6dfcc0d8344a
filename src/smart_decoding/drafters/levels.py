"""The base of drafters with a model: one level per pass over the whole batch, with keys in pages
that have the target's numbers.

Row t of a request lies at position t and reads token t + `ahead`: a draft model reads plain tokens
(0), an EAGLE head pairs each token with the target's features of the position before it (1). Before
it can draft, the model must have processed every row of the committed tokens: the next first level
catches up in one pass. While speculation is off, rows wait in a bounded window. Older rows are
dropped, and the model then reads only the context from there on.

Positions of pictures have no tokens. A model that supports images reads their embeddings instead.
For other models the context begins behind the last picture, at that page's start.

Keys of tree nodes lie in scratch pages behind the target's. A page with all its rows is remembered
by its tokens and all tokens before them, so that prefix caching serves the drafter too.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np

from smart_decoding.core.rule import Draft
from smart_decoding.core.selection import is_data
from smart_decoding.core.tree import (
    ROOT,
    DraftTrees,
    IntArray,
    added,
    fold,
    of_expanded,
    slots,
)
from smart_decoding.engine.kv import PAGE, Ints
from smart_decoding.engine.rows import (
    WINDOW,
    DraftInputs,
    LevelRequest,
    Ranked,
    Rows,
    RowsBuilder,
)
from smart_decoding.kernels.selection import fastest_selection

if TYPE_CHECKING:
    from smart_decoding.core.rule import TreeRule
    from smart_decoding.core.selection import Selection
    from smart_decoding.engine.request import Request


@dataclass(slots=True)
class State:
    """One request's rows [start, length) in the model's cache, except the rows to run `again`.

    keys: for each page a number that identifies its content."""

    start: int
    length: int
    again: list[int] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)


class LevelModel(Protocol):
    """A model that drafts one level at a time."""

    def pending_rows(self, requests: Sequence[Request]) -> int:
        """Count the rows of the first level."""

    def propose_roots(self, requests: Sequence[Request], rule: TreeRule) -> DraftTrees:
        """Propose the children of every root."""

    def next_level(
        self, requests: Sequence[Request], trees: DraftTrees, nodes: IntArray, rule: TreeRule
    ) -> int:
        """Append the children of `nodes`, all of one level. Return how many nodes the model ran;
        the others stay leaves."""


def draft_by_levels(
    model: LevelModel,
    requests: Sequence[Request],
    rule: TreeRule,
    interrupted: Callable[[], bool],
    proposed: DraftTrees,
    selection: Selection,
    clock: Callable[[], float] = time.perf_counter,
) -> Draft:
    """Draft as `rule` says, one level after another: on torch, and for policies in Python.

    proposed: nodes of free drafters; the model's equal nodes merge with them. interrupted: called
    after each level."""
    start = clock()
    width = model.pending_rows(requests)
    draft = Draft(added(proposed, model.propose_roots(requests, rule)), rule)
    for level in range(1, rule.levels + 1):
        draft.widths.append(width)
        draft.level_seconds.append(clock() - start)
        if interrupted():
            draft.interrupted = True
            return draft
        nodes = selection.frontier(rule, draft.trees, level)
        start = clock()
        width = _expand(model, requests, draft.trees, nodes, rule) if len(nodes) else 0
        if not width:
            break
    draft.kept = selection.select(rule, draft.trees)
    return draft


def _expand(
    model: LevelModel,
    requests: Sequence[Request],
    trees: DraftTrees,
    nodes: IntArray,
    rule: TreeRule,
) -> int:
    if not trees.source.any():
        return model.next_level(requests, trees, nodes, rule)
    # The model can run a node only where it has run the node's parent.
    nodes = nodes[of_expanded(trees, slots(trees))[nodes]]
    before = len(trees)
    width = model.next_level(requests, trees, nodes, rule) if len(nodes) else 0
    fold(trees, before)
    return width


S = TypeVar("S", bound=State)


class LevelDrafter(ABC, Generic[S]):
    """Drafts with a model. `pool_pages`: pages shared with the target; `scratch_pages`: pages
    behind them for nodes."""

    name: str
    ahead: ClassVar[int]
    has_model = True
    free = False
    needs_ends = False
    aux_layers: tuple[int, ...] = ()
    resting_layers: tuple[int, ...] = ()
    # whether the model reads the embeddings of pictures; else it drafts from the text behind them
    supports_images = False
    widest = 1 << 30  # most children of a node; 1 where the target verifies chains only

    def __init__(self, pool_pages: int, scratch_pages: int) -> None:
        self._scratch_slot = pool_pages * PAGE
        self._scratch_size = scratch_pages * PAGE
        # page -> key of the content it holds, or 0
        self._page_keys = np.zeros(pool_pages + scratch_pages, np.int64)
        self._states: dict[int, S] = {}
        # expanded node -> slots of its ancestors and its own
        self._paths: dict[int, list[int]] = {}
        self._rows = 0  # outputs so far: one for each root, then one for each expanded node

    def pending_rows(self, requests: Sequence[Request]) -> int:
        """Return the number of rows of the next first level: all waiting ones."""
        states = self._states
        return sum(self._waiting(r, states[id(r)]) if id(r) in states else 1 for r in requests)

    @abstractmethod
    def _admit(self, request: Request, first: int) -> S:
        """Return the state of a new request whose positions [0, first) the target found in its
        prefix cache."""

    @abstractmethod
    def _first(
        self, rows: Rows, last: IntArray, states: Sequence[S], request: LevelRequest
    ) -> Ranked:
        """Run all waiting rows; return the best children of each request's `last` row."""

    @abstractmethod
    def _deeper(self, rows: Rows, above: IntArray, request: LevelRequest) -> Ranked:
        """Run nodes; return the best children of each. above: numbers of their parents' outputs."""

    @abstractmethod
    def follows(self, rule: TreeRule) -> bool:
        """Return whether the model drafts all levels of this rule, which has built-in parts, in one
        call."""

    @abstractmethod
    def _draft_round(
        self, rule: TreeRule, proposed: DraftTrees, inputs: DraftInputs, states: Sequence[S]
    ) -> Draft:
        """Draft all levels in one call, and merge them with `proposed`, where the model follows
        the rule."""

    def blank(self, rows: int) -> Any:
        """Return features of arbitrary content for `rows` rows, to time the model with."""
        return None

    def skip(self, request: Request) -> None:
        """Mark all waiting rows as run without running them, to time the levels behind: their keys
        are arbitrary."""
        state = self._states[id(request)]
        self._drop(state, self._end(request) - state.length)
        state.length = self._end(request)

    def _receive(self, request: Request, state: S, features: Any, first: int) -> None:
        """Take the target's features of committed rows."""

    def _drop(self, state: S, rows: int) -> None:
        """Drop the `rows` oldest of the waiting rows, without running them."""

    def _table(self, request: Request, state: S) -> Ints:
        """Return the request's pages in the model's cache, to be read only."""
        return request.table.array

    def draft(
        self,
        requests: Sequence[Request],
        rule: TreeRule,
        interrupted: Callable[[], bool],
        proposed: DraftTrees | None = None,
    ) -> Draft:
        """See `Drafter`. proposed: nodes of free drafters; the model's equal nodes merge with
        them."""
        proposed = DraftTrees.empty(len(requests)) if proposed is None else proposed
        if not rule.levels or not (is_data(rule) and self.follows(rule)):
            selection = fastest_selection()
            return draft_by_levels(self, requests, rule, interrupted, proposed, selection)
        start = time.perf_counter()
        states = [self._states[id(r)] for r in requests]
        inputs = self._inputs(requests, states, rule)
        draft = self._draft_round(rule, proposed, inputs, states)
        for request, state in zip(requests, states, strict=True):
            self._advance(request, state)
        deeper = sum(draft.level_seconds[1:])
        draft.level_seconds[0] = time.perf_counter() - start - draft.choosing - deeper
        draft.interrupted = interrupted()
        return draft

    def _inputs(
        self, requests: Sequence[Request], states: Sequence[S], rule: TreeRule
    ) -> DraftInputs:
        rows, _ = self._waiting_rows(requests, states)
        owners = [i for i in range(len(requests)) for _ in range(rule.levels)]
        depths = [*range(rule.levels)] * len(requests)
        slots = range(self._scratch_slot, self._scratch_slot + self._scratch_size)
        return DraftInputs(rows, self._level_request(requests, owners, depths, rule), slots)

    def propose_roots(self, requests: Sequence[Request], rule: TreeRule) -> DraftTrees:
        """Catch up, and propose the children of every root."""
        trees = DraftTrees.empty(len(requests))
        batch = len(requests)
        self._paths = {}
        self._rows = batch
        if not rule.levels:
            return trees
        states = [self._states[id(r)] for r in requests]
        rows, last = self._waiting_rows(requests, states)
        level_request = self._level_request(requests, range(batch), [0] * batch, rule)
        ranked = self._first(rows, last, states, level_request)
        for request, state in zip(requests, states, strict=True):
            self._advance(request, state)
        self._append(trees, np.arange(batch), np.full(batch, ROOT), ranked)
        return trees

    def next_level(
        self, requests: Sequence[Request], trees: DraftTrees, nodes: IntArray, rule: TreeRule
    ) -> int:
        """Run the model on `nodes`, as far as there is room, and append their children; return how
        many nodes it ran."""
        nodes = nodes[: max(0, self._scratch_size + len(requests) - self._rows)]
        if not len(nodes):
            return 0
        owner = trees.owner[nodes]
        if len(requests) > 1:
            order = np.argsort(owner, kind="stable")
            nodes = nodes[order]
            owner = owner[order]
        owners = owner.tolist()
        roots = self._scratch_slot - len(requests)  # where output 0 would lie
        above = []
        paths = []
        for node, parent, i in zip(
            nodes.tolist(), trees.parent[nodes].tolist(), owners, strict=True
        ):
            path = [] if parent == ROOT else self._paths[parent]
            above.append(path[-1] - roots if path else i)
            self._paths[node] = [*path, roots + self._rows]
            self._rows += 1
            paths.append(self._paths[node])
        rows = self._node_rows(requests, owners, trees.token[nodes].tolist(), paths)
        depths = [len(path) for path in paths]
        level_request = self._level_request(requests, owners, depths, rule)
        ranked = self._deeper(rows, np.array(above, np.int64), level_request)
        self._append(trees, owner, nodes, ranked)
        return len(nodes)

    def _append(
        self, trees: DraftTrees, owner: IntArray, parents: IntArray, ranked: Ranked
    ) -> None:
        ids, probs = ranked
        k = ids.shape[1]
        trees.append(owner.repeat(k), ids.reshape(-1), parents.repeat(k), probs.reshape(-1))

    def _waiting_rows(
        self, requests: Sequence[Request], states: Sequence[S]
    ) -> tuple[Rows, IntArray]:
        builder = RowsBuilder()
        last: list[int] = []
        for request, state in zip(requests, states, strict=True):
            end = self._end(request)
            table = self._table(request, state)
            builder.begin(table[state.start // PAGE :])
            if request.media is not None and self.supports_images:
                parts = request.media.mm_embeds(state.length + self.ahead, end - state.length)
                builder.embed(parts, len(state.again))
            at = [*state.again, *range(state.length, end)]
            first = at[0] // PAGE
            pages = table[first : (end - 1) // PAGE + 1].tolist()
            builder.add_committed(
                [request.tokens[t + self.ahead] for t in at],
                at,
                [pages[t // PAGE - first] * PAGE + t % PAGE for t in at],
                state.start,
            )
            last.append(len(builder) - 1)
        return builder.build(), np.array(last, np.int64)

    def _node_rows(
        self,
        requests: Sequence[Request],
        owners: Sequence[int],
        tokens: Sequence[int],
        paths: Sequence[Sequence[int]],
    ) -> Rows:
        """Return the rows of expanded nodes (sorted by owner). Each reads all committed rows, its
        ancestors and itself."""
        builder = RowsBuilder()
        before = -1
        for owner, token, path in zip(owners, tokens, paths, strict=True):
            if owner != before:
                before = owner
                request = requests[owner]
                state = self._states[id(request)]
                builder.begin(self._table(request, state)[state.start // PAGE :])
                context_len = state.length - state.start
            builder.add_node(token, state.length - 1 + len(path), context_len, path)
        return builder.build()

    def extend(self, request: Request, features: Any, first: int, tokens: Sequence[int]) -> None:
        """Take committed tokens as rows that wait for the next first level."""
        state = self._states.get(id(request))
        if state is None:
            state = self._states[id(request)] = self._admit(request, first)
        self._receive(request, state, features, first)
        end = first + len(tokens)
        if request.media is not None and not self.supports_images:
            # One row must be left, even where a picture ends the text.
            behind = min(request.media.visual(end), end - self.ahead)
            self._begin(state, behind // PAGE * PAGE)
        self._bound(request, state, end)

    def _bound(self, request: Request, state: S, end: int) -> None:
        """Keep no more waiting rows before position `end` than the window, from a page's start
        on."""
        window = WINDOW + (
            request.media.length if request.media is not None and self.supports_images else 0
        )
        if end - state.length > window:  # keep the younger half
            self._begin(state, -(-(end - window // 2) // PAGE) * PAGE)

    def _begin(self, state: S, start: int) -> None:
        """Drop waiting rows before `start`, where a page starts."""
        if start > state.length:
            self._drop(state, start - state.length)
            state.start = state.length = start
            state.again = []

    def extend_each(self, requests: Sequence[Request], features: Any) -> None:
        """Take one more token of each request."""
        for i, request in enumerate(requests):
            first = request.table.length - 1
            row = None if features is None else features[i : i + 1]
            self.extend(request, row, first, request.tokens[first : first + 1])

    def release(self, request: Request) -> None:
        """Forget the request; its pages may still serve others."""
        self._states.pop(id(request), None)

    def _end(self, request: Request) -> int:
        return len(request.tokens) - self.ahead

    def _waiting(self, request: Request, state: S) -> int:
        return self._end(request) - state.length + len(state.again)

    def _advance(self, request: Request, state: S) -> None:
        """Note that all waiting rows have run: their pages have new content, and whole pages can
        serve other requests."""
        first = state.length // PAGE
        state.length = self._end(request)
        state.again = []
        whole = state.length // PAGE
        keys = self._keys(request, state, whole) if whole > first else []
        table = self._table(request, state)[first : -(-state.length // PAGE)].tolist()
        for index, page in enumerate(table, start=first):
            self._page_keys[page] = keys[index] if index < whole else 0

    def _keys(self, request: Request, state: S, pages: int) -> list[int]:
        """Return for each of the request's first pages a number that identifies its tokens and all
        tokens before."""
        for page in range(len(state.keys), pages):
            before = state.keys[-1] if page else 0
            mark = request.table.content_hashes.get(page, b"")
            tokens = request.tokens[page * PAGE : (page + 1) * PAGE]
            state.keys.append(hash((before, mark, *tokens)))
        return state.keys[:pages]

    def _level_request(
        self,
        requests: Sequence[Request],
        owners: Sequence[int],
        depths: Sequence[int],
        rule: TreeRule,
    ) -> LevelRequest:
        """Return the request for children of rows with these owners and depths (a root's is 0)."""
        k = min(rule.children, self.widest)
        temperatures = [r.params.drawing_temperature for r in requests]
        if not any(temperatures):
            return LevelRequest(k, np.zeros(len(owners)))
        temperature = np.array([temperatures[i] for i in owners], np.float64)
        rows = zip((requests[i] for i in owners), depths, strict=True)
        draws = [(r.seed, r.sample, len(r.output) + depth) for r, depth in rows]
        return LevelRequest(k, temperature, draws)
