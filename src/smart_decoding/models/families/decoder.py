"""One decoder for every family: rows in, logits and aux hidden states out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from smart_decoding.engine.verification import TargetScores
from smart_decoding.kernels import ops as kernels
from smart_decoding.kernels.weights import (
    ALWAYS,
    NEVER,
    Arena,
    Matrix,
    PackedWeight,
    QuantizedTensor,
    as_tensor,
    pack,
)
from smart_decoding.models.cpu.kernel_check import use_native
from smart_decoding.models.cpu.native_model import NativeModel
from smart_decoding.models.cpu.native_states import NativeStates
from smart_decoding.models.cpu.panels import KeptPanels, kept_panels
from smart_decoding.models.torch.graphs import GraphedLayers, layers_on
from smart_decoding.models.torch.layers import (
    Context,
    KVCache,
    LayerWeights,
    NativeLayers,
    converted,
    layer_weights,
    norm_weight,
)
from smart_decoding.models.torch.recurrence import RecurrentStates
from smart_decoding.models.torch.rows import BUCKETS, upload
from smart_decoding.models.torch.torch_layers import Linear, rms_norm

if TYPE_CHECKING:
    from smart_decoding.engine.media import MultimodalEmbeddings
    from smart_decoding.engine.rows import Rows
    from smart_decoding.models.families.config import ModelConfig


def rotary_table(
    config: ModelConfig, positions: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin for every position: [positions, angles] float32 each; of layers with a window
    behind those of others, where they differ."""
    inverse, factor = config.inverse_frequencies()
    local = config.local_frequencies()
    by = torch.tensor([factor] * len(inverse) + [1.0] * len(local))
    frequencies = torch.from_numpy(np.concatenate((inverse, local))).float()
    angles = torch.arange(positions).float()[:, None] * frequencies
    return (angles.cos() * by).to(device), (angles.sin() * by).to(device)


def put(x: Tensor, mm_embeds: MultimodalEmbeddings) -> None:
    """Write the embeddings of pictures over those of their placeholders, x [rows, hidden]."""
    for first, part in mm_embeds:
        x[first : first + len(part)] = part


