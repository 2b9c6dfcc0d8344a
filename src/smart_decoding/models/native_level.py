"""A level of an EAGLE-3 head of one layer as one call of the CPU kernels: features and tokens in,
ranked children out.

A head in bf16 has its output matrix in 8 bits (a scale for each token): it is half of what a level
reads, and proposals may be off by a little, since no answer depends on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smart_decoding.core.policies.chooser import Growth
from smart_decoding.core.tree import IntArray
from smart_decoding.drafters.levels import Asked, Ranked
from smart_decoding.engine.protocols import Grown
from smart_decoding.engine.rows import Rows
from smart_decoding.kernels import ops as kernels
from smart_decoding.kernels.chooser import GrowthStruct, NativeChooser
from smart_decoding.kernels.memory import address
from smart_decoding.models.layers import KVCache, Linear, NativeLayers
from smart_decoding.models.native_model import embedding_addresses
from smart_decoding.models.ranking import noise_of
from smart_decoding.models.rows import native_rows

Features: TypeAlias = Tensor | NDArray[np.float32]
Part: TypeAlias = Features | tuple[Sequence[Features], int]  # see drafters.eagle.Head
Rotary: TypeAlias = tuple[Tensor, Tensor]


class NativeLevel:
    """layer: the head's one. outputs: its output matrix, for `tokens` [draft]. norms: of the
    aux_layers (or None), of the embeddings, of the features, the final one. embedding: a packed
    matrix, as the target's, or a table. It keeps the head's outputs of a round, which deeper levels
    read."""

    def __init__(
        self,
        layer: NativeLayers,
        fc: Linear,
        outputs: Tensor,
        tokens: Tensor,
        norms: Sequence[Tensor | None],
        embedding: Linear | Tensor,
        aux_layers: int,
        norm_before_residual: bool,
    ) -> None:
        self._bf16, self._children = outputs.dtype == torch.bfloat16, len(tokens)
        if self._bf16 and outputs.shape[1] % 4 == 0:
            matrix: tuple[Tensor | None, ...] = kernels.pack_bytes(outputs)
        else:
            matrix = (Linear(outputs, native=True).packed, None, None)
        vectors = [
            None if v is None else v.float().contiguous() for v in (norms[0], fc.bias, *norms[1:])
        ]
        embeddings = (
            (None, embedding) if isinstance(embedding, Tensor) else (embedding.packed, None)
        )
        self._keep = (layer, *vectors, fc.packed, *embeddings, *matrix, tokens)
        pointers = map(kernels.pointer, self._keep[1:])
        self._head = kernels.Head(
            layer.structs[0], *pointers, len(tokens), aux_layers, norm_before_residual
        )
        self._outs, self._count = torch.empty(64, outputs.shape[1]), 0
        self._growth = GrowthStruct(hidden=outputs.shape[1], w_bf16=self._bf16)

    def first(
        self, rows: Rows, parts: Sequence[Part], rotary: Rotary, kv: KVCache, asked: Asked
    ) -> Ranked:
        """Runs pairs of tokens and aux_layers; the best children of each group's last one."""
        self._count = 0
        features: list[int] = []
        kept = [_readable(part) for part in parts]
        for part in kept:
            features += _pointers(part)
        return self._run(
            True,
            rows,
            np.array(features, np.int64),
            len(rows.query_start_loc) - 1,
            rotary,
            kv,
            asked,
        )

    def grow(
        self,
        rows: Rows,
        parts: Sequence[Part],
        rotary: Rotary,
        kv: KVCache,
        asked: Asked,
        slots: range,
        growth: Growth,
    ) -> Grown:
        """All levels of a round, nodes chosen as `growth` says. asked: for the children of the
        roots' rows at levels 1, 2, ..., request by request. slots: where nodes' keys go."""
        batch, kept = len(rows.query_start_loc) - 1, [_readable(part) for part in parts]
        features = np.array([address for part in kept for address in _pointers(part)], np.int64)
        self._count = 0
        self._reserve(batch + min(len(slots), int(growth.widths[-1]) * (growth.levels - 1)))
        k, scale, noise = min(asked.k, self._children), None, None
        if len(asked.draws):
            factors, noise = noise_of(asked)
            scale = np.ascontiguousarray(factors[:: growth.levels])
        ids, probs = np.empty((batch, k), np.int64), np.empty((batch, k))
        pictures, alive = embedding_addresses(rows.mm_embeds, len(rows))
        at = map(_at, (rows.token, features, pictures))
        level = kernels.Level(True, k, *at, self._outs.data_ptr(), None, None, _at(ids), _at(probs))
        how = self._growth
        how.first_slot, how.slots, how.scale, how.noise = (
            slots.start,
            len(slots),
            _at(scale),
            _at(noise),
        )
        how.keys, how.values, how.pages = (
            kv.keys.data_ptr(),
            kv.values.data_ptr(),
            kv.keys.shape[-3],
        )
        how.kv_bf16, how.threads = kv.keys.dtype == torch.bfloat16, torch.get_num_threads()
        native = native_rows(rows, *rotary)
        run = kernels.growing(self._head, native.struct, level)
        assert isinstance(growth.chooser, NativeChooser)
        grown = growth.chooser.grow(growth, how, k, run)
        del alive  # until here
        self._count = batch + sum(grown.expanded)
        return grown

    def deeper(
        self, rows: Rows, above: IntArray, rotary: Rotary, kv: KVCache, asked: Asked
    ) -> Ranked:
        """Runs nodes below the outputs `above` of this round; the best children of all."""
        self._reserve(len(rows))
        features = above * (4 * self._outs.shape[1]) + self._outs.data_ptr()
        return self._run(False, rows, features, len(rows), rotary, kv, asked)

    def _run(
        self,
        first: bool,
        rows: Rows,
        features: IntArray,
        wanted: int,
        rotary: Rotary,
        kv: KVCache,
        asked: Asked,
    ) -> Ranked:
        self._reserve(wanted)
        k = min(asked.k, self._children)
        ids, probs = np.empty((wanted, k), np.int64), np.empty((wanted, k))
        scale, keys = noise_of(asked) if len(asked.draws) else (None, None)
        pictures, parts = embedding_addresses(rows.mm_embeds, len(rows))
        at = map(_at, (rows.token, features, pictures))
        out = self._outs.data_ptr() + 4 * self._count * self._outs.shape[1]
        level = kernels.Level(first, k, *at, out, *map(_at, (scale, keys, ids, probs)))
        native = native_rows(rows, *rotary)
        kernels.draft(self._head, native.struct, level, (kv.keys, kv.values), self._bf16)
        del parts  # alive until here
        self._count += wanted
        return ids, probs

    def _reserve(self, more: int) -> None:
        """Makes room for more outputs."""
        if self._count + more > len(self._outs):
            outs = torch.empty(2 * (self._count + more), self._outs.shape[1])
            outs[: self._count] = self._outs[: self._count]
            self._outs = outs


def _readable(part: Part) -> Part:
    """The part in float32, as features of our own targets are."""
    first = part if isinstance(part, Tensor | np.ndarray) else part[0][0]
    if isinstance(first, np.ndarray) or (first.dtype == torch.float32 and first.stride(1) == 1):
        return part
    return as_tensor(part).float().contiguous()


def as_tensor(part: Part) -> Tensor:
    """[rows, width] a part as one tensor."""
    if isinstance(part, Tensor | np.ndarray):
        return torch.as_tensor(part)
    return torch.stack([torch.as_tensor(r[part[1]]) for r in part[0]])


def _pointers(part: Part) -> Sequence[int]:
    """The addresses of a part's rows."""
    if isinstance(part, Tensor | np.ndarray):
        start, step = _row(part)
        return range(start, start + step * len(part), step)
    rounds, place = part
    return [start + step * place for start, step in map(_row, rounds)]


def _row(rows: Features) -> tuple[int, int]:
    """The address of the first row, and the bytes from one to the next."""
    if isinstance(rows, Tensor):
        return rows.data_ptr(), 4 * rows.stride(0)
    return address(rows), rows.strides[0]


def _at(array: NDArray[np.generic] | None) -> int | None:
    return None if array is None else address(array)
