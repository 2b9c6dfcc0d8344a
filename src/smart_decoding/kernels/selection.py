"""`core/selection.py` in C++: one call follows a rule where numpy needs dozens (selection.cpp), and
one call drafts a whole round (drafting.cpp)."""

from __future__ import annotations

import functools
from ctypes import CDLL, Structure, byref
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from smart_decoding.core.calibration import DEPTHS, FINE, FINE_OF, KINDS
from smart_decoding.core.rule import NO_NODES, Draft
from smart_decoding.core.selection import (
    RANKS,
    Beam,
    BestRate,
    KeepBest,
    LookAhead,
    MarginalRatio,
    RoundCosts,
    Selection,
    Topology,
    is_data,
)
from smart_decoding.core.tree import DraftTrees
from smart_decoding.kernels import abi, library
from smart_decoding.kernels.memory import address

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from smart_decoding.core.rule import TreeRule
    from smart_decoding.core.tree import IntArray

Trees = abi.structure("Trees")
Calibration = abi.structure("Calibration")
Costs = abi.structure("Costs")
Choice = abi.structure("Choice")
Rule = abi.structure("Rule")
_BEST, _RATE, _TOPOLOGY, _MARGINAL_RATIO = range(4)  # as in abi.h
_CALIBRATION = Calibration(None, address(FINE_OF), len(FINE_OF) - 1, FINE, DEPTHS, KINDS)


def fastest_selection() -> Selection:
    """Follow rules in native code where kernels run, else in numpy."""
    return Selection() if library.unavailable() else native_selection()


def native_selection() -> NativeSelection:
    """Return the one of the kernels that run. Raises ConfigError where none do."""
    return _selection_of(library.library())


@functools.cache
def _selection_of(kernels: CDLL) -> NativeSelection:
    return NativeSelection(kernels)


class FirstLevel(NamedTuple):
    """Inputs of a round's first level and of the levels behind it.

    rows, level: as smart_draft takes them. drafter: the kernels' structure of the drafter. slots:
    for the keys of expanded nodes. alive: objects that must live as long as this."""

    rows: Structure
    level: Structure
    drafter: Structure
    slots: range
    alive: object


class NativeSelection(Selection):
    """Follows rules in native code. A rule with parts of a user's own runs in Python. Threads may
    share one. kernels: a variant of the library."""

    def __init__(self, kernels: CDLL) -> None:
        self._library = kernels
        self._last: _NativeRule | None = None

    def frontier(self, rule: TreeRule, trees: DraftTrees, level: int) -> IntArray:
        """See `TreeRule.frontier`."""
        if not is_data(rule):
            return rule.frontier(trees, level)
        if level >= rule.levels or not len(trees):
            return NO_NODES
        out = np.empty(len(trees), np.int64)
        native = self._of(rule, trees)
        count = self._library.smart_frontier(
            byref(native), byref(_trees(trees)), level, address(out)
        )
        return out[:count]

    def select(self, rule: TreeRule, trees: DraftTrees) -> IntArray:
        """See `TreeRule.select`."""
        if not is_data(rule):
            return rule.select(trees)
        if not len(trees):
            return NO_NODES
        out = np.empty(len(trees), np.int64)
        native = self._of(rule, trees)
        count = self._library.smart_select(byref(native), byref(_trees(trees)), address(out))
        return out[:count]

    def draft(self, rule: TreeRule, proposed: DraftTrees, first: FirstLevel) -> Draft:
        """Draft a round as the rule says, merge it with the nodes `proposed`, and choose the nodes
        to verify. The rule must be data.

        Raises RuntimeError where the kernels do not support the drafter."""
        trees = _with_room(proposed, rule, first)
        native_trees = _trees(trees)
        kept = np.empty(trees.ints.shape[1], np.int64)
        kept_count = np.zeros(1, np.int64)
        expanded = np.zeros(rule.levels, np.int64)
        seconds = np.zeros(rule.levels + 1)  # of each level, and of choosing
        first.drafter.expanded = address(expanded)
        first.drafter.seconds = address(seconds)
        first.drafter.choosing = address(seconds) + seconds.itemsize * rule.levels
        levels = self._library.smart_draft(
            byref(first.drafter),
            byref(self._of(rule, proposed)),
            byref(first.rows),
            byref(first.level),
            byref(native_trees),
            address(kept),
            address(kept_count),
        )
        if levels < 0:
            raise RuntimeError("the CPU kernels do not support this head or draft model")
        trees.set_length(native_trees.nodes)
        return Draft(
            trees,
            rule,
            kept[: kept_count[0]],
            [first.rows.rows, *expanded[1:levels].tolist()],
            seconds[:levels].tolist(),
            float(seconds[rule.levels]),
        )

    def _of(self, rule: TreeRule, trees: DraftTrees) -> Structure:
        """Return the rule's structure, with calibration for all sources of these trees."""
        native = self._last
        if native is None or native.rule is not rule:
            native = self._last = _NativeRule(rule, native)
        if rule.scores is not None:
            calibration = rule.scores.calibration
            calibration.reserve(int(trees.source.max(initial=0)))
            native.struct.calibration.table = address(calibration.table)
        return native.struct


