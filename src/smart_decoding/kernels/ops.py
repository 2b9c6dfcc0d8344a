"""The CPU kernels as Python functions. Tensors are contiguous, on the CPU, and float32 where not
said otherwise."""

from __future__ import annotations

import ctypes
import functools
import time
from ctypes import Array, Structure, byref, c_void_p

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smart_decoding.engine.kv import PAGE
from smart_decoding.kernels import abi, library

HEAD_DIMS = (16, 32, 64, 96, 128)
PAST_CACHES, INTO_L2, INTO_CACHES = 0, 2, 3  # as in vectors.h
MAX_QUERIES = 32  # query heads per key head


Rows = abi.structure("Rows")
Layer = abi.structure("Layer")
Workspace = abi.structure("Workspace")
Head = abi.structure("Head")
Model = abi.structure("Model")
Pass = abi.structure("Pass")
Round = abi.structure("Round")
Level = abi.structure("Level")
_lib = library.library


def vector_width() -> int:
    """Floats in a vector register of the kernels that run."""
    return int(_lib().smart_vector_width())


def pass_rows(bf16: bool) -> int:
    """Rows that share a pass over the weights of a linear layer: one more costs a step."""
    return int(_lib().smart_pass_rows(bf16))


def rounds_inputs() -> bool:
    """Do linear layers with bf16 weights round what they read to bf16? (True on CPUs with bf16
    instructions.)"""
    return bool(_lib().smart_rounds_inputs())


def attends_by_pairs(bf16: bool, head_dim: int) -> bool:
    """Do keys and values of a page lie in pairs?"""
    return bool(_lib().smart_attends_by_pairs(bf16, head_dim))


@functools.cache
def fastest_hint() -> int:
    """Where memory is best prefetched to, as measured. Intel's prefetchnta, past the caches, was
    seen at a third of the speed of the others; Zen 4 reads a tenth faster into its second cache
    than into the first."""
    # not zeros: untouched pages would all be one page, in the caches
    memory = torch.ones(64 << 20, dtype=torch.uint8)
    seconds = dict.fromkeys((PAST_CACHES, INTO_L2, INTO_CACHES), float("inf"))
    for hint in tuple(seconds) * 6:
        start = time.perf_counter()
        _lib().smart_read(memory.data_ptr(), len(memory), hint, torch.get_num_threads())
        seconds[hint] = min(seconds[hint], time.perf_counter() - start)
    within_noise = 1.03 * min(seconds.values())
    return next(hint for hint, taken in seconds.items() if taken <= within_noise)


