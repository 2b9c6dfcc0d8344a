"""Drafting with an EAGLE head, level by level.

Pair t of a request is (the target's features at position t, token t + 1). The target computes
features only once: cached pages come without features, and serve the head only while it still has
their keys.

A page's last pair reads the first token behind the page. A request with another token there runs
the pair again, into a copy of the page. So the features of each page's last pair are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from smart_decoding.drafters.levels import LevelDrafter, State
from smart_decoding.engine.kv import PAGE, Ints

if TYPE_CHECKING:
    from smart_decoding.core.rule import Draft, TreeRule
    from smart_decoding.core.tree import DraftTrees, IntArray
    from smart_decoding.engine.request import Request
    from smart_decoding.engine.rows import DraftInputs, LevelRequest, Ranked, Rows

LOG = 64  # plain rounds whose features are handed to the requests together


@dataclass(eq=False, slots=True)
class Log:
    """Features of plain rounds of the same requests, handed to the requests only when needed.

    first: position of each request's first row. rounds: [requests, width] each."""

    requests: list[Request]
    first: list[int]
    rounds: list[Any] = field(default_factory=list)


@dataclass(slots=True)
class Pairs(State):
    """One request's pairs. parts: features of the waiting pairs: arrays, or those of several rounds
    and a place in each. copies: page index -> scratch page in place of the request's, and the
    features of its last pair, which is run again."""

    parts: list[Any] = field(default_factory=list)
    copies: dict[int, tuple[int, Any]] = field(default_factory=dict)

    def wait_with(self, part: Any, head: Head) -> None:
        """Add a part. The last one gets memory of its own: it waits on, as in rounds with prompts,
        which have many rows and do not draft."""
        if self.parts:
            self.parts[-1] = head.apart(self.parts[-1])
        self.parts.append(part)


class HeadLevels(Protocol):
    """A head's levels, one at a time or a round of them."""

    def first(
        self, rows: Rows, parts: Sequence[Any], last: IntArray, request: LevelRequest
    ) -> Ranked:
        """Run all waiting pairs; return the best children of the `last` rows."""

    def deeper(self, rows: Rows, above: IntArray, request: LevelRequest) -> Ranked:
        """Run nodes below the outputs `above` of this round; return the best children of all."""

    def follows(self, rule: TreeRule) -> bool:
        """Return whether `draft` takes rounds of such a rule."""

    def draft(
        self, rule: TreeRule, proposed: DraftTrees, inputs: DraftInputs, parts: Sequence[Any]
    ) -> Draft:
        """Draft a round in one call, and merge it with the proposed nodes."""


class Head(Protocol):
    """A head that this drafter can run. `Features` are opaque."""

    aux_layers: tuple[int, ...]
    resting_layers: tuple[int, ...]
    supports_images: bool

    @property
    def levels(self) -> HeadLevels:
        """The levels of a round."""

    def use(self, tokens: IntArray) -> None:
        """Note tokens of texts, which are proposed from now on, where that can change."""

    def apart(self, part: Any) -> Any:
        """Return a part, copied where it is a small piece of an array that it would keep alive."""

    def take(self, features: Any, row: int) -> Any:
        """Return a copy of one row of features."""

    def copy_page(self, source: int, target: int) -> None:
        """Copy the keys of a page."""

    def blank(self, rows: int) -> Any:
        """Return features of arbitrary content."""


