"""What drafters with a model of their own share: one level per pass over the whole batch, keys in
the target's pages.

Row t of a request lies at position t and reads token t + `ahead`: a draft model reads plain tokens
(0), an EAGLE head pairs each token with the target's features of the position before it (1). Before
it can draft, the model must have processed every row of the committed tokens: the next first level
catches up in one pass. While speculation is off, rows wait in a bounded window: what is older is
dropped, and the model then reads only the context from there on.

Positions of pictures have no tokens. A model that supports images reads their embeddings instead;
for any other its context begins behind the last picture, at that page's start.

Keys lie in pages with the target's numbers, those of tree nodes in scratch pages behind them. A
page whose rows are all there is remembered by its tokens and all tokens before them, so that prefix
caching serves the drafter too.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeAlias, TypeVar

import numpy as np

from smart_decoding.core.selection import is_data
from smart_decoding.core.tree import ROOT, DraftTrees, FloatArray, IntArray
from smart_decoding.engine.drafting import Draft, draft_by_levels
from smart_decoding.engine.kv import PAGE, Ints
from smart_decoding.engine.rows import Rows, RowsBuilder
from smart_decoding.kernels.selection import fastest_selection

if TYPE_CHECKING:
    from smart_decoding.core.rule import TreeRule
    from smart_decoding.engine.request import Request

WINDOW = 512  # rows that may wait for a request

# A request's seed and sample, and the output position of a token.
Draw: TypeAlias = tuple[int, int, int]
# Children of each row, best first, and their probabilities: [rows, k].
Ranked: TypeAlias = tuple[IntArray, FloatArray]


@dataclass(frozen=True, slots=True)
class LevelRequest:
    """The children that are wanted of every row. k: how many at most. temperature: [rows]. draws:
    which noise the target will draw the child with, where the temperature is not 0: the model can
    guess with the same; empty if all are 0."""

    k: int
    temperature: FloatArray
    draws: Sequence[Draw] = ()


@dataclass(frozen=True, slots=True)
class RoundInputs:
    """What a model drafts a whole round from, in one call.

    rows: all that wait. asked: for the children of each request's nodes at depth 0, 1, ..., as many
    as the rule has levels, request by request. slots: where nodes' keys go."""

    rows: Rows
    asked: LevelRequest
    slots: range