class Arena:
    """One block of memory for all packed weights, on huge pages where the kernel grants them (TLB
    misses cost 20 %).

    hint: where forwards prefetch them to. What does not fit into caches anyway had better go past
    them, where that is as fast: other weights and Python then stay there."""

    HUGE, CACHES = 2 << 20, 32 << 20

    def __init__(self, elements: int, dtype: torch.dtype) -> None:
        size = torch.empty((), dtype=dtype).element_size()
        self.hint = fastest_hint() if elements * size > self.CACHES else INTO_CACHES
        block = torch.empty(elements + 2 * self.HUGE // size, dtype=dtype)
        start = (-block.data_ptr() % self.HUGE) // size
        self._free = block[start : start + elements]
        length = elements * size // self.HUGE * self.HUGE
        if length:  # 14 = MADV_HUGEPAGE; only advice, so the result does not matter
            madvise = ctypes.CDLL(None).madvise
            madvise(c_void_p(self._free.data_ptr()), ctypes.c_size_t(length), 14)

    def take(self, elements: int) -> Tensor:
        """The next elements of the block."""
        tensor = self._free[:elements]
        self._free = self._free[elements:]
        return tensor


def packed_rows(n: int) -> int:
    """Rows of a packed weight: n rounded up to whole panels."""
    return int(_lib().smart_packed_rows(n))


def pack(weight: Tensor, out: Tensor) -> Tensor:
    """Packs weight [n, k] (bf16 or fp32, k even) into `out` [packed_rows(n) * k]."""
    n, k = weight.shape
    weight = weight.contiguous()
    _lib().smart_pack(weight.data_ptr(), n, k, out.data_ptr(), weight.dtype == torch.bfloat16)
    return out


def unpack(packed: Tensor, k: int, index: Tensor) -> Tensor:
    """Rows `index` (int64 [n]) of a packed weight of row length k: float32 [n, k]."""
    out = torch.empty(len(index), k)
    _lib().smart_unpack(
        packed.data_ptr(),
        k,
        packed.dtype == torch.bfloat16,
        index.data_ptr(),
        len(index),
        out.data_ptr(),
    )
    return out


def linear(
    x: Tensor,
    packed: Tensor,
    n: int,
    norm: tuple[Tensor, float] | None = None,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    best: NDArray[np.int64] | None = None,
    hint: int = INTO_CACHES,
) -> Tensor:
    """rms_norm(x) @ weight.T + bias for x [rows, k]; norm ([k] and eps) and bias [n] are
    optional. Returns [rows, n].

    `best` [rows], if given, receives what `argmax` says of the result. An empty `out` is left so:
    `best` alone is wanted. hint: see Arena."""
    rows, k = x.shape
    y = torch.empty(rows, n) if out is None else out
    scratch = torch.empty(rows, k)
    norm_weight, eps = norm or (None, 0.0)
    _lib().smart_linear(
        x.data_ptr(),
        rows,
        packed.data_ptr(),
        n,
        k,
        packed.dtype == torch.bfloat16,
        pointer(norm_weight),
        eps,
        pointer(bias),
        scratch.data_ptr(),
        y.data_ptr() if y.numel() else None,
        n,
        0,
        hint,
        None if best is None else best.ctypes.data,
        torch.get_num_threads(),
    )
    return y


def layers(
    weights: Array[Structure],
    rows: Structure,
    inputs: Tensor | None,
    x: Tensor,
    cache: tuple[Tensor, Tensor],
    workspace: Structure,
    bf16: bool,
) -> None:
    """Decoder layers in place on x [rows, hidden], writing the rows' keys and values to the caches
    [layers, ...].

    Layer one reads `inputs` where given."""
    keys, values = cache
    status = _lib().smart_layers(
        weights,
        len(weights),
        byref(rows),
        pointer(inputs),
        x.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        keys.shape[-3],
        byref(workspace),
        bf16,
        keys.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    if status:
        raise RuntimeError("the CPU kernels do not support this layer")


def forward(model: Structure, rows: Structure, what: Structure) -> None:
    """A whole model, from token ids to logits and their maxima."""
    if _lib().smart_forward(byref(model), byref(rows), byref(what), torch.get_num_threads()):
        raise RuntimeError("the CPU kernels do not support this model")


def verify_round(model: Structure, round: Structure, what: Structure) -> bool:
    """The verification of a round (round.cpp). False where rounding would decide a token: then the
    forward is all that was done."""
    status = _lib().smart_round(byref(model), byref(round), byref(what), torch.get_num_threads())
    if status > 0:
        raise RuntimeError("the CPU kernels do not support this model")
    return bool(status == 0)


def pack_bytes(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """weight [n, k] (k a multiple of 4) in 8 bits, one scale for each row: packed [packed_rows(n) *
    k], scales, and sums of the integers, [packed_rows(n)] each."""
    n, k = weight.shape
    weight = weight.float().contiguous()
    size = packed_rows(n)
    packed = Arena(size * k, torch.int8).take(size * k)
    scale = torch.empty(size)
    sums = torch.empty(size, dtype=torch.int32)
    _lib().smart_pack_bytes(
        weight.data_ptr(), n, k, packed.data_ptr(), scale.data_ptr(), sums.data_ptr()
    )
    return packed, scale, sums


def draft(
    head: Structure, rows: Structure, level: Structure, cache: tuple[Tensor, Tensor], bf16: bool
) -> None:
    """One level of a draft head: writes the rows' keys and values to the caches [1, ...], and what
    `level` names."""
    keys, values = cache
    status = _lib().smart_draft(
        byref(head),
        byref(rows),
        byref(level),
        keys.data_ptr(),
        values.data_ptr(),
        keys.shape[-3],
        bf16,
        keys.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    if status:
        raise RuntimeError("the CPU kernels do not support this head")


def move_kv(keys: Tensor, values: Tensor, source: Tensor, target: Tensor) -> None:
    """Copies cache slots source[i] -> target[i] (int32) in every plane of keys/values [..., pages,
    head_dim, PAGE]."""
    if not (source.is_contiguous() and target.is_contiguous()):
        raise ValueError("slots to move must be contiguous")
    pages, head_dim = keys.shape[-3:-1]
    planes = keys.numel() // (pages * head_dim * PAGE)
    _lib().smart_move_kv(
        keys.data_ptr(),
        values.data_ptr(),
        planes,
        pages,
        head_dim,
        keys.element_size(),
        source.data_ptr(),
        target.data_ptr(),
        len(source),
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, column: int = 0) -> None:
    """rms_norm of x [rows, d] into columns column .. column + d of out [rows, width]."""
    _lib().smart_rms_norm(
        x.data_ptr(),
        weight.data_ptr(),
        eps,
        len(x),
        x.shape[1],
        out.data_ptr() + 4 * column,
        out.shape[1],
    )


def pointer(tensor: Tensor | None) -> int | None:
    """The address of a tensor's first element, or None of None: a null pointer."""
    return None if tensor is None else tensor.data_ptr()
