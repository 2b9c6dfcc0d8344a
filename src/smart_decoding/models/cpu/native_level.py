"""A level of a head as one call of the CPU kernels: aux hidden states and tokens in, ranked
children out.

An EAGLE-3 head in bf16 has its output matrix in 8 bits (a scale for each token): it is half of what
a level reads, and proposals may be off by a little, since no answer depends on them. Beside a
target of quants all of its matrices have 8 bits, or fewer if they are stored so."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import Structure
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from smart_decoding.kernels import ops as kernels
from smart_decoding.kernels.memory import address, pointer
from smart_decoding.kernels.selection import FirstLevel, most_expanded, native_selection
from smart_decoding.kernels.weights import (
    IF_FASTER,
    Arena,
    PackedWeight,
    QuantizedTensor,
    pack,
    pack_bytes,
    replace_rows,
)
from smart_decoding.models.cpu.native_model import embedding_addresses, embedding_fields
from smart_decoding.models.heads.features import FeaturePart, readable, row_addresses
from smart_decoding.models.sampling.ranking import noise_of, noise_of_levels
from smart_decoding.models.torch.layers import KVCache, NativeLayers, converted

if TYPE_CHECKING:
    from smart_decoding.core.rule import Draft, TreeRule
    from smart_decoding.core.tree import DraftTrees, IntArray
    from smart_decoding.engine.rows import DraftInputs, LevelRequest, Ranked, Rows
    from smart_decoding.kernels.weights import Matrix
    from smart_decoding.models.heads.weights import HeadWeights


class NativeLevel:
    """The same as `SteppedLevels`: one level in a call, or all of a round."""

    kv: KVCache  # whose head sets both
    rotary: tuple[Tensor, Tensor]

    def __init__(self, weights: HeadWeights) -> None:
        self._bf16 = weights.target.dtype == torch.bfloat16
        self._children = len(weights.draft_ids)
        self._changing = weights if weights.changes else None
        self._ranking = _outputs(weights)
        self._head, self._alive = _structure(weights, *self._ranking)
        self._outputs = torch.empty(64, weights.files.shape.hidden)
        self._count = 0

    def follows(self, rule: TreeRule) -> bool:
        """See `SteppedLevels`."""
        return True

    def replace(self, places: IntArray, tokens: IntArray) -> None:
        """See `SteppedLevels`."""
        at, ids = torch.from_numpy(places), torch.from_numpy(tokens)
        weights = self._changing
        assert weights is not None
        weights.draft_ids[at] = ids
        packed, scales = self._ranking
        new, of_new = _packed_output(weights.rows_of(ids), weights.target.dtype)
        replace_rows(packed, at, new)
        for name, scale in scales.items():
            scale[at] = of_new[name][: len(at)]

    @property
    def outputs(self) -> Tensor:
        """See `SteppedLevels`."""
        return self._outputs[: self._count]

    def first(
        self, rows: Rows, parts: Sequence[FeaturePart], last: IntArray, request: LevelRequest
    ) -> Ranked:
        """See `SteppedLevels`; `last` are the last rows of all requests."""
        self._count = 0
        in_place = [readable(part) for part in parts]
        batch = len(rows.query_start_loc) - 1
        return self._run(True, rows, row_addresses(in_place), batch, request)

    def deeper(self, rows: Rows, above: IntArray, request: LevelRequest) -> Ranked:
        """See `SteppedLevels`."""
        self._reserve(len(rows))
        features = above * (4 * self._outputs.shape[1]) + self._outputs.data_ptr()
        return self._run(False, rows, features, len(rows), request)

    def draft(
        self,
        rule: TreeRule,
        proposed: DraftTrees,
        inputs: DraftInputs,
        parts: Sequence[FeaturePart],
    ) -> Draft:
        """Draft a round as the rule says, in one call, and merge it with `proposed`."""
        batch = proposed.batch
        in_place = [readable(part) for part in parts]
        self._count = 0
        self._reserve(batch + most_expanded(rule, batch, inputs.slots))
        k = min(inputs.request.k, self._children)
        call = LevelCall(True, inputs.rows, row_addresses(in_place), batch, k, in_place)
        call.struct.out = self._outputs.data_ptr()
        kv = self.kv
        first = fill_first_level(
            inputs,
            call,
            self.rotary,
            rule.levels,
            head=ctypes.addressof(self._head),
            keys=kv.keys.data_ptr(),
            values=kv.values.data_ptr(),
            pages=kv.keys.shape[-3],
            w_bf16=self._bf16,
            kv_bf16=kv.keys.dtype == torch.bfloat16,
        )
        return native_selection().draft(rule, proposed, first)

    def _run(
        self, first: bool, rows: Rows, features: IntArray, ranked_rows: int, request: LevelRequest
    ) -> Ranked:
        self._reserve(ranked_rows)
        scale, keys = noise_of(request) if len(request.draws) else (None, None)
        call = LevelCall(first, rows, features, ranked_rows, min(request.k, self._children))
        call.struct.out = self._outputs[self._count :].data_ptr()
        call.struct.scale = pointer(scale)
        call.struct.keys = pointer(keys)
        native = kernels.native_rows(rows, *self.rotary)
        both = (self.kv.keys, self.kv.values)
        kernels.draft(self._head, native, call.struct, both, self._bf16)
        self._count += ranked_rows
        return call.tokens, call.probs

    def _reserve(self, more: int) -> None:
        if self._count + more > len(self._outputs):
            outputs = torch.empty(2 * (self._count + more), self._outputs.shape[1])
            outputs[: self._count] = self.outputs
            self._outputs = outputs


class LevelCall:
    """A structure Level, the arrays behind it, and its results `tokens` and `probs`
    [ranked_rows, k]. features: [rows] addresses, of a head; behind: what lies there."""

    def __init__(
        self,
        first: bool,
        rows: Rows,
        features: IntArray | None,
        ranked_rows: int,
        k: int,
        behind: object = None,
    ) -> None:
        self.tokens = np.empty((ranked_rows, k), np.int64)
        self.probs = np.empty((ranked_rows, k))
        embeddings, tensors = embedding_addresses(rows.mm_embeds, len(rows))
        self._alive = (rows, features, behind, embeddings, tensors)
        self.struct = kernels.Level(
            first=first,
            k=k,
            token=address(rows.token),
            features=pointer(features),
            embeddings=pointer(embeddings),
            tokens=address(self.tokens),
            probs=address(self.probs),
        )


def fill_first_level(
    inputs: DraftInputs, call: LevelCall, rotary: tuple[Tensor, Tensor], levels: int, **drafts: Any
) -> FirstLevel:
    """Return a round's first level. drafts: the fields of the structure Drafter that say who
    drafts."""
    native = kernels.native_rows(inputs.rows, *rotary)
    scale, noise = noise_of_levels(inputs.request, levels)
    struct = kernels.Drafter(
        first_slot=inputs.slots.start,
        slots=len(inputs.slots),
        scale=pointer(scale),
        noise=pointer(noise),
        threads=torch.get_num_threads(),
        **drafts,
    )
    return FirstLevel(native, call.struct, struct, inputs.slots, (native, call, scale, noise))


def _structure(
    weights: HeadWeights, outputs: PackedWeight, scales: Mapping[str, Tensor]
) -> tuple[Structure, tuple[object, ...]]:
    """Return the structure Head, and what must stay alive behind it. outputs, scales: see
    `_outputs`."""
    target = weights.target
    files = weights.files
    size = sum(_bytes(weight, target.dtype) for weight in files.weights.values())
    arena = Arena(size, IF_FASTER)
    layers = NativeLayers(weights.layers(), arena)
    fc = pack([converted(weights.held["fc.weight"], target.dtype, target.device)], arena)
    embedding = target.embedding if weights.embedding is None else weights.embedding
    vectors = {"fc_bias": weights.get("fc.bias"), **_norms(weights)}
    tensors = {name: None if v is None else v.float().contiguous() for name, v in vectors.items()}
    tensors |= {"tokens": weights.draft_ids, **scales}
    struct = kernels.Head(
        layers=ctypes.addressof(layers.structs),
        layer_count=len(layers.structs),
        outputs_count=len(weights.draft_ids),
        aux_count=len(files.aux_layers),
        norm_before_residual=files.norm_before_residual,
        fused=files.fused,
        aux_together=weights.aux_together,
        feeds_back_normed=files.form.feeds_back_normed,
        aux_eps=(target.config if files.fused else files.shape).rms_eps,
        fc=fc.struct,
        outputs=outputs.struct,
        **embedding_fields(embedding),
        **{name: pointer(tensor) for name, tensor in tensors.items()},
    )
    return struct, (layers, fc, embedding, outputs, tensors)


def _bytes(weight: Matrix, dtype: torch.dtype) -> int:
    if isinstance(weight, QuantizedTensor):
        return weight.rows.nbytes
    return weight.numel() * dtype.itemsize


def _norms(weights: HeadWeights) -> dict[str, Tensor | None]:
    form = weights.files.form
    return {
        # the features of a fused head are what the target's output matrix reads
        "aux_norm": weights.target.final_norm if form.fused else weights.aux_norm,
        "input_norm": weights.norm(form.embedding_norm),
        "hidden_norm": weights.norm(form.features_norm),
        "final_norm": weights.norm(form.last_norm),
    }


def _outputs(weights: HeadWeights) -> tuple[PackedWeight, dict[str, Tensor]]:
    """Return the output matrix, the target's or one of its own tokens, and what else the structure
    names of it."""
    if weights.shares_output:
        assert isinstance(weights.target.head, PackedWeight)
        return weights.target.head, {}
    return _packed_output(weights.output, weights.target.dtype)


def _packed_output(rows: Tensor, dtype: torch.dtype) -> tuple[PackedWeight, dict[str, Tensor]]:
    """Return rows [n, hidden] packed, in 8 bits beside a target in bf16, and what else the
    structure Head names of them."""
    if dtype == torch.bfloat16 and rows.shape[1] % 4 == 0:
        packed, scale, sums = pack_bytes(rows)
        return packed, {"scale": scale, "sums": sums}
    return pack([rows.to(dtype)]), {}
