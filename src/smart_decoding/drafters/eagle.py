"""Drafting with an EAGLE head, level by level.

Pair t of a request is (the target's features at position t, token t + 1). The target computes features once only: what
it finds in its prefix cache comes without them, and serves the head only where it still has the keys.

A page's last pair reads the first token behind the page. Where another request goes on with another token, it runs that
pair again into a copy of the page; the features for that are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from smart_decoding.core.tree import FloatArray, IntArray
from smart_decoding.drafters.levels import Draw, LevelDrafter, State
from smart_decoding.engine.kv import PAGE, Ints
from smart_decoding.engine.request import Request
from smart_decoding.engine.rows import Rows


class Head(Protocol):
    """What the drafter needs of a head; arrays of the backend are opaque."""

    taps: tuple[int, ...]
    sees: bool  # whether its rows take the embeddings of pictures, `Rows.inserts`

    def project(self, parts: Sequence[Any]) -> Any:
        """Tapped states [n_i, taps * hidden] of several requests -> features [sum n_i, hidden]."""
        ...

    def run(self, rows: Rows, g: Any) -> Any:
        """One pass: outputs [rows, hidden]."""
        ...

    def rank(self, out: Any, k: int, temperature: FloatArray, draws: Sequence[Draw]) -> tuple[IntArray, FloatArray]:
        """As `LevelDrafter._rank`."""
        ...

    def take(self, outs: Sequence[Any], rows: IntArray) -> Any:
        """Rows of the concatenation of earlier outputs, or of features, as a copy."""
        ...

    def copy_page(self, source: int, target: int) -> None:
        """Copies the keys of a page."""
        ...


@dataclass(slots=True)
class Pairs(State):
    """parts: the features of the waiting pairs. copies: scratch pages in the place of the request's, by index, each
    with the features of its last pair, which is run again."""

    parts: list[Any] = field(default_factory=list)
    copies: dict[int, tuple[int, Any]] = field(default_factory=dict)


class EagleDrafter(LevelDrafter[Pairs]):
    """A head on the target's features."""

    name, ahead = "eagle", 1

    def __init__(self, head: Head, pool_pages: int, scratch_pages: int, max_levels: int = 8) -> None:
        self._spare = list(range(pool_pages + scratch_pages - scratch_pages // 8, pool_pages + scratch_pages))
        super().__init__(pool_pages, scratch_pages - len(self._spare), max_levels)
        self._head, self.taps, self.sees = head, head.taps, head.sees
        self._outs: list[Any] = []  # of this round
        self._next: dict[int, int] = {}  # page -> the token behind it that its last pair read
        self._ends: dict[int, tuple[int, Any]] = {}  # page -> key of its content, features of its last position

    def _admit(self, request: Request, first: int) -> Pairs:
        """Sees the run of cached pages before `first` whose keys the head still has."""
        state, page, pages = Pairs(first, first), first // PAGE, request.table.pages
        keys = self._keys(request, state, page)
        while page and self._kept[pages[page - 1]] == keys[page - 1]:
            page -= 1
            end = (page + 1) * PAGE
            key, features = self._ends.get(pages[page], (0, None))
            if self._next[pages[page]] != request.tokens[end] and key == keys[page] and self._spare:
                state.copies[page] = self._spare.pop(), features
                state.again.insert(0, end - 1)
                self._head.copy_page(pages[page], state.copies[page][0])
        state.start = page * PAGE
        return state

    def _first(self, rows: Rows, last: IntArray, states: Sequence[Pairs]) -> Any:
        parts: list[Any] = []
        for state in states:
            parts += [state.copies[t // PAGE][1] for t in state.again] + state.parts
            state.parts = []
        g = self._head.project(parts)
        self._outs = [self._head.take([self._head.run(rows, g)], last)]
        return self._outs[0]

    def _deeper(self, rows: Rows, above: IntArray) -> Any:
        self._outs.append(self._head.run(rows, self._head.take(self._outs, above)))
        return self._outs[-1]

    def _rank(self, out: Any, k: int, temperature: FloatArray, draws: Sequence[Draw]) -> tuple[IntArray, FloatArray]:
        return self._head.rank(out, k, temperature, draws)

    def _receive(self, request: Request, state: Pairs, features: Any, first: int) -> None:
        state.parts.append(features)
        for end in range(-(first + 1) % PAGE, len(features), PAGE):
            page = (first + end) // PAGE
            key = self._keys(request, state, page + 1)[-1]
            self._ends[request.table.pages[page]] = key, self._head.take([features], np.array([end]))

    def _drop(self, state: Pairs, rows: int) -> None:
        while rows and len(state.parts[0]) <= rows:
            rows -= len(state.parts.pop(0))
        if rows:
            state.parts[0] = state.parts[0][rows:]

    def _advance(self, request: Request, state: Pairs) -> None:
        first = state.length // PAGE
        super()._advance(request, state)
        for page in range(first, state.length // PAGE):
            self._next[request.table.pages[page]] = request.tokens[(page + 1) * PAGE]

    def _table(self, request: Request, state: Pairs) -> Ints:
        pages = super()._table(request, state)
        for page, (copy, _) in state.copies.items():
            pages[page] = copy
        return pages

    def release(self, request: Request) -> None:
        state = self._states.get(id(request))
        self._spare += [copy for copy, _ in state.copies.values()] if state else []
        super().release(request)
