"""`core.policies.chooser` in C++ (selection.cpp): one call where numpy needs dozens, or one for a
whole drafting."""

from __future__ import annotations

from ctypes import Structure, byref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smart_decoding.core.calibration import DEPTHS, FINE, FINE_OF, KINDS
from smart_decoding.core.tree import DraftTrees, FloatArray, IntArray
from smart_decoding.engine.protocols import Grown
from smart_decoding.kernels import abi, library
from smart_decoding.kernels.memory import address, address_or_none

if TYPE_CHECKING:
    from smart_decoding.core.lookahead import LookAhead
    from smart_decoding.core.policies.chooser import Drafted, Growth

_NONE = np.zeros(0, np.int64)
_TABLE_TOO_SMALL = -1  # nodes of a drafter that the calibration has no cells for yet


Trees = abi.structure("Trees")
Costs = abi.structure("Costs")
Choice = abi.structure("Choice")
_Calibration = abi.structure("Calibration")
_Growth = abi.structure("Growth")


@dataclass(frozen=True, slots=True)
class FirstLevel:
    """The head's part of smart_grow: how its first level runs, and what further levels need.

    head, rows, level: as smart_draft takes them. keys, values: the head's cache. slots: where the
    keys of expanded nodes go. scale: [batch] on the logits, and noise: [batch, levels] its keys, as
    for smart_top_k, or None."""

    head: Structure
    rows: Structure
    level: Structure
    hidden: int
    bf16: bool
    keys: Tensor
    values: Tensor
    slots: range
    scale: NDArray[np.float32] | None
    noise: NDArray[np.uint64] | None