class _Arrays:
    """Keeps the arrays alive that a structure points to."""

    def __init__(self) -> None:
        self._alive: list[Any] = []

    def at(self, array: NDArray[Any], dtype: type[np.generic] = np.int64) -> int:
        """Return the address of an array, or of a contiguous copy of this type."""
        self._alive.append(np.ascontiguousarray(array, dtype))
        return address(self._alive[-1])


class _NativeRule:
    """The kernels' structure of a rule, and the arrays behind it."""

    def __init__(self, rule: TreeRule, before: _NativeRule | None) -> None:
        """Convert a rule. before: the last one, whose parts serve again: policies keep them for
        many rounds."""
        self.rule = rule
        self._arrays = _Arrays()
        expand = before.expand if before and before.rule.expand is rule.expand else None
        keep = before.keep if before and before.rule.keep is rule.keep else None
        self.expand: _Part = expand or _Part(rule.expand)
        self.keep: _Part = keep or _Part(rule.keep)
        if isinstance(rule.expand, LookAhead) and len(rule.expand.below) < rule.levels - 1:
            raise ValueError(
                f"a forecast of {len(rule.expand.below)} levels is not one of all levels"
            )
        kind = None if rule.scores is None else self._arrays.at(rule.scores.kind, np.uint8)
        self.struct = Rule(
            levels=rule.levels,
            limits=self._arrays.at(rule.limits),
            kind=kind,
            ends=self._arrays.at(rule.ends),
            end_count=len(rule.ends),
            calibration=_CALIBRATION,
            expand=self.expand.struct,
            keep=self.keep.struct,
        )


class _Part:
    """The kernels' structure of a rule's `expand` or `keep`, and the arrays behind it."""

    def __init__(self, part: Any) -> None:
        self._arrays = _Arrays()
        self.struct = self._choice(part)

    def _choice(self, part: Any) -> Structure:
        if isinstance(part, Beam):
            return Choice(kind=_BEST, count=part.width)
        if isinstance(part, KeepBest):
            return Choice(kind=_BEST, count=part.count)
        if isinstance(part, BestRate):
            return Choice(kind=_RATE, count=part.least, costs=self._costs(part.costs))
        if isinstance(part, LookAhead):
            return self._look_ahead(part)
        if isinstance(part, Topology):
            return Choice(kind=_TOPOLOGY, next=self._arrays.at(part.next), ranks=part.next.shape[1])
        assert isinstance(part, MarginalRatio)
        return Choice(
            kind=_MARGINAL_RATIO,
            mean_over_paths=part.mean_over_paths,
            count=len(part.spent) - 1,
            alpha=part.alpha,
            spent=self._arrays.at(part.spent, np.float64),
            step=self._arrays.at(part.step, np.float64),
        )

    def _look_ahead(self, part: LookAhead) -> Structure:
        if part.below.shape[1] != RANKS:
            raise ValueError(f"a forecast of shape {part.below.shape} is not one of all levels")
        return Choice(
            kind=_RATE,
            costs=self._costs(part.costs),
            widths=self._arrays.at(part.widths),
            below=self._arrays.at(part.below, np.float64),
            width_count=len(part.widths),
        )

    def _costs(self, costs: RoundCosts) -> Structure:
        return Costs(
            costs.tokens,
            costs.sunk,
            costs.limit,
            self._arrays.at(costs.levels, np.float64),
            self._arrays.at(costs.verify, np.float64),
            len(costs.levels),
            len(costs.verify),
        )


def most_expanded(rule: TreeRule, batch: int, slots: range) -> int:
    """Return how many nodes a rule may expand at most, with `slots` for their keys."""
    expand = rule.expand
    if isinstance(expand, LookAhead):
        return min(len(slots), int(expand.widths[-1]) * (rule.levels - 1))
    if isinstance(expand, Topology):
        return min(len(slots), batch * len(expand.next))
    if isinstance(expand, MarginalRatio):
        return min(len(slots), batch * (len(expand.spent) - 1))
    assert isinstance(expand, Beam)
    return min(len(slots), batch * expand.width * (rule.levels - 1))


def _with_room(proposed: DraftTrees, rule: TreeRule, first: FirstLevel) -> DraftTrees:
    """Return the proposed trees with room for all that a rule may add."""
    count = len(proposed)
    parents = proposed.batch + most_expanded(rule, proposed.batch, first.slots)
    trees = DraftTrees.with_room(proposed.batch, count + parents * first.level.k)
    trees.ints[:, :count] = proposed.ints[:, :count]
    trees.floats[:, :count] = proposed.floats[:, :count]
    trees.set_length(count)
    return trees


def _trees(trees: DraftTrees) -> Structure:
    room = trees.ints.shape[1]
    return Trees(len(trees), trees.batch, room, address(trees.ints), address(trees.floats))
