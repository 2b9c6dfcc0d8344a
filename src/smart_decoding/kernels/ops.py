"""The CPU kernels as Python functions. Tensors are contiguous, on the CPU, and float32 unless
documented otherwise."""

from __future__ import annotations

from ctypes import Structure, byref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smart_decoding.engine.kv import PAGE
from smart_decoding.kernels import abi, library
from smart_decoding.kernels.memory import address, pointer

if TYPE_CHECKING:
    from smart_decoding.core.tree import IntArray
    from smart_decoding.engine.rows import Rows
    from smart_decoding.kernels.weights import PackedWeight

HEAD_DIMS = (16, 32, 64, 96, 128, 256)
MAX_QUERIES = 32  # query heads per key head
MOST_INPUTS = 8  # of a convolution, as in delta.h
COLUMNS = 16  # of a recurrent state that lie next to each other, as in abi.h
KEYS = 4  # heads of linear attention have a multiple of so many key dimensions


_Rows = abi.structure("Rows")
Layer = abi.structure("Layer")
Head = abi.structure("Head")
Drafter = abi.structure("Drafter")
Model = abi.structure("Model")
Pass = abi.structure("Pass")
Round = abi.structure("Round")
Level = abi.structure("Level")
Delta = abi.structure("Delta")
States = abi.structure("States")
_lib = library.library


def native_rows(rows: Rows, cosine: Tensor, sine: Tensor) -> Structure:
    """Return the kernels' structure of the rows. cosine, sine: tables [positions, angles]."""
    arrays = (
        rows.query_start_loc,
        rows.block_table_start,
        rows.pages,
        rows.slot_mapping,
        rows.context_len,
        rows.ancestors_start,
        rows.ancestors,
        rows.position,
    )
    groups = len(rows.query_start_loc) - 1
    tables = cosine.data_ptr(), sine.data_ptr()
    states = rows.states
    struct = _Rows(
        len(rows), groups, *map(address, arrays), *tables, cosine.shape[1], pointer(states)
    )
    struct.keep = *arrays, cosine, sine, states  # the targets of its pointers
    return struct


def pass_rows(packed: PackedWeight) -> int:
    """Return how many rows share a pass over a weight: beyond them the time rises by a step."""
    return int(_lib().smart_pass_rows(packed.address, packed.is_bf16))


def multiplies_bytes() -> bool:
    """Return whether quants can be multiplied with inputs rounded to 8 bits, as with AVX2 or
    i8mm."""
    return bool(library.load(library.chosen()).smart_multiplies_bytes())


def multiply(x: Tensor, packed: PackedWeight, out: Tensor, hint: int) -> None:
    """Write x weight^T, x [rows, k], to out [rows, n]. hint: see Arena."""
    rows, k = x.shape
    weight = (packed.address, packed.n, k, packed.is_bf16)
    nothing = (None, 0.0, None)  # norm and bias
    result = (out, packed.n, False, hint, None)
    _lib().smart_linear(x, rows, *weight, *nothing, x, *result, torch.get_num_threads())


def forward(model: Structure, rows: Structure, forward_pass: Structure) -> None:
    """Run a whole model, from token ids to logits and their maxima."""
    threads = torch.get_num_threads()
    if _lib().smart_forward(byref(model), byref(rows), byref(forward_pass), threads):
        raise RuntimeError("the CPU kernels do not support this model")


def verify_round(model: Structure, round: Structure, forward_pass: Structure) -> bool:
    """Verify a round (round.cpp). Return False where rounding would decide a token: then only the
    forward was run."""
    threads = torch.get_num_threads()
    status = _lib().smart_round(byref(model), byref(round), byref(forward_pass), threads)
    if status > 0:
        raise RuntimeError("the CPU kernels do not support this model")
    return bool(status == 0)


def advance(
    model: Structure,
    nodes: Tensor,
    count: int,
    states: IntArray,
    path: IntArray,
    accepted: IntArray,
) -> None:
    """Have accepted nodes wait for their requests' next forward; see smart_advance."""
    threads = torch.get_num_threads()
    _lib().smart_advance(byref(model), nodes, count, len(states), states, path, accepted, threads)


def draft(
    head: Structure, rows: Structure, level: Structure, cache: tuple[Tensor, Tensor], bf16: bool
) -> None:
    """Run one level of a draft head: write the rows' keys and values to the caches [1, ...], and
    the outputs that `level` points to."""
    keys, values = cache
    inputs = (byref(head), byref(rows), byref(level), keys, values, keys.shape[-3], bf16)
    if _lib().smart_draft_level(*inputs, keys.dtype == torch.bfloat16, torch.get_num_threads()):
        raise RuntimeError("the CPU kernels do not support this head")


def move_kv(keys: Tensor, values: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy cache slots source[i] -> target[i] (int32) in every plane of keys/values [..., pages,
    head_dim, PAGE]."""
    if not (source.is_contiguous() and target.is_contiguous()):
        raise ValueError("slots to move must be contiguous")
    pages, head_dim = keys.shape[-3:-1]
    planes = keys.numel() // (pages * head_dim * PAGE)
    size = keys.element_size()
    _lib().smart_move_kv(keys, values, planes, pages, head_dim, size, source, target, len(source))
