"""A level of an EAGLE-3 head of one layer as one call of the CPU kernels: aux hidden states and
tokens in, ranked children out.

A head in bf16 has its output matrix in 8 bits (a scale for each token): it is half of what a level
reads, and proposals may be off by a little, since no answer depends on them."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from smart_decoding.kernels import ops as kernels
from smart_decoding.kernels.chooser import FirstLevel, NativeChooser, most_expanded
from smart_decoding.kernels.memory import address, address_or_none
from smart_decoding.models.features import Part, readable, row_addresses
from smart_decoding.models.head_weights import HeadWeights, head_layers
from smart_decoding.models.layers import NativeLayers
from smart_decoding.models.linear import Linear
from smart_decoding.models.native_model import embedding_addresses
from smart_decoding.models.ranking import noise_of
from smart_decoding.models.rows import native_rows

if TYPE_CHECKING:
    from smart_decoding.core.policies.chooser import Growth
    from smart_decoding.core.tree import IntArray
    from smart_decoding.drafters.levels import Asked, Ranked
    from smart_decoding.engine.protocols import Grown
    from smart_decoding.engine.rows import Rows
    from smart_decoding.models.head_levels import HeadCache


class NativeLevel:
    """Implements `Levels`, and `grow`: all levels of a round in one call."""

    def __init__(self, weights: HeadWeights) -> None:
        output = weights.output
        self._bf16 = output.dtype == torch.bfloat16
        self._children = len(output)
        self._head, self._keep = _structure(weights)
        self._outputs = torch.empty(64, output.shape[1])
        self._count = 0

    @staticmethod
    def serves(weights: HeadWeights) -> bool:
        """Whether the kernels run a level of this head in one call."""
        files = weights.files
        if not weights.target.native or files.fused or files.shape.layers != 1:
            return False
        if weights.fc.shape[1] != len(files.aux_layers) * files.shape.hidden:
            return False
        return weights.embedding is not None or weights.target.embedding is not None

    @property
    def outputs(self) -> Tensor:
        """See `Levels`."""
        return self._outputs[: self._count]

    def first(
        self, rows: Rows, parts: Sequence[Part], last: IntArray, cache: HeadCache, asked: Asked
    ) -> Ranked:
        """See `Levels`; `last` are the last rows of all requests."""
        self._count = 0
        kept = [readable(part) for part in parts]
        batch = len(rows.query_start_loc) - 1
        return self._run(True, rows, row_addresses(kept), batch, cache, asked)

    def deeper(self, rows: Rows, above: IntArray, cache: HeadCache, asked: Asked) -> Ranked:
        """See `Levels`."""
        self._reserve(len(rows))
        features = above * (4 * self._outputs.shape[1]) + self._outputs.data_ptr()
        return self._run(False, rows, features, len(rows), cache, asked)

    def grow(
        self,
        rows: Rows,
        parts: Sequence[Part],
        cache: HeadCache,
        asked: Asked,
        slots: range,
        growth: Growth,
    ) -> Grown:
        """All levels of a round, nodes chosen as `growth` says. asked: for the children of the
        roots' rows at levels 1, 2, ..., request by request. slots: where nodes' keys go."""
        batch = len(rows.query_start_loc) - 1
        kept = [readable(part) for part in parts]
        self._count = 0
        self._reserve(batch + most_expanded(growth, slots))
        scale, noise = noise_of(asked) if len(asked.draws) else (None, None)
        if scale is not None:
            scale = np.ascontiguousarray(scale[:: growth.levels])
        call = _LevelCall(True, rows, row_addresses(kept), batch, min(asked.k, self._children))
        call.struct.out = self._outputs.data_ptr()
        native = native_rows(rows, *cache.rotary)
        first = FirstLevel(
            self._head,
            native.struct,
            call.struct,
            self._outputs.shape[1],
            self._bf16,
            cache.kv.keys,
            cache.kv.values,
            slots,
            scale,
            noise,
        )
        assert isinstance(growth.chooser, NativeChooser)
        grown = growth.chooser.grow(growth, first)
        self._count = batch + sum(grown.expanded)
        return grown

    def _run(
        self,
        first: bool,
        rows: Rows,
        features: IntArray,
        wanted: int,
        cache: HeadCache,
        asked: Asked,
    ) -> Ranked:
        self._reserve(wanted)
        scale, keys = noise_of(asked) if len(asked.draws) else (None, None)
        call = _LevelCall(first, rows, features, wanted, min(asked.k, self._children))
        call.struct.out = self._outputs[self._count :].data_ptr()
        call.struct.scale = address_or_none(scale)
        call.struct.keys = address_or_none(keys)
        native = native_rows(rows, *cache.rotary)
        both = (cache.kv.keys, cache.kv.values)
        kernels.draft(self._head, native.struct, call.struct, both, self._bf16)
        self._count += wanted
        return call.tokens, call.probs

    def _reserve(self, more: int) -> None:
        """Makes room for more outputs."""
        if self._count + more > len(self._outputs):
            outputs = torch.empty(2 * (self._count + more), self._outputs.shape[1])
            outputs[: self._count] = self.outputs
            self._outputs = outputs


class _LevelCall:
    """A structure Level, the arrays behind it, and its results `tokens` and `probs` [wanted, k]."""

    def __init__(self, first: bool, rows: Rows, features: IntArray, wanted: int, k: int) -> None:
        self.tokens = np.empty((wanted, k), np.int64)
        self.probs = np.empty((wanted, k))
        embeddings, tensors = embedding_addresses(rows.mm_embeds, len(rows))
        self._keep = (rows, features, embeddings, tensors)
        self.struct = kernels.Level(
            first=first,
            k=k,
            token=address(rows.token),
            features=address(features),
            embeddings=address_or_none(embeddings),
            tokens=address(self.tokens),
            probs=address(self.probs),
        )


def _structure(weights: HeadWeights) -> tuple[Structure, tuple[object, ...]]:
    """The structure Head, and what must stay alive behind it."""
    packed = head_layers(weights)
    layers = packed.layers
    assert isinstance(layers, NativeLayers)
    embedding = weights.target.embedding if weights.embedding is None else weights.embedding
    assert embedding is not None
    tensors = {
        "aux_norm": weights.ones() if weights.norms_aux else None,
        "fc_bias": packed.fc.bias,
        "input_norm": weights.norm("midlayer.input_layernorm.weight"),
        "hidden_norm": weights.norm("midlayer.hidden_norm.weight"),
        "final_norm": weights.norm("norm.weight"),
        "fc": packed.fc.packed,
        "embedding": None if isinstance(embedding, Tensor) else embedding.packed,
        "table": embedding if isinstance(embedding, Tensor) else None,
        "tokens": weights.draft_ids,
        **_output_matrix(weights.output),
    }
    struct = kernels.Head(
        layer=layers.structs[0],
        outputs_count=len(weights.draft_ids),
        aux_count=len(weights.files.aux_layers),
        norm_before_residual=weights.files.norm_before_residual,
        **{name: kernels.pointer(tensor) for name, tensor in tensors.items()},
    )
    return struct, (layers, tensors)


def _output_matrix(output: Tensor) -> dict[str, Tensor | None]:
    """The output matrix [draft, hidden] in 8 bits where it is bf16, else packed as it is."""
    if output.dtype == torch.bfloat16 and output.shape[1] % 4 == 0:
        packed, scale, sums = kernels.pack_bytes(output)
        return {"outputs": packed, "scale": scale, "sums": sums}
    return {"outputs": Linear(output, native=True).packed, "scale": None, "sums": None}
