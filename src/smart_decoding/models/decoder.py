"""One decoder for the Llama family: rows in, logits and aux hidden states out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from smart_decoding.kernels import ops as kernels
from smart_decoding.kernels.weights import Arena, Matrix, QuantizedTensor, as_tensor
from smart_decoding.models.graphs import GraphedLayers, layers_on
from smart_decoding.models.kernel_check import use_native
from smart_decoding.models.layers import (
    Context,
    KVCache,
    Layers,
    NativeLayers,
    Workspace,
    converted,
    layer_weights,
)
from smart_decoding.models.linear import Linear
from smart_decoding.models.native_model import NativeModel
from smart_decoding.models.panels import KeptPanels, kept_panels
from smart_decoding.models.rows import BUCKETS, upload

if TYPE_CHECKING:
    from smart_decoding.engine.media import MultimodalEmbeddings
    from smart_decoding.engine.rows import Rows
    from smart_decoding.models.config import ModelConfig


@dataclass
class ForwardOutput:
    """logits: [wanted rows, vocab], valid until the next forward; aux_hidden: [rows, aux_layers *
    hidden], the residual streams after the aux layers, or None; best: [wanted rows] first maximum
    of the logits (-1: not finite), where the kernels find it in passing."""

    logits: Tensor
    aux_hidden: Tensor | None
    best: NDArray[np.int64] | None = None


def rotary_table(
    config: ModelConfig, positions: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin for every position: [positions, head_dim / 2] float32 each."""
    inverse, factor = config.inverse_frequencies()
    angles = torch.arange(positions).float()[:, None] * torch.from_numpy(inverse).float()
    return (angles.cos() * factor).to(device), (angles.sin() * factor).to(device)


def put(x: Tensor, mm_embeds: MultimodalEmbeddings) -> None:
    """Writes the embeddings of pictures over those of their placeholders, x [rows, hidden]."""
    for first, part in mm_embeds:
        x[first : first + len(part)] = part


