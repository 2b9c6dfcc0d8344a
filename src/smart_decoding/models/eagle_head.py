"""An EAGLE head at inference: features and tokens in, hidden states and ranked children out.

EAGLE-3 (arXiv 2503.01840): q, k and v read [norm(embedding) ; norm(features)], the residual is the
un-normalised features, and what is fed back is the output before the last norm. Its output matrix
covers frequent tokens only, which is what makes a level cheap. EAGLE-1/2: fc merges [embedding ;
features] into the layer's input, and the target's own output matrix ranks what comes out.
docs/eagle-heads.md has the conventions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from smart_decoding.core.policies.chooser import Growth
from smart_decoding.core.tree import IntArray
from smart_decoding.drafters.levels import Asked, Ranked
from smart_decoding.engine.kv import PAGE
from smart_decoding.engine.protocols import Grown
from smart_decoding.engine.rows import Rows
from smart_decoding.errors import ModelError
from smart_decoding.kernels import ops as kernels
from smart_decoding.kernels.ops import Arena, packed_rows
from smart_decoding.models.config import ModelConfig
from smart_decoding.models.decoder import layer_weights, put, rotary_table
from smart_decoding.models.head_files import FIRST, HeadFiles, layer_prefixes
from smart_decoding.models.kernel_check import unserved
from smart_decoding.models.layers import (
    Context,
    KVCache,
    Layers,
    Linear,
    NativeLayers,
    TorchLayers,
    Workspace,
    rms_norm,
)
from smart_decoding.models.native_level import Features, NativeLevel, Part, as_tensor
from smart_decoding.models.ranking import ranked


class OutputMatrix(Protocol):
    """The target's: [rows, hidden] -> logits [rows, vocab]."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def without_norm(self) -> OutputMatrix:
        """Without the target's final norm before it."""
        ...

    def rows_of(self, index: Tensor) -> Tensor:
        """Rows of the weight: [n, hidden]."""
        ...


class TargetWeights(Protocol):
    """What a head borrows of its target. native: whether the head runs on the CPU kernels;
    work_dtype: of activations. final_norm: None if the aux_layers of an EAGLE-1/2 head come through
    it already. embedding: packed or as a table, None if only `embed` knows."""

    config: ModelConfig
    native: bool
    dtype: torch.dtype
    work_dtype: torch.dtype
    device: torch.device
    workspace: Workspace
    final_norm: Tensor | None

    @property
    def head(self) -> OutputMatrix: ...

    @property
    def embedding(self) -> Linear | Tensor | None: ...

    def embed(self, token: Tensor) -> Tensor:
        """[n, hidden] in the working dtype."""
        ...


