"""An EAGLE head at inference: features and tokens in, hidden states and ranked children out.

EAGLE-3 (arXiv 2503.01840): q, k and v read [norm(embedding) ; norm(features)], the residual is the un-normalised
features, and what is fed back is the output before the last norm. Its output matrix covers frequent tokens only, which
is what makes a level cheap. EAGLE-1/2: fc merges [embedding ; features] into the layer's input, and the target's own
output matrix ranks what comes out. docs/eagle-heads.md has the conventions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from smart_decoding.backends.torch import kernels
from smart_decoding.backends.torch.decoder import Decoder, put, rotary_table, use_native
from smart_decoding.backends.torch.head_files import HeadFiles
from smart_decoding.backends.torch.kernels import Arena, packed_rows
from smart_decoding.backends.torch.layers import (
    Context,
    KVCache,
    Layers,
    LayerWeights,
    Linear,
    NativeLayers,
    TorchLayers,
    rms_norm,
)
from smart_decoding.backends.torch.ranking import ranked
from smart_decoding.core.tree import FloatArray, IntArray
from smart_decoding.drafters.levels import Draw
from smart_decoding.engine.kv import PAGE
from smart_decoding.engine.rows import Rows
from smart_decoding.errors import ModelError


class EagleHead:
    """The head on the target's device; its keys live in pages with the target's numbers, plus scratch for the tree."""

    def __init__(self, files: HeadFiles, target: Decoder, pages: int, scratch_pages: int, positions: int) -> None:
        c = files.shape
        self.config, self.native, self._target = c, target.native, target
        dtype, device = target.dtype, target.device
        if self.native and not use_native(c, device):
            raise ModelError(f"the CPU kernels do not serve a head of {c.heads} heads of {c.head_dim} dimensions")
        self.device, self.work_dtype = device, target.work_dtype
        weights = {name: tensor.to(device) for name, tensor in files.weights.items()}

        def get(name: str) -> Tensor:
            return weights[name].to(dtype)

        self.taps, self._tap_count = files.taps, len(files.taps)
        self.draft_ids = weights["draft_ids"].long()
        self.shape = (c.hidden, c.ffn, len(self.draft_ids), self._tap_count)  # what a level's cost depends on
        layer = LayerWeights(
            heads=c.heads,
            kv_heads=c.kv_heads,
            head_dim=c.head_dim,
            eps=c.rms_eps,
            qkv=torch.cat([get(f"midlayer.self_attn.{n}_proj.weight") for n in "qkv"]),
            output=get("midlayer.self_attn.o_proj.weight"),
            gate=get("midlayer.mlp.gate_proj.weight"),
            up=get("midlayer.mlp.up_proj.weight"),
            down=get("midlayer.mlp.down_proj.weight"),
            post_norm=get("midlayer.post_attention_layernorm.weight"),
            qkv_bias=torch.cat([get(f"midlayer.self_attn.{n}_proj.bias") for n in "qkv"]) if c.qkv_bias else None,
            output_bias=get("midlayer.self_attn.o_proj.bias") if c.o_bias else None,
        )
        self.sees = files.sees
        self._fused, self._norm_before_residual = files.fused, files.norm_before_residual
        self._normed_taps = "fc_norm.0.weight" in weights
        fc = _fc_with_norms(weights, self._tap_count) if self._normed_taps else weights["fc.weight"]
        rows = None if self._fused else self._output_rows(weights).to(dtype)
        arena = None
        if self.native:
            size = layer.elements() + packed_rows(len(fc)) * fc.shape[1]
            arena = Arena(size + (0 if rows is None else packed_rows(len(rows)) * c.hidden), dtype)
        self._layers: Layers = NativeLayers([layer], arena, target.workspace) if arena else TorchLayers([layer])
        bias = get("fc.bias") if "fc.bias" in weights else None
        self._fc = Linear(fc.to(dtype), self.native, arena, bias=bias)
        own = weights.get("embed_tokens.weight")
        self._embedding = None if own is None else own.to(dtype)
        wide = torch.float32 if self.native else dtype
        if rows is None:
            self._head, self._final_norm = target.head.without_norm(), target.final_norm.to(wide)
        else:
            self._head = Linear(rows, self.native, arena, get("norm.weight"), c.rms_eps)
            self._input_norm = get("midlayer.input_layernorm.weight").to(wide)
            self._hidden_norm = get("midlayer.hidden_norm.weight").to(wide)
        self._ones = torch.ones(c.hidden, dtype=wide, device=device)
        self._rotary = rotary_table(c, positions, device)
        self.kv = KVCache.empty(1, c.kv_heads, pages + scratch_pages, c.head_dim, dtype, device)

    @torch.inference_mode()
    def project(self, parts: Sequence[Tensor]) -> Tensor:
        """Projects tapped states [n_i, taps * hidden] of several requests to features [sum n_i, hidden]."""
        taps = torch.cat(list(parts))
        if self._fused:  # the target's features as its own output matrix sees them
            return self._norm(taps, self._final_norm, self._target.config.rms_eps)
        if not self._normed_taps:
            return self._fc(taps)
        flat = taps.reshape(-1, self.config.hidden)
        return self._fc(self._norm(flat, self._ones).view(len(taps), -1))

    @torch.inference_mode()
    def run(self, rows: Rows, g: Tensor) -> Tensor:
        """One pass over pairs (g [rows, hidden], rows.token): the outputs [rows, hidden], fed back as g."""
        embedded = self._embed(torch.from_numpy(rows.token).to(self._target.device))
        put(embedded, rows.inserts)
        if self._fused:
            x = self._fc(torch.cat((embedded, g), dim=-1))
            put(x, rows.inserts)  # MSD: of a visual position the layer reads the embedding alone
            inputs = x.clone()
        else:
            x = self._norm(g, self._hidden_norm) if self._norm_before_residual else g.clone()
            inputs = self._inputs(embedded, g)
        self._layers(x, Context(rows, *self._rotary, inputs=inputs), self.kv)
        return x

    def take(self, outs: Sequence[Tensor], rows: IntArray) -> Tensor:
        """Rows of the concatenation of earlier outputs, or of features: [rows, width], a copy."""
        all_rows = outs[0] if len(outs) == 1 else torch.cat(list(outs))
        return all_rows[torch.from_numpy(rows).to(all_rows.device)]

    def copy_page(self, source: int, target: int) -> None:
        """Copies the keys of page `source` to a later page `target`."""
        slots = torch.arange(PAGE, dtype=torch.int32)
        self.kv.move(source * PAGE + slots, target * PAGE + slots)

    @torch.inference_mode()
    def rank(self, out: Tensor, k: int, temperature: FloatArray, draws: Sequence[Draw]) -> tuple[IntArray, FloatArray]:
        """The k most likely next tokens after every output and their probabilities: [rows, k]; see `ranked`."""
        return ranked(self._head(out), self.draft_ids, k, temperature, draws, self.native)

    def rehearse(self, rows: Rows) -> None:
        """A level on arbitrary features, to be timed."""
        g = torch.ones(len(rows), self.config.hidden, dtype=self.work_dtype, device=self.device)
        self.rank(self.run(rows, g), 8, np.zeros(len(rows)), [])

    def _embed(self, token: Tensor) -> Tensor:
        return self._target.embed(token) if self._embedding is None else self._embedding[token].to(self.work_dtype)

    def _output_rows(self, weights: Mapping[str, Tensor]) -> Tensor:
        """[draft, hidden] the head's own output matrix, or the target's rows."""
        return weights["lm_head.weight"] if "lm_head.weight" in weights else self._target.head.rows_of(self.draft_ids)

    def _inputs(self, embedded: Tensor, g: Tensor) -> Tensor:
        if not self.native:
            parts = (self._norm(embedded, self._input_norm), self._norm(g, self._hidden_norm))
            return torch.cat(parts, dim=-1)
        out = torch.empty(len(g), 2 * self.config.hidden)
        kernels.rms_norm(embedded.contiguous(), self._input_norm, self.config.rms_eps, out)
        kernels.rms_norm(g.contiguous(), self._hidden_norm, self.config.rms_eps, out, self.config.hidden)
        return out

    def _norm(self, x: Tensor, weight: Tensor, eps: float | None = None) -> Tensor:
        eps = self.config.rms_eps if eps is None else eps
        if not self.native:
            return rms_norm(x, weight, eps)
        out = torch.empty_like(x)
        kernels.rms_norm(x.contiguous(), weight, eps, out)
        return out


def _fc_with_norms(weights: Mapping[str, Tensor], taps: int) -> Tensor:
    """fc with the taps' norm weights folded into its columns."""
    fc = weights["fc.weight"].float()
    scales = [weights[f"fc_norm.{i}.weight"].float() for i in range(taps)]
    return fc * torch.cat(scales)[None]