class Decoder:
    """A Llama-family model with its KV cache.

    dtype is that of weights and cache. On the CPU kernels activations and sums are float32 whatever
    the dtype. native: whether the CPU kernels run it (None: on every CPU, an error where they
    cannot). graphs: whether CUDA graphs do, on a CUDA device."""

    in_bytes = False  # whether quants are multiplied with inputs rounded to 8 bits
    quiet: bool | None = None  # no progress is shown; None: only on a terminal
    _panels: KeptPanels | None = None

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Matrix],
        dtype: torch.dtype,
        device: torch.device,
        pages: int,
        positions: int,
        native: bool | None = None,
        graphs: bool = True,
    ) -> None:
        def get(name: str) -> Matrix:
            return converted(weights[name], dtype, device)

        self.config = config
        self.dtype = dtype
        self.device = device
        self.native = use_native(config, device) if native is None else native
        self.work_dtype = torch.float32 if self.native else dtype
        self.workspace = Workspace()
        self.graphs = graphs
        arena = self._set_layers(weights)
        embedding = get("model.embed_tokens.weight")
        output = embedding if config.tie_embeddings else get("lm_head.weight")
        norm = as_tensor(get("model.norm.weight"))
        self.head = Linear(output, self.native, arena, norm, config.rms_eps)
        tied = config.tie_embeddings
        self.embedding: Linear | Tensor = self.head if tied else self._table(embedding, arena)
        self.final_norm: Tensor | None = norm
        self.rotary = rotary_table(config, positions, device)
        axes = np.repeat(np.arange(3), config.mrope) if config.mrope else None
        self._axis = None if axes is None else torch.from_numpy(axes).to(device)
        self.kv = KVCache.empty(
            config.layers, config.kv_heads, pages, config.head_dim, dtype, device, self.native
        )
        self.model: NativeModel | None = None  # all of it, where the CPU kernels run it
        if isinstance(self._layers, NativeLayers):
            self.model = NativeModel(
                self._layers, self.embedding, self.head, norm, self.kv, self.rotary
            )

    def _table(self, embedding: Matrix, arena: Arena | None) -> Linear | Tensor:
        """Embeddings that are not the output matrix: as a table, or packed if they are quants."""
        if self.native and isinstance(embedding, QuantizedTensor):
            return Linear(embedding, True, arena)
        return as_tensor(embedding)

    def _set_layers(self, weights: Mapping[str, Matrix]) -> Arena | None:
        """Makes the layers; returns memory for the other matrices, on the CPU kernels."""
        config = self.config
        layers = (
            layer_weights(config, weights, f"model.layers.{i}.", self.dtype, self.device)
            for i in tqdm(
                range(config.layers), "loading", unit="layer", disable=self.quiet, leave=False
            )
        )
        self._layers: Layers
        if self.native:
            shapes = config.expected_shapes().values()
            self._panels = kept_panels(weights, self.dtype, self.in_bytes)
            kept = None if self._panels is None else self._panels.read()
            size = self.dtype.itemsize * sum(map(math.prod, shapes))
            self._arena = Arena(size, self.in_bytes, kept)
            self._layers = NativeLayers(layers, self._arena, self.workspace)
            return self._arena
        # sums of products that a GPU splits stay in float32
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        self._layers = layers_on(self.device, layers, self.graphs)
        return None

    def keep_panels(self) -> None:
        """Keeps packed quants for later starts, where that is done and they are not kept yet."""
        if self._panels is not None and not self._arena.all_kept:
            self._panels.write(self._arena.strips)

    @property
    def steps(self) -> tuple[int, ...]:
        """Row counts beyond which one more row costs a step: what a pass over the weights serves,
        or a CUDA graph."""
        if self.native:
            return (kernels.pass_rows(self.head.packed),)
        return BUCKETS if isinstance(self._layers, GraphedLayers) else ()

    def embed(self, token: Tensor) -> Tensor:
        """Token embeddings [n, hidden] in the working dtype."""
        table = self.embedding
        rows = table[token] if isinstance(table, Tensor) else table.rows_of(token)
        return rows.to(self.work_dtype)

    @torch.inference_mode()
    def forward(self, rows: Rows, aux_layers: tuple[int, ...] = ()) -> ForwardOutput:
        """Runs the rows through all layers; `aux_layers` are layer counts (4 = after the fourth
        layer), ascending."""
        context = self._context(rows, aux_layers)
        if self.model is not None:
            native = kernels.native_rows(context.rows, context.cosine, context.sine)
            logits, states, best = self.model.forward(
                native, rows.token, rows.mm_embeds, rows.logit_rows, aux_layers
            )
            return ForwardOutput(logits, states, best)
        x = self.embed(context.on_device.token)
        put(x, rows.mm_embeds)
        if aux_layers:
            width = len(aux_layers) * self.config.hidden
            context.aux_hidden = x.new_empty(len(rows), width)
        self._layers(x, context, self.kv)
        if rows.logit_rows is not None:
            x = x[context.on_device.logit_rows]
        return ForwardOutput(self.head(x).float(), context.aux_hidden)

    def _context(self, rows: Rows, aux_layers: tuple[int, ...]) -> Context:
        """M-RoPE rows get rotary tables of their own, in which row i finds its angles at position
        i."""
        if rows.rotary is None:
            return Context(rows, *self.rotary, aux_layers=aux_layers)
        at = upload(rows.rotary, self.device)[:, self._axis]  # [rows, head_dim / 2]
        cosine, sine = (table.gather(0, at) for table in self.rotary)
        own = replace(rows, position=np.arange(len(rows)))
        return Context(own, cosine, sine, aux_layers=aux_layers)


class RoundingDecoder(Decoder):
    """Inputs of its quants are rounded to 8 bits: faster, and its logits are off by a little."""

    in_bytes = True