@dataclass(slots=True)
class State:
    """One request: its rows [start, length) are in the model's cache, but for those to be run
    `again`.

    keys: what identifies each page's content."""

    start: int
    length: int
    again: list[int] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)


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
    # whether the model reads the embeddings of pictures; else it drafts from the text behind them
    supports_images = False
    widest = 1 << 30  # children of a node that are proposed; 1 where the target takes chains only

    def __init__(self, pool_pages: int, scratch_pages: int) -> None:
        self._selection = fastest_selection()  # level by level
        self._scratch_slot = pool_pages * PAGE
        self._scratch_size = scratch_pages * PAGE
        # page -> key of the content it holds, or 0
        self._kept = np.zeros(pool_pages + scratch_pages, np.int64)
        self._states: dict[int, S] = {}
        # expanded node -> slots of its ancestors and its own
        self._paths: dict[int, list[int]] = {}
        self._rows = 0  # outputs so far: one for each root, then one for each expanded node

    def pending_rows(self, requests: Sequence[Request]) -> int:
        """Return rows of the next first level: all that wait."""
        states = self._states
        return sum(self._waiting(r, states[id(r)]) if id(r) in states else 1 for r in requests)

    @abstractmethod
    def _admit(self, request: Request, first: int) -> S:
        """Return the state of a request of which the target has processed [0, first), found in the
        prefix cache."""

    @abstractmethod
    def _first(
        self, rows: Rows, last: IntArray, states: Sequence[S], asked: LevelRequest
    ) -> Ranked:
        """Runs all waiting rows; the best children of each request's `last` row."""

    @abstractmethod
    def _deeper(self, rows: Rows, above: IntArray, asked: LevelRequest) -> Ranked:
        """Runs nodes; the best children of all. above: numbers of the outputs that they are
        children of."""

    @abstractmethod
    def follows(self, rule: TreeRule) -> bool:
        """Return whether the model drafts all levels of such a rule, of built-in parts, in one
        call."""

    @abstractmethod
    def _prepare(
        self, rule: TreeRule, proposed: DraftTrees, inputs: RoundInputs, states: Sequence[S]
    ) -> Callable[[], Draft]:
        """Return the one call that drafts all levels below and beside `proposed`, where the model
        follows the rule."""

    def blank(self, rows: int) -> Any:
        """Return features of `rows` rows of arbitrary content, to be timed with."""
        return None

    def skip(self, request: Request) -> None:
        """Take all that waits for run, to time what comes then: its keys are whatever is there."""
        state = self._states[id(request)]
        self._drop(state, self._end(request) - state.length)
        state.length = self._end(request)

    def _receive(self, request: Request, state: S, features: Any, first: int) -> None:
        """Features of the target that arrived with committed rows."""

    def _drop(self, state: S, rows: int) -> None:
        """The `rows` oldest of the waiting rows will never be run."""

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
        """See `Drafter`. proposed: nodes of free drafters: a child that is there already stays one
        node."""
        proposed = DraftTrees.empty(len(requests)) if proposed is None else proposed
        if not rule.levels or not (is_data(rule) and self.follows(rule)):
            return draft_by_levels(self, requests, rule, interrupted, proposed, self._selection)
        start = time.perf_counter()
        states = [self._states[id(r)] for r in requests]
        inputs = self._inputs(requests, states, rule)
        draft_round = self._prepare(rule, proposed, inputs, states)
        draft = draft_round()
        for request, state in zip(requests, states, strict=True):
            self._advance(request, state)
        deeper = sum(draft.level_seconds[1:])
        draft.level_seconds[0] = time.perf_counter() - start - draft.choosing - deeper
        draft.interrupted = interrupted()
        return draft

    def _inputs(
        self, requests: Sequence[Request], states: Sequence[S], rule: TreeRule
    ) -> RoundInputs:
        rows, _ = self._waiting_rows(requests, states)
        owners = [i for i in range(len(requests)) for _ in range(rule.levels)]
        depths = [*range(rule.levels)] * len(requests)
        slots = range(self._scratch_slot, self._scratch_slot + self._scratch_size)
        return RoundInputs(rows, self._asked(requests, owners, depths, rule), slots)

    def first_level(self, requests: Sequence[Request], rule: TreeRule) -> DraftTrees:
        """Catch up and propose the first level's children of every root."""
        trees = DraftTrees.empty(len(requests))
        batch = len(requests)
        self._paths = {}
        self._rows = batch
        if not rule.levels:
            return trees
        states = [self._states[id(r)] for r in requests]
        rows, last = self._waiting_rows(requests, states)
        asked = self._asked(requests, range(batch), [0] * batch, rule)
        ranked = self._first(rows, last, states, asked)
        for request, state in zip(requests, states, strict=True):
            self._advance(request, state)
        self._append(trees, np.arange(batch), np.full(batch, ROOT), ranked)
        return trees

    def next_level(
        self, requests: Sequence[Request], trees: DraftTrees, nodes: IntArray, rule: TreeRule
    ) -> int:
        """Runs the model on `nodes`, as far as there is room, and appends their children; returns
        how many."""
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
        asked = self._asked(requests, owners, [len(path) for path in paths], rule)
        self._append(trees, owner, nodes, self._deeper(rows, np.array(above, np.int64), asked))
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
        """Return rows of expanded nodes (sorted by owner), which read all true rows, the expanded
        ancestors and themselves."""
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
        """Committed tokens become rows that wait for the next first level."""
        state = self._states.get(id(request))
        if state is None:
            state = self._states[id(request)] = self._admit(request, first)
        self._receive(request, state, features, first)
        end = first + len(tokens)
        if request.media is not None and not self.supports_images:
            # Where a picture ends the text, one row is left.
            behind = min(request.media.visual(end), end - self.ahead)
            self._begin(state, behind // PAGE * PAGE)
        self._bound(request, state, end)

    def _bound(self, request: Request, state: S, end: int) -> None:
        """Of the rows that wait before position `end`, keeps no more than the window, from a page's
        start on."""
        window = WINDOW + (
            request.media.length if request.media is not None and self.supports_images else 0
        )
        if end - state.length > window:  # keep the younger half
            self._begin(state, -(-(end - window // 2) // PAGE) * PAGE)

    def _begin(self, state: S, start: int) -> None:
        """Rows before `start`, a page's, will not be run."""
        if start > state.length:
            self._drop(state, start - state.length)
            state.start = state.length = start
            state.again = []

    def extend_each(self, requests: Sequence[Request], features: Any) -> None:
        """The same for one token of each request."""
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
        """All waiting rows were run: their pages hold other content now, and whole ones can serve
        again."""
        first = state.length // PAGE
        state.length = self._end(request)
        state.again = []
        whole = state.length // PAGE
        keys = self._keys(request, state, whole) if whole > first else []
        table = self._table(request, state)[first : -(-state.length // PAGE)].tolist()
        for page, where in enumerate(table, start=first):
            self._kept[where] = keys[page] if page < whole else 0

    def _keys(self, request: Request, state: S, pages: int) -> list[int]:
        """For each of the request's first pages a number that stands for its tokens and all before
        them."""
        for page in range(len(state.keys), pages):
            before = state.keys[-1] if page else 0
            mark = request.table.content_hashes.get(page, b"")
            tokens = request.tokens[page * PAGE : (page + 1) * PAGE]
            state.keys.append(hash((before, mark, *tokens)))
        return state.keys[:pages]

    def _asked(
        self,
        requests: Sequence[Request],
        owners: Sequence[int],
        depths: Sequence[int],
        rule: TreeRule,
    ) -> LevelRequest:
        """Return the children of rows of these owners at these depths (a root's is 0)."""
        k = min(rule.children, self.widest)
        of_each = [r.params.temperature for r in requests]
        if not any(of_each):
            return LevelRequest(k, np.zeros(len(owners)))
        temperature = np.array([of_each[i] for i in owners], np.float64)
        rows = zip((requests[i] for i in owners), depths, strict=True)
        draws = [(r.seed, r.sample, len(r.output) + depth) for r, depth in rows]
        return LevelRequest(k, temperature, draws)