class EagleDrafter(LevelDrafter[Pairs]):
    """Drafts with a head on the target's features."""

    name = "eagle"
    ahead = 1

    def __init__(self, head: Head, pool_pages: int, scratch_pages: int) -> None:
        spare = scratch_pages // 8
        super().__init__(pool_pages, scratch_pages - spare)
        pages = pool_pages + scratch_pages
        self._spare = [*range(pages - spare, pages)]  # for copies of pages
        self._head = head
        self.aux_layers = head.aux_layers
        self.resting_layers = head.resting_layers
        self.supports_images = head.supports_images
        self._log: Log | None = None
        self._next: dict[int, int] = {}  # page -> the token behind it that its last pair read
        # page -> key of its content, features of its last position
        self._ends: dict[int, tuple[int, Any]] = {}

    def _admit(self, request: Request, first: int) -> Pairs:
        """Start with the last cached pages before `first` whose keys the head still has."""
        state = Pairs(first, first)
        page = first // PAGE
        pages = request.table.pages
        keys = self._keys(request, state, page)
        while page and self._page_keys[pages[page - 1]] == keys[page - 1]:
            page -= 1
            end = (page + 1) * PAGE
            key, features = self._ends.get(pages[page], (0, None))
            if self._next[pages[page]] != request.tokens[end] and key == keys[page] and self._spare:
                state.copies[page] = self._spare.pop(), features
                state.again.insert(0, end - 1)
                self._head.copy_page(pages[page], state.copies[page][0])
        state.start = page * PAGE
        return state

    def _first(
        self, rows: Rows, last: IntArray, states: Sequence[Pairs], request: LevelRequest
    ) -> Ranked:
        return self._head.levels.first(rows, _parts(states), last, request)

    def _deeper(self, rows: Rows, above: IntArray, request: LevelRequest) -> Ranked:
        return self._head.levels.deeper(rows, above, request)

    def follows(self, rule: TreeRule) -> bool:
        """Return whether the head drafts rounds of such a rule in one call."""
        return self._head.levels.follows(rule)

    def blank(self, rows: int) -> Any:
        """Return features of arbitrary content for `rows` rows, to time the head with."""
        return self._head.blank(rows)

    def _receive(self, request: Request, state: Pairs, features: Any, first: int) -> None:
        state.wait_with(features, self._head)
        for end in range(-(first + 1) % PAGE, len(features), PAGE):
            self._keep_end(request, state, first + end, features, end)

    def _keep_end(
        self, request: Request, state: Pairs, position: int, features: Any, row: int
    ) -> None:
        """Keep the features of the last position of a page: `row` of `features`."""
        page = position // PAGE
        key = self._keys(request, state, page + 1)[-1]
        self._ends[request.table.pages[page]] = key, self._head.take(features, row)

    def _waiting_rows(
        self, requests: Sequence[Request], states: Sequence[Pairs]
    ) -> tuple[Rows, IntArray]:
        self._hand_out()
        rows, last = super()._waiting_rows(requests, states)
        self._head.use(rows.token)
        return rows, last

    def _draft_round(
        self, rule: TreeRule, proposed: DraftTrees, inputs: DraftInputs, states: Sequence[Pairs]
    ) -> Draft:
        return self._head.levels.draft(rule, proposed, inputs, _parts(states))

    def extend(self, request: Request, features: Any, first: int, tokens: Sequence[int]) -> None:
        """Take committed pairs, which wait for the next first level."""
        self._hand_out()
        super().extend(request, features, first, tokens)

    def extend_each(self, requests: Sequence[Request], features: Any) -> None:
        """Log the features of a plain round, to hand them to the requests later."""
        if self._log is None or self._log.requests != requests:
            self._hand_out()
            self._log = Log(list(requests), [request.table.length - 1 for request in requests])
        self._log.rounds.append(features)
        if len(self._log.rounds) == LOG:
            self._hand_out()

    def _hand_out(self) -> None:
        """Hand the logged features to the requests."""
        log = self._log
        self._log = None
        for i, request in enumerate(log.requests if log else ()):
            state = self._states.get(id(request))
            if log is None or state is None:  # released since
                continue
            state.wait_with((log.rounds, i), self._head)
            first = log.first[i]
            rounds = len(log.rounds)
            for end in range(-(first + 1) % PAGE, rounds, PAGE):
                if (first + end) // PAGE < len(request.table.pages):  # not about to be released
                    self._keep_end(request, state, first + end, log.rounds[end], i)
            self._bound(request, state, first + rounds)

    def _drop(self, state: Pairs, rows: int) -> None:
        while rows:
            part = state.parts.pop(0)
            size = len(part[0] if isinstance(part, tuple) else part)
            if size > rows:
                remainder = (part[0][rows:], part[1]) if isinstance(part, tuple) else part[rows:]
                state.parts.insert(0, remainder)
                return
            rows -= size

    def _advance(self, request: Request, state: Pairs) -> None:
        first = state.length // PAGE
        state.parts = []
        super()._advance(request, state)
        for page in range(first, state.length // PAGE):
            self._next[request.table.pages[page]] = request.tokens[(page + 1) * PAGE]

    def _table(self, request: Request, state: Pairs) -> Ints:
        pages = super()._table(request, state)
        if state.copies:
            pages = pages.copy()
            for page, (copy, _) in state.copies.items():
                pages[page] = copy
        return pages

    def release(self, request: Request) -> None:
        """Forget the request and free its copies of pages."""
        state = self._states.get(id(request))
        self._spare += [copy for copy, _ in state.copies.values()] if state else []
        super().release(request)


def _parts(states: Sequence[Pairs]) -> list[Any]:
    """Return the features of all waiting pairs. They wait until they have run: drafts may fail."""
    parts: list[Any] = []
    for state in states:
        parts += [state.copies[t // PAGE][1] for t in state.again] + state.parts
    return parts
