"""`core.policies.chooser` in C++ (selection.cpp): one call where numpy needs dozens, or for a whole
drafting."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import Structure, byref
from typing import Any

import numpy as np

from smart_decoding.core.calibration import DEPTHS, FINE, FINE_OF, KINDS
from smart_decoding.core.lookahead import LookAhead
from smart_decoding.core.policies.chooser import Drafted, Growth
from smart_decoding.core.tree import DraftTrees, FloatArray, IntArray
from smart_decoding.engine.protocols import Grown
from smart_decoding.kernels import abi, library
from smart_decoding.kernels.memory import address

_NONE = np.zeros(0, np.int64)
_UNSEEN = -1  # the trees hold nodes of a drafter that the calibration has not seen yet


Trees = abi.structure("Trees")
Costs = abi.structure("Costs")
Choice = abi.structure("Choice")
_Calibration = abi.structure("Calibration")
GrowthStruct = abi.structure("Growth")


class NativeChooser:
    """Implements `core.policies.chooser.Chooser`. Raises OSError where the kernels cannot be built;
    its methods raise ValueError for trees whose arrays it cannot read.

    A frontier that is empty is followed by the choice of what to verify, so both come of one call.
    What stays as it is during a round is handed over once."""

    grows = True

    def __init__(self) -> None:
        lib = library.library()
        self._frontier, self._select = lib.smart_frontier, lib.smart_select
        self._trees, self._prices, self._choice = Trees(), Costs(), Choice()
        self._beliefs = _Calibration(
            None, 0, address(FINE_OF), len(FINE_OF) - 1, FINE, DEPTHS, KINDS
        )
        self._structs = byref(self._trees), byref(self._beliefs), byref(self._prices)
        self._kept, self._expanded = np.zeros((2, 256), np.int64)
        self._round: Drafted | None = None
        self._stopped = -1  # nodes of the trees at which the frontier was empty

    def frontier(
        self,
        drafted: Drafted,
        ahead: LookAhead,
        level: int,
        levels: int,
        widths: IntArray,
        level_seconds: FloatArray,
    ) -> IntArray:
        self._hand_over(drafted)
        asked = (
            level,
            address(ahead.below(level, levels)),
            levels,
            address(widths),
            len(widths),
            address(level_seconds),
        )
        room = address(self._expanded), drafted.least, address(self._kept)
        found = self._asked(self._frontier, drafted, *asked, *room)
        self._stopped = -1 if found else len(drafted.trees)
        return self._expanded[:found].copy() if found else _NONE

    def select(self, drafted: Drafted) -> tuple[IntArray, float, float]:
        if drafted is not self._round or self._stopped != len(drafted.trees):
            self._hand_over(drafted)
            self._asked(self._select, drafted, drafted.least, address(self._kept))
        choice = self._choice
        return self._kept[: choice.count].copy(), choice.rate, choice.expected

    def grow(self, growth: Growth, how: Structure, children: int, run: Callable[..., int]) -> Grown:
        """Grows a round's trees and chooses what to verify, by `run`: smart_grow with the head and
        its first level.

        children: of a node. Raises RuntimeError where the kernels do not serve the head."""
        d, levels = growth.drafted, growth.levels
        room = (d.trees.batch + min(how.slots, int(growth.widths[-1]) * (levels - 1))) * children
        d.trees = trees = DraftTrees.with_room(d.trees.batch, room)
        if not len(d.calibration.table):
            d.calibration.reserve(0)
        self._hand_over(d)
        below, expanded = growth.ahead.table(levels, growth.reach), np.zeros(levels, np.int64)
        seconds = np.zeros(levels + 1)
        how.levels, how.reach, how.widths_count, how.least = (
            levels,
            growth.reach,
            len(growth.widths),
            d.least,
        )
        how.widths, how.level_seconds, how.below = (
            address(growth.widths),
            address(growth.level_seconds),
            address(below),
        )
        how.expanded, how.seconds, how.choosing = (
            address(expanded),
            address(seconds),
            address(seconds) + 8 * levels,
        )
        self._beliefs.table, self._beliefs.cells = (
            address(d.calibration.table),
            len(d.calibration.table),
        )
        done = run(
            byref(how),
            *self._structs,
            address(self._expanded),
            address(self._kept),
            byref(self._choice),
        )
        if done < 0:
            raise RuntimeError("the CPU kernels do not support this head")
        trees.grown(self._trees.nodes)
        d.scored = self._stopped = len(trees)
        return Grown(
            trees, expanded[1:done].tolist(), seconds[:done].tolist(), float(seconds[levels])
        )

    def _hand_over(self, drafted: Drafted) -> None:
        d, trees, t, p = drafted, drafted.trees, self._trees, self._prices
        if d is not self._round:
            self._round, self._stopped = d, -1
            t.batch, t.limits, t.kind = trees.batch, address(d.limits), address(d.kind)
            t.ends, t.end_count, p.tokens, p.limit = address(d.ends), len(d.ends), d.tokens, d.limit
        t.nodes, t.room, t.ints, t.floats = (
            len(trees),
            trees.ints.shape[1],
            address(trees.ints),
            address(trees.floats),
        )
        p.sunk, p.verify, p.verify_count = d.sunk, address(d.verify), len(d.verify)
        if t.room > len(self._kept):
            self._kept, self._expanded = np.zeros((2, 2 * t.room), np.int64)

    def _asked(self, function: Any, drafted: Drafted, *asked: Any) -> int:
        scored = drafted.scored == len(drafted.trees)
        for _ in range(2):
            table = drafted.calibration.table
            self._beliefs.table, self._beliefs.cells = address(table), len(table)
            count: int = function(*self._structs, scored, *asked, byref(self._choice))
            if count != _UNSEEN:
                return count
            drafted.calibration.reserve(int(drafted.trees.source.max()))
        raise ValueError("the trees' depths or sources are out of range")


def native_chooser() -> NativeChooser | None:
    """The native chooser, or None where there are no kernels."""
    return NativeChooser() if library.unavailable() is None else None
