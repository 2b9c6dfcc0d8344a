"""A whole target on the CPU kernels: a forward in one call, and a round's verification in one
call."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import Structure
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smart_decoding.core.tree import Acceptance
from smart_decoding.engine.verification import TargetScores
from smart_decoding.kernels import ops as kernels
from smart_decoding.kernels.memory import address, pointer
from smart_decoding.models.cpu.native_verification import NativeBatch, NativeVerified
from smart_decoding.models.sampling.drawing import draws_of

if TYPE_CHECKING:
    from smart_decoding.core.tree import IntArray
    from smart_decoding.engine.media import MultimodalEmbeddings
    from smart_decoding.engine.rows import Rows
    from smart_decoding.kernels.weights import PackedWeight
    from smart_decoding.models.cpu.native_states import NativeStates
    from smart_decoding.models.torch.layers import KVCache, NativeLayers


class NativeModel:
    """layers: of a model; embedding: packed, or as a table; final_norm: before the output matrix;
    scale: what embeddings are multiplied with.

    What stays as it is from round to round is laid out once: between two forwards caches are cold,
    and a dozen Python calls take as long as three rows."""

    def __init__(
        self,
        layers: NativeLayers,
        embedding: PackedWeight | Tensor,
        output: PackedWeight,
        final_norm: Tensor,
        kv: KVCache,
        rotary: tuple[Tensor, Tensor],
        scale: float,
    ) -> None:
        norm = final_norm.float().contiguous()
        self._alive = (layers, norm, embedding, output, kv, rotary)
        self.states: NativeStates | None = None
        self.struct = _model(layers, embedding, output, norm, kv, scale)
        self._hidden = layers.structs[0].hidden
        attention = next(each for each in layers.structs if not each.delta)
        self._vocab = output.n
        self._aux_layers: dict[tuple[int, ...], NDArray[np.int32]] = {}
        self._pass = kernels.Pass()
        self._logits = torch.empty(0, self._vocab)
        self._seconds = np.empty(3)
        self._experts = np.zeros(1, np.int64)
        self._pass.experts = address(self._experts)
        # layers that are mixtures; one where there are none
        self._mixtures: int = max(1, sum(layer.experts > 0 for layer in layers.structs))
        self._round = kernels.Round(
            hidden=self._hidden,
            kv_heads=attention.kv_heads,
            head_dim=attention.head_dim,
            cosine=rotary[0].data_ptr(),
            sine=rotary[1].data_ptr(),
            angles=rotary[0].shape[1],
            seconds=address(self._seconds),
        )

    def hold(self, states: NativeStates) -> None:
        """Keep recurrent states there, before the first forward."""
        self.states = states
        self.struct.states = states.address

    def forward(self, native: Structure, rows: Rows, aux_layers: tuple[int, ...]) -> TargetScores:
        """Return logits of `rows.logit_rows` (None: of all), valid until the next forward; all
        rows' states after `aux_layers` layers; and those rows' first maxima, -1 where that is
        not finite. native: the kernels' structure of the rows."""
        count = len(rows) if rows.logit_rows is None else len(rows.logit_rows)
        logits = self._logits_of(count)
        aux_hidden = self._prepare(len(rows), aux_layers)
        best = np.empty(count, np.int64)
        embeddings, alive = embedding_addresses(rows.mm_embeds, len(rows))
        forward_pass = self._pass
        forward_pass.logits = logits.data_ptr()
        forward_pass.token = address(rows.token)
        forward_pass.best = address(best)
        forward_pass.wanted_count = count
        forward_pass.wanted = pointer(rows.logit_rows)
        forward_pass.embeddings = pointer(embeddings)
        if self.states is not None:
            forward_pass.nodes = self.states.prepare(np.diff(rows.ancestors_start))
        kernels.forward(self.struct, native, forward_pass)
        del alive  # until here
        hidden = None if aux_hidden is None else torch.from_numpy(aux_hidden)
        advance = self.advance_after(rows)
        return TargetScores(logits, hidden, best, advance=advance, experts=self._awake)

    def advance_after(self, rows: Rows) -> Callable[[Sequence[Sequence[int]]], None] | None:
        """Return `TargetScores.advance` of a forward of these rows, the last one."""
        if self.states is None or not len(rows.ancestors):
            return None
        return partial(self.states.advance, self.struct, rows)

    def verify(self, batch: NativeBatch) -> NativeVerified:
        """Verify a round in one call: the forward, tokens down the trees, and the moves of keys."""
        draws = None if batch.specs is None else draws_of(batch.specs)
        requests = len(batch.roots)
        rows = requests + len(batch.kept)
        inputs = np.array([batch.roots, batch.lengths, batch.rotary, batch.tables], np.int64)
        found = np.empty((5, rows), np.int64)
        logits = None if draws is None else self._logits_of(rows)
        struct = self._round
        struct.requests = requests
        struct.nodes = len(batch.kept)
        struct.room = batch.trees.ints.shape[1]
        struct.trees = address(batch.trees.ints)
        struct.kept = address(batch.kept)
        struct.draws = pointer(draws)
        struct.root, struct.length, struct.position, struct.pages = _lines(inputs)
        if self.states is not None:
            places = np.array(batch.states, np.int64) if batch.states else None
            struct.states = pointer(places)
            self._pass.nodes = self.states.prepare(batch.trees.depth[batch.kept])
        struct.after, struct.emitted, struct.path, struct.accepted, struct.first = _lines(found)
        aux_hidden = self._prepare(rows, batch.aux_layers)
        self._pass.wanted = self._pass.embeddings = None
        self._pass.logits = pointer(logits)
        decided = kernels.verify_round(self.struct, struct, self._pass)
        acceptance = _acceptance(found, requests) if decided else None
        scores = TargetScores(logits, aux_hidden, experts=self._awake)
        first = found[4, :requests].tolist()
        return NativeVerified(acceptance, scores, rows, first, *self._seconds.tolist())

    @property
    def _awake(self) -> float:
        """Experts that the last forward's rows woke, in the mean of a mixture's layers."""
        return int(self._experts[0]) / self._mixtures

    def _logits_of(self, rows: int) -> Tensor:
        """[rows, vocab] memory for logits, the same in each forward."""
        if len(self._logits) < rows:
            self._logits = torch.empty(rows + rows // 4, self._vocab)
        return self._logits[:rows]

    def _prepare(self, rows: int, aux_layers: tuple[int, ...]) -> NDArray[np.float32] | None:
        """Makes room for the states after `aux_layers` layers, which it returns: an array, since a
        tensor takes ten times as long to cut."""
        if aux_layers not in self._aux_layers:
            self._aux_layers[aux_layers] = np.array(aux_layers, np.int32)
        width = len(aux_layers) * self._hidden
        aux_hidden = np.empty((rows, width), np.float32) if aux_layers else None
        what = self._pass
        what.aux_layers = address(self._aux_layers[aux_layers])
        what.aux_count = len(aux_layers)
        what.aux_hidden = pointer(aux_hidden)
        return aux_hidden


def _model(
    layers: NativeLayers,
    embedding: PackedWeight | Tensor,
    output: PackedWeight,
    norm: Tensor,
    kv: KVCache,
    scale: float,
) -> Structure:
    first = layers.structs[0]
    bf16 = kv.keys.dtype == torch.bfloat16
    return kernels.Model(
        layers=ctypes.addressof(layers.structs),
        output=output.struct,
        **embedding_fields(embedding),
        final_norm=norm.data_ptr(),
        keys=kv.keys.data_ptr(),
        values=kv.values.data_ptr(),
        vocab=output.n,
        pages=kv.keys.shape[-3],
        layer_count=len(layers.structs),
        hint=first.hint,
        w_bf16=bf16,
        kv_bf16=bf16,
        eps=first.eps,
        embedding_scale=scale,
    )


def embedding_fields(embedding: PackedWeight | Tensor) -> dict[str, Any]:
    """Return the fields `embedding` and `table` of Model and Head; a table is contiguous."""
    if isinstance(embedding, Tensor):
        return {"table": embedding.data_ptr()}
    return {"embedding": embedding.struct}


def _acceptance(found: NDArray[np.int64], requests: int) -> Acceptance:
    """Of `after`, `emitted`, `path` and `accepted` as smart_round leaves them."""
    emitted, path, accepted = found[1:4].tolist()
    emitted_of = []
    path_of = []
    node = 0
    for request, count in enumerate(accepted[:requests]):
        token = node + request  # each one before has emitted a bonus token, too
        emitted_of.append(emitted[token : token + count + 1])
        path_of.append(path[node : node + count])
        node += count
    return Acceptance(found[0, :requests], found[0, requests:], emitted_of, path_of)


def _lines(array: NDArray[np.int64]) -> range:
    """Return the address of each row of an array [rows, columns]."""
    start, step = address(array), array.strides[0]
    return range(start, start + step * len(array), step)


def embedding_addresses(
    mm_embeds: MultimodalEmbeddings, rows: int
) -> tuple[IntArray | None, list[Tensor]]:
    """For each row the address of the embedding to be read in place of its token's, or 0; and what
    must stay alive."""
    if not mm_embeds:
        return None, []
    found = np.zeros(rows, np.int64)
    alive = []
    for first, part in mm_embeds:
        alive.append(part.float().contiguous())
        start, step = alive[-1].data_ptr(), 4 * part.shape[1]
        found[first : first + len(part)] = range(start, start + step * len(part), step)
    return found, alive
