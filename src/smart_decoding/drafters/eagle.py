"""Drafting with an EAGLE head, level by level.

Pair t of a request is (the target's features at position t, token t + 1). The target computes features once only: what
it finds in its prefix cache comes without them, and serves the head only where it still has the keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from smart_decoding.core.tree import FloatArray, IntArray
from smart_decoding.drafters.levels import Draw, LevelDrafter, State
from smart_decoding.engine.kv import PAGE
from smart_decoding.engine.request import Request
from smart_decoding.engine.rows import Rows


class Head(Protocol):
    """What the drafter needs of a head; arrays of the backend are opaque."""

    taps: tuple[int, ...]

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
        """Rows of the concatenation of earlier outputs."""
        ...


@dataclass(slots=True)
class Pairs(State):
    """parts: the features of the waiting pairs."""

    parts: list[Any] = field(default_factory=list)


class EagleDrafter(LevelDrafter[Pairs]):
    """A head on the target's features."""

    name, ahead = "eagle", 1

    def __init__(self, head: Head, pool_pages: int, scratch_pages: int, max_levels: int = 8) -> None:
        super().__init__(pool_pages, scratch_pages, max_levels)
        self._head, self.taps = head, head.taps
        self._outs: list[Any] = []  # of this round

    def _admit(self, request: Request, first: int) -> Pairs:
        """Sees the run of cached pages before `first` whose keys the head still has."""
        state = Pairs(first, first)
        keys = self._keys(request, state, first // PAGE)
        while state.start and self._kept[request.table.pages[state.start // PAGE - 1]] == keys[state.start // PAGE - 1]:
            state.start -= PAGE
        return state

    def _first(self, rows: Rows, last: IntArray, states: Sequence[Pairs]) -> Any:
        g = self._head.project([part for state in states for part in state.parts])
        for state in states:
            state.parts = []
        self._outs = [self._head.take([self._head.run(rows, g)], last)]
        return self._outs[0]

    def _deeper(self, rows: Rows, above: IntArray) -> Any:
        self._outs.append(self._head.run(rows, self._head.take(self._outs, above)))
        return self._outs[-1]

    def _rank(self, out: Any, k: int, temperature: FloatArray, draws: Sequence[Draw]) -> tuple[IntArray, FloatArray]:
        return self._head.rank(out, k, temperature, draws)

    def _receive(self, request: Request, state: Pairs, features: Any, first: int) -> None:
        state.parts.append(features)

    def _drop(self, state: Pairs, rows: int) -> None:
        while rows and len(state.parts[0]) <= rows:
            rows -= len(state.parts.pop(0))
        if rows:
            state.parts[0] = state.parts[0][rows:]