class EagleHead:
    """The head on the target's device; its keys live in pages with the target's numbers, plus
    scratch for the tree."""

    def __init__(
        self,
        files: HeadFiles,
        target: TargetWeights,
        pages: int,
        scratch_pages: int,
        positions: int,
    ) -> None:
        c = files.shape
        self.config, self.native, self._target = c, target.native, target
        dtype, device = target.dtype, target.device
        reason = unserved(c) if self.native else None
        if reason is not None:
            raise ModelError(
                f"the CPU kernels do not serve this head: {reason}; take another head or method"
            )
        self.device, self.work_dtype = device, target.work_dtype
        weights = {name: tensor.to(device) for name, tensor in files.weights.items()}

        def get(name: str) -> Tensor:
            return weights[name].to(dtype)

        self.aux_layers, self._aux_count = files.aux_layers, len(files.aux_layers)
        self.draft_ids = weights["draft_ids"].long()
        self.shape = (
            c.layers,
            c.hidden,
            c.ffn,
            len(self.draft_ids),
            self._aux_count,
        )  # what a level's cost depends on
        layers = [
            layer_weights(c, weights, at, dtype, device, at != FIRST)
            for at in layer_prefixes(c.layers)
        ]
        self.sees = files.sees
        self._fused, self._norm_before_residual = files.fused, files.norm_before_residual
        self._normed_taps = "fc_norm.0.weight" in weights
        fc = _fc_with_norms(weights, self._aux_count) if self._normed_taps else weights["fc.weight"]
        rows = None if self._fused else self._output_rows(weights).to(dtype)
        own = weights.get("embed_tokens.weight")
        self._embedding = None if own is None else own.to(dtype).contiguous()
        whole = self._runs_whole_levels(fc)
        arena = None
        if self.native:
            size = sum(layer.elements() for layer in layers) + packed_rows(len(fc)) * fc.shape[1]
            arena = Arena(
                size + (0 if rows is None or whole else packed_rows(len(rows)) * c.hidden), dtype
            )
        self._layers: Layers = (
            NativeLayers(layers, arena, target.workspace) if arena else TorchLayers(layers)
        )
        bias = get("fc.bias") if "fc.bias" in weights else None
        self._fc = Linear(fc.to(dtype), self.native, arena, bias=bias)
        wide = torch.float32 if self.native else dtype
        self._ones = torch.ones(c.hidden, dtype=wide, device=device)
        self._level: NativeLevel | None = None
        if rows is None:
            norm = target.final_norm
            self._head: OutputMatrix = target.head.without_norm()
            self._final_norm = None if norm is None else norm.to(wide)
        else:
            self._input_norm = get("midlayer.input_layernorm.weight").to(wide)
            self._hidden_norm = get("midlayer.hidden_norm.weight").to(wide)
            if whole:
                self._level = self._whole_level(rows, get("norm.weight").to(wide))
            else:
                self._head = Linear(rows, self.native, arena, get("norm.weight"), c.rms_eps)
        self.grows = self._level is not None
        self._outs: list[Tensor] = []  # of a round, where levels are no single call
        self.allocate(pages + scratch_pages, positions)

    def _runs_whole_levels(self, fc: Tensor) -> bool:
        """Whether a level is one call of the CPU kernels."""
        c = self.config
        fits = not self._fused and c.layers == 1 and fc.shape[1] == self._aux_count * c.hidden
        return (
            self.native
            and fits
            and (self._embedding is not None or self._target.embedding is not None)
        )

    def _whole_level(self, outputs: Tensor, final_norm: Tensor) -> NativeLevel:
        assert isinstance(self._layers, NativeLayers)
        norms = (
            self._ones if self._normed_taps else None,
            self._input_norm,
            self._hidden_norm,
            final_norm,
        )
        embedding = self._target.embedding if self._embedding is None else self._embedding
        assert embedding is not None
        return NativeLevel(
            self._layers,
            self._fc,
            outputs,
            self.draft_ids,
            norms,
            embedding,
            self._aux_count,
            self._norm_before_residual,
        )

    def allocate(self, pages: int, positions: int) -> None:
        """Makes room for keys, anew, and for positions below `positions`."""
        c = self.config
        self._rotary = rotary_table(c, positions, self.device)
        dtype = self._target.dtype
        self.kv = KVCache.empty(
            c.layers, c.kv_heads, pages, c.head_dim, dtype, self.device, self.native
        )

    def first(self, rows: Rows, parts: Sequence[Part], last: IntArray, asked: Asked) -> Ranked:
        """Begins a round: runs pairs of tokens and features, and ranks children after the `last`
        ones."""
        if self._level is not None:
            return self._level.first(rows, parts, self._rotary, self.kv, asked)
        self._outs = [
            self.take(self.run(rows, self.project([as_tensor(part) for part in parts])), last)
        ]
        return self.rank(self._outs[0], asked)

    def deeper(self, rows: Rows, above: IntArray, asked: Asked) -> Ranked:
        """Runs nodes below earlier outputs of this round, and ranks their children."""
        if self._level is not None:
            return self._level.deeper(rows, above, self._rotary, self.kv, asked)
        self._outs.append(self.run(rows, self.take(torch.cat(self._outs), above)))
        return self.rank(self._outs[-1], asked)

    def grow(
        self, rows: Rows, parts: Sequence[Part], asked: Asked, slots: range, growth: Growth
    ) -> Grown:
        """All levels of a round in one call."""
        assert self._level is not None
        return self._level.grow(rows, parts, self._rotary, self.kv, asked, slots, growth)

    @torch.inference_mode()
    def project(self, parts: Sequence[Tensor]) -> Tensor:
        """Projects aux hidden states [n_i, aux_layers * hidden] of several requests to features
        [sum n_i, hidden]."""
        aux_layers = torch.cat(list(parts)).to(self.device, self.work_dtype)
        if self._fused:  # the target's features as its own output matrix sees them
            norm = self._final_norm
            return (
                aux_layers
                if norm is None
                else self._norm(aux_layers, norm, self._target.config.rms_eps)
            )
        if not self._normed_taps:
            return self._fc(aux_layers)
        flat = aux_layers.reshape(-1, self.config.hidden)
        return self._fc(self._norm(flat, self._ones).view(len(aux_layers), -1))

    @torch.inference_mode()
    def run(self, rows: Rows, g: Tensor) -> Tensor:
        """One pass over pairs (g [rows, hidden], rows.token): the outputs [rows, hidden], fed back
        as g."""
        embedded = self._embed(torch.from_numpy(rows.token).to(self._target.device))
        put(embedded, rows.mm_embeds)
        if self._fused:
            x = self._fc(torch.cat((embedded, g), dim=-1))
            put(x, rows.mm_embeds)  # MSD: of a visual position the layer reads the embedding alone
            inputs = x.clone()
        else:
            x = self._norm(g, self._hidden_norm) if self._norm_before_residual else g.clone()
            inputs = self._inputs(embedded, g)
        self._layers(x, Context(rows, *self._rotary, inputs=inputs), self.kv)
        return x

    def take(self, features: Features, rows: IntArray) -> Tensor:
        """Rows of features or outputs: [rows, width], a copy."""
        features = torch.as_tensor(features)
        return features[torch.from_numpy(rows).to(features.device)]

    def copy_page(self, source: int, target: int) -> None:
        """Copies the keys of page `source` to a later page `target`."""
        slots = torch.arange(PAGE, dtype=torch.int32)
        self.kv.move(source * PAGE + slots, target * PAGE + slots)

    @torch.inference_mode()
    def rank(self, out: Tensor, asked: Asked) -> Ranked:
        """The most likely next tokens after every output and their probabilities: [rows, k]; see
        `ranked`."""
        return ranked(self._head(out), self.draft_ids, asked, self.native)

    def blank(self, rows: int) -> Tensor:
        """Aux hidden states of `rows` rows, of arbitrary content."""
        return torch.ones(
            rows,
            self._aux_count * self._target.config.hidden,
            dtype=self.work_dtype,
            device=self.device,
        )

    def _embed(self, token: Tensor) -> Tensor:
        return (
            self._target.embed(token)
            if self._embedding is None
            else self._embedding[token].to(self.work_dtype)
        )

    def _output_rows(self, weights: Mapping[str, Tensor]) -> Tensor:
        """[draft, hidden] the head's own output matrix, or the target's rows."""
        return (
            weights["lm_head.weight"]
            if "lm_head.weight" in weights
            else self._target.head.rows_of(self.draft_ids)
        )

    def _inputs(self, embedded: Tensor, g: Tensor) -> Tensor:
        if not self.native:
            parts = (self._norm(embedded, self._input_norm), self._norm(g, self._hidden_norm))
            return torch.cat(parts, dim=-1)
        out = torch.empty(len(g), 2 * self.config.hidden)
        kernels.rms_norm(embedded.contiguous(), self._input_norm, self.config.rms_eps, out)
        kernels.rms_norm(
            g.contiguous(), self._hidden_norm, self.config.rms_eps, out, self.config.hidden
        )
        return out

    def _norm(self, x: Tensor, weight: Tensor, eps: float | None = None) -> Tensor:
        eps = self.config.rms_eps if eps is None else eps
        if not self.native:
            return rms_norm(x, weight, eps)
        out = torch.empty_like(x)
        kernels.rms_norm(x.contiguous(), weight, eps, out)
        return out


def _fc_with_norms(weights: Mapping[str, Tensor], aux_layers: int) -> Tensor:
    """fc with the taps' norm weights folded into its columns."""
    fc = weights["fc.weight"].float()
    scales = [weights[f"fc_norm.{i}.weight"].float() for i in range(aux_layers)]
    return fc * torch.cat(scales)[None]