class Decoder:
    """A model of any family with its KV cache.

    dtype is that of weights and cache. On the CPU kernels activations and sums are float32 whatever
    the dtype. native: whether the CPU kernels run it (None: on every CPU, an error where they
    cannot). graphs: whether CUDA graphs do, on a CUDA device."""

    in_bytes = NEVER  # when inputs of quants are rounded to 8 bits
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
        self.config = config
        self.dtype = dtype
        self.device = device
        self.native = use_native(config, device) if native is None else native
        self.work_dtype = torch.float32 if self.native else dtype
        self.graphs = graphs
        norm = norm_weight(weights, "model.norm.weight", dtype, config.shifted_norms)
        self.final_norm = norm.to(device)
        # of embeddings: rounded to their dtype, as transformers does
        self._scale = float(torch.tensor(config.embedding_scale, dtype=dtype))
        self.head: Linear | PackedWeight
        self.embedding: Tensor | PackedWeight
        self.rotary = rotary_table(config, positions, device)
        axes = np.repeat(np.arange(3), config.mrope) if config.mrope else None
        self._axis = None if axes is None else torch.from_numpy(axes).to(device)
        self.kv = KVCache.empty(
            config.kv_layers, config.kv_heads, pages, config.head_dim, dtype, device, self.native
        )
        self.model: NativeModel | None = None  # all of it, where the CPU kernels run it
        if self.native:
            self.model = self._packed(weights)
        else:
            self._load(weights)
        self.hold_states(0)

    def hold_states(self, requests: int) -> None:
        """Make room for the recurrent states of so many requests, if the model has some."""
        config = self.config
        if config.linear is None:
            return
        if self.model is not None:
            self.model.hold(NativeStates(config.linear_layers, config.linear, requests))
        else:
            self.kv.states = RecurrentStates.empty(
                config.linear_layers, config.linear, requests, self.device
            )

    def _get(self, weights: Mapping[str, Matrix], name: str) -> Matrix:
        return converted(weights[name], self.dtype, self.device)

    def _each_layer(self, weights: Mapping[str, Matrix]) -> Iterator[LayerWeights]:
        """Return one layer's weights at a time."""
        numbers = range(self.config.layers)
        for i in tqdm(numbers, "loading", unit="layer", disable=self.quiet, leave=False):
            layer = self.config.layer(i)
            yield layer_weights(layer, weights, f"model.layers.{i}.", self.dtype, self.device)

    def _load(self, weights: Mapping[str, Matrix]) -> None:
        """Bring the weights to the device, as torch reads them."""
        # sums of products that a GPU splits stay in float32
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        self._layers = layers_on(self.device, self._each_layer(weights), self.graphs)
        table = output = as_tensor(self._get(weights, "model.embed_tokens.weight"))
        if not self.config.tie_embeddings:
            output = as_tensor(self._get(weights, "lm_head.weight"))
        self.embedding = table
        self.head = self._output = Linear(output)

    def _packed(self, weights: Mapping[str, Matrix]) -> NativeModel:
        """Pack the weights for the CPU kernels."""
        config = self.config
        self._panels = kept_panels(weights, self.dtype, self.in_bytes != NEVER)
        cached = None if self._panels is None else self._panels.read()
        size = self.dtype.itemsize * sum(map(math.prod, config.expected_shapes().values()))
        self._arena = arena = Arena(size, self.in_bytes, cached)
        layers = NativeLayers(self._each_layer(weights), arena)
        embedding = output = self._get(weights, "model.embed_tokens.weight")
        if not config.tie_embeddings:
            output = self._get(weights, "lm_head.weight")
        self.head = packed = pack([output], arena)
        if config.tie_embeddings:
            self.embedding = packed
        elif isinstance(embedding, QuantizedTensor):
            self.embedding = pack([embedding], arena)
        else:  # a table
            self.embedding = embedding
        return NativeModel(
            layers, self.embedding, packed, self.final_norm, self.kv, self.rotary, self._scale
        )

    def keep_panels(self) -> None:
        """Keep packed quants for later starts, where that is done and they are not kept yet."""
        if self._panels is not None and not self._arena.all_cached:
            self._panels.write(self._arena.strips)

    @property
    def steps(self) -> tuple[int, ...]:
        """Row counts beyond which one more row costs a step: what a pass over the weights serves,
        or a CUDA graph."""
        if isinstance(self.head, PackedWeight):
            return (kernels.pass_rows(self.head),)
        return BUCKETS if isinstance(self._layers, GraphedLayers) else ()

    @property
    def bytes_read(self) -> int:
        """Of packed weights, by a forward that reads all experts: of a table of embeddings it reads
        a few rows."""
        table = self.embedding
        apart = isinstance(table, PackedWeight) and table is not self.head
        return self._arena.nbytes - (table.nbytes if apart else 0)

    @property
    def quantized(self) -> bool:
        """Whether the CPU kernels hold quants."""
        return self.native and bool(self._arena.strips)

    def embed(self, token: Tensor) -> Tensor:
        """Return token embeddings [n, hidden] as they are stored, on torch."""
        assert isinstance(self.embedding, Tensor)  # the kernels look up by themselves
        return self.embedding[token]

    @torch.inference_mode()
    def forward(self, rows: Rows, aux_layers: tuple[int, ...] = ()) -> TargetScores:
        """Runs the rows through all layers. aux_layers: layer counts (4 = after the fourth layer),
        ascending, after which the residual streams are kept, [rows, aux_layers * hidden]. Logits
        are valid until the next forward."""
        context = self._context(rows, aux_layers)
        if self.model is not None:
            native = kernels.native_rows(context.rows, context.cosine, context.sine)
            return self.model.forward(native, rows, aux_layers)
        x = self.embed(context.on_device.token)
        if self._scale != 1:
            x = x * self._scale
        put(x, rows.mm_embeds)
        if aux_layers:
            width = len(aux_layers) * self.config.hidden
            context.aux_hidden = x.new_empty(len(rows), width)
        self._layers(x, context, self.kv)
        if rows.logit_rows is not None:
            x = x[context.on_device.logit_rows]
        logits = self._output(rms_norm(x, self.final_norm, self.config.rms_eps)).float()
        on_cpu = self.device.type == "cpu"
        scores = TargetScores(logits, context.aux_hidden, draws_all=not on_cpu)
        if self.kv.states is not None and context.steps.has_nodes:
            scores.advance = context.steps.advance
        if context.experts:
            scores.experts = sum(context.experts) / len(context.experts)
        return scores

    def _context(self, rows: Rows, aux_layers: tuple[int, ...]) -> Context:
        """M-RoPE rows get rotary tables of their own, in which row i finds its angles at position
        i."""
        if rows.rotary is None:
            return Context(rows, *self.rotary, aux_layers=aux_layers)
        at = upload(rows.rotary, self.device)[:, self._axis]  # [rows, angles]
        cosine, sine = (table.gather(0, at) for table in self.rotary)
        own = replace(rows, position=np.arange(len(rows)))
        return Context(own, cosine, sine, aux_layers=aux_layers)


class RoundingDecoder(Decoder):
    """Inputs of its quants are rounded to 8 bits: faster, and its logits are off by a little."""

    in_bytes = ALWAYS