class NativeChooser:
    """Implements `core.policies.chooser.Chooser`. Raises ConfigError where no kernels run;
    its methods raise ValueError for trees whose arrays it cannot read.

    A frontier that is empty is followed by the choice of what to verify, so both come of one call.
    What stays as it is during a round is handed over once."""

    grows = True

    def __init__(self) -> None:
        self._library = library.library()
        self._trees = Trees()
        self._costs = Costs()
        self._choice = Choice()
        self._calibration = _Calibration(
            None, 0, address(FINE_OF), len(FINE_OF) - 1, FINE, DEPTHS, KINDS
        )
        self._structs = byref(self._trees), byref(self._calibration), byref(self._costs)
        self._make_room(256)
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
        """See `Chooser`."""
        self._hand_over(drafted)
        found = self._call(
            self._library.smart_frontier,
            drafted,
            level,
            address(ahead.below(level, levels)),
            levels,
            address(widths),
            len(widths),
            address(level_seconds),
            address(self._expanded),
            drafted.least,
            address(self._kept),
        )
        self._stopped = -1 if found else len(drafted.trees)
        return self._expanded[:found].copy() if found else _NONE

    def select(self, drafted: Drafted) -> tuple[IntArray, float, float]:
        """See `Chooser`."""
        if drafted is not self._round or self._stopped != len(drafted.trees):
            self._hand_over(drafted)
            self._call(self._library.smart_select, drafted, drafted.least, address(self._kept))
        choice = self._choice
        return self._kept[: choice.count].copy(), choice.rate, choice.expected

    def grow(self, growth: Growth, first: FirstLevel) -> Grown:
        """Grows a round's trees and chooses what to verify.

        Raises RuntimeError where the kernels do not serve the head."""
        drafted = growth.drafted
        levels = growth.levels
        batch = drafted.trees.batch
        parents = batch + most_expanded(growth, first.slots)
        drafted.trees = DraftTrees.with_room(batch, parents * first.level.k)
        if not len(drafted.calibration.table):
            drafted.calibration.reserve(0)
        self._hand_over(drafted)
        self._set_table(drafted)
        below = growth.ahead.table(levels, growth.reach)
        expanded = np.zeros(levels, np.int64)
        seconds = np.zeros(levels + 1)  # of each level, and of choosing
        levels_run = self._library.smart_grow(
            byref(first.head),
            byref(first.rows),
            byref(first.level),
            byref(_growth(growth, first, below, expanded, seconds)),
            *self._structs,
            address(self._expanded),
            address(self._kept),
            byref(self._choice),
        )
        if levels_run < 0:
            raise RuntimeError("the CPU kernels do not support this head")
        drafted.trees.grown(self._trees.nodes)
        drafted.scored = self._stopped = len(drafted.trees)
        return Grown(
            drafted.trees,
            expanded[1:levels_run].tolist(),
            seconds[:levels_run].tolist(),
            float(seconds[levels]),
        )

    def _hand_over(self, drafted: Drafted) -> None:
        trees = drafted.trees
        to_trees = self._trees
        to_costs = self._costs
        if drafted is not self._round:
            self._round = drafted
            self._stopped = -1
            to_trees.batch = trees.batch
            to_trees.limits = address(drafted.limits)
            to_trees.kind = address(drafted.kind)
            to_trees.ends = address(drafted.ends)
            to_trees.end_count = len(drafted.ends)
            to_costs.tokens = drafted.tokens
            to_costs.limit = drafted.limit
        to_trees.nodes = len(trees)
        to_trees.room = trees.ints.shape[1]
        to_trees.ints = address(trees.ints)
        to_trees.floats = address(trees.floats)
        to_costs.sunk = drafted.sunk
        to_costs.verify = address(drafted.verify)
        to_costs.verify_count = len(drafted.verify)
        if to_trees.room > len(self._kept):
            self._make_room(2 * to_trees.room)

    def _make_room(self, nodes: int) -> None:
        self._kept = np.zeros(nodes, np.int64)
        self._expanded = np.zeros(nodes, np.int64)

    def _set_table(self, drafted: Drafted) -> None:
        table = drafted.calibration.table
        self._calibration.table = address(table)
        self._calibration.cells = len(table)

    def _call(self, function: Any, drafted: Drafted, *arguments: Any) -> int:
        """Calls smart_frontier or smart_select, again once the calibration has cells for all."""
        scored = drafted.scored == len(drafted.trees)
        for _ in range(2):
            self._set_table(drafted)
            count: int = function(*self._structs, scored, *arguments, byref(self._choice))
            if count != _TABLE_TOO_SMALL:
                return count
            drafted.calibration.reserve(int(drafted.trees.source.max()))
        raise ValueError("the trees' depths or sources are out of range")


def most_expanded(growth: Growth, slots: range) -> int:
    """How many nodes a growth may run below the first level, with `slots` for their keys."""
    return min(len(slots), int(growth.widths[-1]) * (growth.levels - 1))


def _growth(
    growth: Growth, first: FirstLevel, below: FloatArray, expanded: IntArray, seconds: FloatArray
) -> Structure:
    """The structure of a growth, whose results smart_grow writes to `expanded` and `seconds`."""
    return _Growth(
        levels=growth.levels,
        reach=growth.reach,
        widths_count=len(growth.widths),
        least=growth.drafted.least,
        widths=address(growth.widths),
        level_seconds=address(growth.level_seconds),
        below=address(below),
        hidden=first.hidden,
        first_slot=first.slots.start,
        slots=len(first.slots),
        scale=address_or_none(first.scale),
        noise=address_or_none(first.noise),
        keys=first.keys.data_ptr(),
        values=first.values.data_ptr(),
        pages=first.keys.shape[-3],
        w_bf16=first.bf16,
        kv_bf16=first.keys.dtype == torch.bfloat16,
        threads=torch.get_num_threads(),
        expanded=address(expanded),
        seconds=address(seconds),
        choosing=address(seconds) + seconds.itemsize * growth.levels,
    )


def native_chooser() -> NativeChooser | None:
    """The native chooser, or None where there are no kernels."""
    return NativeChooser() if library.unavailable() is None else None
