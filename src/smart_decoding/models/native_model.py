"""A whole target on the CPU kernels: a forward in one call, and a round's verification in one
call."""

from __future__ import annotations

import ctypes
from ctypes import Structure

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smart_decoding.core.acceptance import Acceptance
from smart_decoding.core.tree import IntArray
from smart_decoding.engine.media import MultimodalEmbeddings
from smart_decoding.engine.protocols import GreedyBatch, GreedyRound
from smart_decoding.kernels import ops as kernels
from smart_decoding.kernels.memory import address
from smart_decoding.kernels.ops import pointer
from smart_decoding.models.layers import KVCache, Linear, NativeLayers


class NativeModel:
    """layers: of a model; embedding: its table, or None where that is the output matrix;
    final_norm: before that.

    What stays as it is from round to round is laid out once: between two forwards caches are cold,
    and a dozen Python calls take as long as three rows."""

    def __init__(
        self,
        layers: NativeLayers,
        embedding: Tensor | None,
        output: Linear,
        final_norm: Tensor,
        kv: KVCache,
        rotary: tuple[Tensor, Tensor],
    ) -> None:
        first, bf16 = layers.structs[0], kv.keys.dtype == torch.bfloat16
        norm = final_norm.float().contiguous()
        table = None if embedding is None else embedding.contiguous()
        packed = output.packed
        self._keep = (layers, norm, table, packed, kv, rotary)
        self._model = kernels.Model(
            ctypes.addressof(layers.structs),
            None if table is not None else packed.data_ptr(),
            pointer(table),
            packed.data_ptr(),
            norm.data_ptr(),
            kv.keys.data_ptr(),
            kv.values.data_ptr(),
            output.rows,
            kv.keys.shape[-3],
            len(layers.structs),
            first.hint,
            bf16,
            bf16,
            first.eps,
        )
        self._hidden, self._vocab = first.hidden, output.rows
        self._aux_layers: dict[tuple[int, ...], NDArray[np.int32]] = {}
        self._pass, self._logits = kernels.Pass(), torch.empty(0, self._vocab)
        self._seconds = np.empty(2)
        self._round = kernels.Round(
            hidden=self._hidden,
            kv_heads=first.kv_heads,
            head_dim=first.head_dim,
            cosine=rotary[0].data_ptr(),
            sine=rotary[1].data_ptr(),
            seconds=address(self._seconds),
        )

    def forward(
        self,
        rows: Structure,
        token: IntArray,
        mm_embeds: MultimodalEmbeddings,
        wanted: IntArray | None,
        aux_layers: tuple[int, ...],
    ) -> tuple[Tensor, Tensor | None, IntArray]:
        """Logits of the `wanted` rows (None: of all), valid until the next forward; all rows'
        states after `aux_layers` layers; and the wanted rows' first maxima, -1 where that is not
        finite."""
        count = rows.rows if wanted is None else len(wanted)
        if len(self._logits) < count:
            self._logits = torch.empty(count + count // 4, self._vocab)
        aux_hidden, best, what = (
            self._prepare(rows.rows, aux_layers),
            np.empty(count, np.int64),
            self._pass,
        )
        what.logits = self._logits.data_ptr()
        what.token, what.best, what.wanted_count = address(token), address(best), count
        what.wanted = None if wanted is None else address(wanted)
        pictures, alive = embedding_addresses(mm_embeds, rows.rows)
        what.embeddings = None if pictures is None else address(pictures)
        kernels.forward(self._model, rows, what)
        del alive  # until here
        return (
            self._logits[:count],
            None if aux_hidden is None else torch.from_numpy(aux_hidden),
            best,
        )

    def verify(self, batch: GreedyBatch) -> GreedyRound:
        """See VerifyGreedy."""
        trees, kept, r = batch.trees, batch.kept, self._round
        requests, nodes = len(batch.roots), len(kept)
        rows = requests + nodes
        given, found = np.array(batch[:3], np.int64), np.empty((5, rows), np.int64)
        at, step = address(given), 8 * requests
        r.requests, r.nodes, r.room = requests, nodes, trees.ints.shape[1]
        r.trees, r.kept = address(trees.ints), address(kept)
        r.root, r.length, r.pages = at, at + step, at + 2 * step
        at, step = address(found), 8 * rows
        r.after, r.emitted, r.path, r.accepted, r.first = range(at, at + 5 * step, step)
        aux_hidden = self._prepare(rows, batch.aux_layers)
        self._pass.wanted = self._pass.embeddings = self._pass.logits = None
        kernels.verify_round(self._model, r, self._pass)
        emitted, path, accepted, first = found[1:].tolist()
        emitted_of, path_of, token, node = [], [], 0, 0
        for count in accepted[:requests]:
            emitted_of.append(emitted[token : token + count + 1])
            path_of.append(path[node : node + count])
            token, node = token + count + 1, node + count
        acceptance = Acceptance(found[0, :requests], found[0, requests:], emitted_of, path_of)
        return GreedyRound(acceptance, aux_hidden, first[:requests], *self._seconds.tolist())

    def _prepare(self, rows: int, aux_layers: tuple[int, ...]) -> NDArray[np.float32] | None:
        """Makes room for the states after `aux_layers` layers, which it returns: an array, since a
        tensor takes ten times as long to cut."""
        if aux_layers not in self._aux_layers:
            self._aux_layers[aux_layers] = np.array(aux_layers, np.int32)
        aux_hidden = (
            np.empty((rows, len(aux_layers) * self._hidden), np.float32) if aux_layers else None
        )
        what = self._pass
        what.aux_layers, what.aux_count = address(self._aux_layers[aux_layers]), len(aux_layers)
        what.aux_hidden = None if aux_hidden is None else address(aux_hidden)
        return aux_hidden


def embedding_addresses(
    mm_embeds: MultimodalEmbeddings, rows: int
) -> tuple[IntArray | None, list[Tensor]]:
    """For each row the address of the embedding to be read in place of its token's, or 0; and what
    must stay alive."""
    if not mm_embeds:
        return None, []
    found, kept = np.zeros(rows, np.int64), []
    for first, part in mm_embeds:
        kept.append(part.float().contiguous())
        start, step = kept[-1].data_ptr(), 4 * part.shape[1]
        found[first : first + len(part)] = range(start, start + step * len(part), step)
    return found, kept
