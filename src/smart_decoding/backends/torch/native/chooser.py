"""`core.policies.chooser` in C++ (controller.cpp): one call where numpy needs dozens."""

from __future__ import annotations

from ctypes import POINTER, Structure, byref, c_double, c_int, c_int64, c_void_p
from typing import Any

import numpy as np

from smart_decoding.backends.torch.native import build
from smart_decoding.core.calibration import DEPTHS, FINE, FINE_OF, KINDS
from smart_decoding.core.lookahead import LookAhead
from smart_decoding.core.policies.chooser import Drafted
from smart_decoding.core.tree import FloatArray, IntArray

_NONE = np.zeros(0, np.int64)
_UNSEEN = -1  # the trees hold nodes of a drafter that the calibration has not seen yet


class TreesStruct(Structure):
    """`Trees` of controller.cpp."""

    _fields_ = [
        *((name, c_int64) for name in ("nodes", "batch")),
        *((name, c_void_p) for name in ("owner", "token", "parent", "depth", "source", "draft_prob", "accept_prob")),
        *((name, c_void_p) for name in ("limits", "kind", "ends")),
        ("end_count", c_int64),
    ]


class BeliefsStruct(Structure):
    """`Beliefs`."""

    _fields_ = [
        *(("table", c_void_p), ("cells", c_int64), ("fine", c_void_p)),
        *((name, c_int64) for name in ("resolution", "bins", "depths", "kinds")),
    ]


class PricesStruct(Structure):
    """`Prices`."""

    _fields_ = [
        *((name, c_double) for name in ("tokens", "sunk", "limit")),
        *(("verify", c_void_p), ("verify_count", c_int64)),
    ]


class NativeChooser:
    """Implements `core.policies.chooser.Chooser`. Raises OSError where the kernels cannot be built; its methods raise
    ValueError for trees whose arrays it cannot read."""

    def __init__(self) -> None:
        lib = build.library()
        structs = [POINTER(TreesStruct), POINTER(BeliefsStruct), POINTER(PricesStruct)]
        self._frontier, self._select = lib.smart_frontier, lib.smart_select
        self._frontier.restype = self._select.restype = c_int64
        self._frontier.argtypes = [
            *(*structs, c_int, c_int64, c_void_p, c_int64),
            *(c_void_p, c_int64, c_void_p, c_void_p),
        ]
        self._select.argtypes = [*structs, c_int, c_int64, c_void_p, POINTER(c_double), POINTER(c_double)]
        self._trees = TreesStruct()
        self._beliefs = BeliefsStruct(None, 0, _at(FINE_OF), len(FINE_OF) - 1, FINE, DEPTHS, KINDS)
        self._prices = PricesStruct()
        self._rate, self._expected = c_double(), c_double()

    def frontier(
        self, drafted: Drafted, ahead: LookAhead, level: int, levels: int, widths: IntArray, level_seconds: FloatArray
    ) -> IntArray:
        below, out = ahead.below(level, levels), np.empty(len(drafted.trees), np.int64)
        asked = (level, _at(below), levels, _at(widths), len(widths), _at(level_seconds), _at(out))
        count = self._asked(self._frontier, drafted, asked)
        return out[:count] if count else _NONE

    def select(self, drafted: Drafted, least: int) -> tuple[IntArray, float, float]:
        out = np.empty(len(drafted.trees), np.int64)
        count = self._asked(self._select, drafted, (least, _at(out), byref(self._rate), byref(self._expected)))
        return out[:count], self._rate.value, self._expected.value

    def _asked(self, function: Any, drafted: Drafted, asked: tuple[Any, ...]) -> int:
        d, trees = drafted, drafted.trees
        t, p, b = self._trees, self._prices, self._beliefs
        t.nodes, t.batch, t.owner, t.token = len(trees), trees.batch, _at(trees.owner), _at(trees.token)
        t.parent, t.depth, t.source = _at(trees.parent), _at(trees.depth), _at(trees.source)
        t.draft_prob, t.accept_prob = _at(trees.draft_prob), _at(trees.accept_prob)
        t.limits, t.kind, t.ends, t.end_count = _at(d.limits), _at(d.kind), _at(d.ends), len(d.ends)
        p.tokens, p.sunk, p.limit = d.tokens, d.sunk, d.limit
        p.verify, p.verify_count = _at(d.verify), len(d.verify)
        scored = d.scored == len(trees)
        for _ in range(2):
            table = d.calibration.table
            b.table, b.cells = _at(table), len(table)
            count: int = function(byref(t), byref(b), byref(p), scored, *asked)
            if count != _UNSEEN:
                return count
            d.calibration.reserve(int(trees.source.max()))
        raise ValueError("the trees' depths or sources are out of range")


def native_chooser() -> NativeChooser | None:
    """The native chooser, or None where there is no compiler."""
    return NativeChooser() if build.unavailable() is None else None


def _at(array: Any) -> int:
    """Where an array lies. Raises ValueError if its elements do not lie next to each other."""
    interface = array.__array_interface__
    if interface["strides"] is not None:
        raise ValueError("the arrays of trees must be contiguous")
    address: int = interface["data"][0]
    return address
