"""Weights in the kernels' form: packed bf16 or fp32 panels, or quants as they are stored."""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable, Sequence
from ctypes import c_void_p
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from smart_decoding.kernels import abi, library

PAST_CACHES, INTO_L2, INTO_CACHES = 0, 2, 3  # as in panels.h
NEVER, ALWAYS, IF_FASTER = 0, 1, 2  # as in abi.h: when inputs of quants are rounded to 8 bits
# As in abi.h. A tensor in another format is expanded to bf16 when it is read.
FORMATS = (
    *("BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "MXFP4"),
)

Weight = abi.structure("Weight")
_lib = library.library


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A matrix [n, k] in blocks, as a GGUF file holds it. rows: uint8 [n, bytes], each row's
    blocks; format: one of FORMATS."""

    rows: NDArray[np.uint8]
    format: str
    k: int

    @property
    def shape(self) -> tuple[int, int]:
        """[n, k]."""
        return len(self.rows), self.k

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> QuantizedTensor:
        """Return some of its rows, still quantised."""
        return QuantizedTensor(self.rows[rows], self.format, self.k)

    def dequantize(self) -> Tensor:
        """Return the matrix [n, k] in bfloat16: dequantised in float32, then rounded."""
        from gguf import GGMLQuantizationType, dequantize  # imported late: it is slow

        floats = dequantize(self.rows, GGMLQuantizationType[self.format])
        return torch.from_numpy(floats).to(torch.bfloat16)


Matrix = Tensor | QuantizedTensor


@functools.cache
def fastest_hint() -> int:
    """Measure and return the fastest target of prefetches. Examples: Intel's prefetchnta, past the
    caches, had a third of the others' speed; Zen 4 reads a tenth faster into its second cache than
    into the first."""
    # not zeros: untouched pages would all be one page, in the caches
    memory = torch.ones(64 << 20, dtype=torch.uint8)
    seconds = dict.fromkeys((PAST_CACHES, INTO_L2, INTO_CACHES), float("inf"))
    for hint in tuple(seconds) * 6:
        seconds[hint] = min(seconds[hint], read_seconds(memory, hint))
    within_noise = 1.03 * min(seconds.values())
    return next(hint for hint, taken in seconds.items() if taken <= within_noise)


def read_seconds(memory: Tensor, hint: int) -> float:
    """Return the seconds of reading `memory` as weights are read."""
    start = time.perf_counter()
    _lib().smart_read(memory, len(memory), hint, torch.get_num_threads())
    return time.perf_counter() - start


class Arena:
    """Memory for packed weights, on huge pages where the system grants them (TLB misses cost 20 %).
    It grows a block at a time.

    size: bytes expected in all. in_bytes: when inputs of quants are rounded to 8 bits: NEVER,
    ALWAYS, or IF_FASTER, for models that only draft. cached: strips that were packed before, in the
    same order. hint: the cache that forwards prefetch weights into. Weights larger than the caches
    go past them, where that is as fast: other data then stays cached."""

    HUGE, CACHES, BLOCK = 2 << 20, 32 << 20, 64 << 20

    def __init__(self, size: int, in_bytes: int = NEVER, cached: Tensor | None = None) -> None:
        self.in_bytes = in_bytes
        self.strips: list[Tensor] = []  # all strips, packed now or cached
        self.all_cached = True
        self.nbytes = 0  # bytes of all weights in it
        self._cached = cached
        self.hint = fastest_hint() if size > self.CACHES else INTO_CACHES
        self._left = size
        self._free = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> Tensor:
        """Return the next bytes: uint8 [size], aligned to 64."""
        size += -size % 64
        if size > len(self._free):
            self._free = self._block(max(size, min(self._left, self.BLOCK)))
        self._left -= size
        self.nbytes += size
        taken = self._free[:size]
        self._free = self._free[size:]
        return taken

    def take_strips(self, size: int, pack_into: Callable[[Tensor], None], sample: int) -> Tensor:
        """Return the next `size` bytes, filled by `pack_into`. Kept ones are returned instead if
        their first `sample` bytes equal its output."""
        size += -size % 64
        memory = self._next_cached(size)
        if memory is not None:
            first = torch.empty(sample, dtype=torch.uint8)
            pack_into(first)
            if not torch.equal(first, memory[:sample]):
                memory = None
        if memory is None:
            self._cached = None
            self.all_cached = False
            memory = self.take(size)
            pack_into(memory)
        else:
            self.nbytes += size
        self.strips.append(memory)
        return memory

    def _next_cached(self, size: int) -> Tensor | None:
        if self._cached is None or len(self._cached) < size:
            return None
        memory = self._cached[:size]
        self._cached = self._cached[size:]
        return memory

    def _block(self, size: int) -> Tensor:
        block = torch.empty(size + 2 * self.HUGE, dtype=torch.uint8)
        start = -block.data_ptr() % self.HUGE
        whole = size // self.HUGE * self.HUGE
        if whole:  # 14 = MADV_HUGEPAGE; only advice, so the result does not matter
            madvise = ctypes.CDLL(None).madvise
            madvise(c_void_p(block.data_ptr() + start), ctypes.c_size_t(whole), 14)
        return block[start : start + size]


class PackedWeight:
    """A weight [n, k] in the kernels' form. struct: their structure; nbytes: bytes that a forward
    reads; is_bf16: whether it is bf16, or quants that are widened to it, else fp32."""

    def __init__(self, shape: tuple[int, int], is_bf16: bool, memory: Tensor) -> None:
        self.n, self.k = shape
        self.is_bf16 = is_bf16
        self.nbytes = len(memory)
        self.struct = Weight()
        self.memory = memory
        self._alive: list[object] = []

    @property
    def address(self) -> int:
        """Address of the structure, valid as long as this object lives."""
        return ctypes.addressof(self.struct)

    def rows_of(self, index: Tensor) -> Tensor:
        """Return its rows at `index` (int64 [n]) as float32 [n, k]. Tied embeddings need no second
        copy so."""
        out = torch.empty(len(index), self.k)
        _lib().smart_unpack(self.address, self.k, self.is_bf16, index, len(index), out)
        return out


def pack(
    parts: Sequence[Matrix], arena: Arena | None = None, order: NDArray[np.int64] | None = None
) -> PackedWeight:
    """Pack the stacked rows of `parts` ([n, k] each, k even), tensors all in bf16 or in fp32.

    order: the row for each place (-1: a row of zeros), or None for the order of `parts`. Quants
    stay quants if the rows of each vector have one format; else all rows become bf16."""
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if len(tensors) == len(parts):
        return _pack_panels(tensors, order, arena)
    addresses, formats = _rows_of(parts)
    places = np.arange(sum(map(len, parts))) if order is None else order
    padded = np.full(packed_rows(len(places)), -1)
    padded[: len(places)] = places
    of_rows = formats[padded].reshape(-1, vector_width())
    of_strips = of_rows.max(axis=1)
    if len(places) and (padded[-vector_width() :] < 0).all():
        of_strips[-1] = of_strips[-2]  # the last strip only fills up a panel
    if ((of_rows != of_strips[:, None]) & (padded.reshape(of_rows.shape) >= 0)).any():
        return _pack_panels([as_tensor(part) for part in parts], order, arena)
    rows = np.where(padded < 0, 0, addresses[padded])
    return _pack_strips(rows, of_strips, (len(places), parts[0].shape[1]), arena)


def as_tensor(matrix: Matrix) -> Tensor:
    """Return a matrix as a tensor, bfloat16 if it was quantised."""
    return matrix if isinstance(matrix, Tensor) else matrix.dequantize()


def _pack_panels(
    parts: Sequence[Tensor], order: NDArray[np.int64] | None, arena: Arena | None
) -> PackedWeight:
    weight = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    if order is not None:
        weight = F.pad(weight, (0, 0, 0, 1))[torch.from_numpy(order)]  # the last row is of zeros
    n, k = weight.shape
    size = packed_rows(n) * k * weight.element_size()
    memory = (arena or Arena(size)).take(size)[:size]
    packed = PackedWeight((n, k), weight.dtype == torch.bfloat16, memory)
    weight = weight.contiguous()
    _lib().smart_pack(weight, n, k, memory, packed.is_bf16)
    packed.struct.panels = memory.data_ptr()
    return packed


def _pack_strips(
    rows: NDArray[np.int64],
    formats: NDArray[np.int64],
    shape: tuple[int, int],
    arena: Arena | None,
) -> PackedWeight:
    """Pack quants. rows: address of each row, 0 for zeros; formats: format of each strip."""
    k = shape[1]
    sizes = np.array([_lib().smart_strip_bytes(i, k) for i in range(len(FORMATS))])[formats]
    size = int(sizes.sum())
    arena = arena or Arena(size)
    as_bytes = bool(_lib().smart_multiplies_bytes() and formats.all())
    in_bytes = arena.in_bytes if as_bytes else NEVER
    starts = np.cumsum(sizes) - sizes
    strips = np.empty((len(formats), 2), np.int64)
    strips[:, 1] = formats

    def pack_into(memory: Tensor) -> None:
        strips[:, 0] = memory.data_ptr() + starts
        whole = int(np.searchsorted(starts, len(memory)))
        _lib().smart_pack_quants(strips, whole, rows, k, in_bytes)

    memory = arena.take_strips(size, pack_into, int(sizes[:2].sum()))  # the first panel
    strips[:, 0] = memory.data_ptr() + starts
    packed = PackedWeight(shape, True, memory)
    packed.struct.strips = strips.ctypes.data
    packed.struct.in_bytes = in_bytes
    packed._alive.append(strips)
    return packed


def _rows_of(parts: Sequence[Matrix]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the address and the format of each row of stacked parts, and of a row of zeros after
    them."""
    addresses = []
    formats = []
    for part in parts:
        if isinstance(part, Tensor):
            start, step = part.data_ptr(), part.stride(0) * part.element_size()
            row_format = "BF16"
        else:
            start, step = part.rows.ctypes.data, part.rows.strides[0]
            row_format = part.format
        addresses.append(start + step * np.arange(len(part)))
        formats.append(np.full(len(part), FORMATS.index(row_format)))
    return np.concatenate([*addresses, [0]]), np.concatenate([*formats, [0]])


def interleaved(n: int) -> NDArray[np.int64]:
    """Return the row order in which two stacked matrices [n, k] alternate in blocks of one vector:
    gate, up, gate, ... (the kernels multiply them in registers)."""
    lanes = vector_width()
    first = np.arange(n + -n % lanes)
    first[n:] = -1
    second = np.where(first < 0, -1, first + n)
    return np.stack([first.reshape(-1, lanes), second.reshape(-1, lanes)], axis=1).reshape(-1)


def pack_bytes(weight: Tensor) -> tuple[PackedWeight, Tensor, Tensor]:
    """Pack a weight [n, k] (k a multiple of 4) in 8 bits, with one scale for each row. Return it,
    its scales, and the sums of the integers, [packed_rows(n)] each."""
    n, k = weight.shape
    weight = weight.float().contiguous()
    size = packed_rows(n)
    memory = Arena(size * k).take(size * k)[: size * k]
    scale = torch.empty(size)
    sums = torch.empty(size, dtype=torch.int32)
    _lib().smart_pack_bytes(weight, n, k, memory, scale, sums)
    packed = PackedWeight((n, k), False, memory)
    packed.struct.panels = memory.data_ptr()
    return packed, scale, sums


def replace_rows(packed: PackedWeight, at: Tensor, new: PackedWeight) -> None:
    """Write the rows of `new`, tensors or bytes packed alike, to the places `at` [n] of `packed`.

    A panel has four bytes of each of its rows, then the next four."""
    lanes = packed_rows(1)
    source, target = (
        each.memory.view(packed_rows(each.n) // lanes, -1, lanes, 4)
        .transpose(1, 2)
        .view(torch.int32)
        for each in (new, packed)
    )
    first = torch.arange(len(at))
    target[at // lanes, at % lanes] = source[first // lanes, first % lanes]


def packed_rows(n: int) -> int:
    """Return the rows of a packed weight: n rounded up to whole panels."""
    return int(_lib().smart_packed_rows(n))


def vector_width() -> int:
    """Return the number of floats in a vector register of the kernels that run."""
    return int(_lib().smart_vector_width())
