"""An EAGLE-3 style head at inference: features and tokens in, hidden states and ranked children out.

Layout: docs of EAGLE-3 (arXiv 2503.01840): q, k and v read [norm(embedding) ; norm(features)], the residual is the
un-normalised features, and what is fed back is the output before the last norm. Its output matrix is a subset of the
target's rows (frequent tokens), which is what makes a level cheap.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from smart_decoding.backends.torch import kernels
from smart_decoding.backends.torch.config import ModelConfig
from smart_decoding.backends.torch.decoder import Decoder, rotary_table
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
from smart_decoding.core.tree import FloatArray, IntArray
from smart_decoding.engine.rows import Rows
from smart_decoding.errors import ModelError

ARCHITECTURE = "SmartEagle3Head"


@dataclass(frozen=True, slots=True)
class HeadFiles:
    """A head as read from disk, checked against the target."""

    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    taps: tuple[int, ...]


def load_head(folder: Path, target: ModelConfig) -> HeadFiles:
    """Reads a head and checks that it fits the target. Raises ModelError naming what does not."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except FileNotFoundError as error:
        raise ModelError(f"{folder} is not a draft head: it has no config.json") from error
    except ValueError as error:
        raise ModelError(f"config.json in {folder} is corrupt: {error}") from error
    if config.get("architectures") != [ARCHITECTURE]:
        raise ModelError(f"{folder} holds {config.get('architectures')}, not a {ARCHITECTURE} that smart train wrote")
    wanted = {"hidden_size": target.hidden, "vocab_size": target.vocab, "target_num_hidden_layers": target.layers}
    for name, value in wanted.items():
        if config.get(name) != value:
            raise ModelError(f"the head in {folder} has {name} {config.get(name)}, but the model has {value}")
    try:
        weights = load_file(folder / "model.safetensors")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"model.safetensors in {folder} is missing or corrupt ({error})") from error
    taps = tuple(int(tap) for tap in config["taps"])
    _check_shapes(folder, weights, target, taps)
    return HeadFiles(config, weights, taps)


def _check_shapes(folder: Path, weights: Mapping[str, Tensor], c: ModelConfig, taps: tuple[int, ...]) -> None:
    q, kv, d = c.heads * c.head_dim, c.kv_heads * c.head_dim, c.hidden
    shapes = {
        "fc.weight": (d, len(taps) * d),
        "norm.weight": (d,),
        **{f"midlayer.{name}.weight": (d,) for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm")},
        "midlayer.self_attn.q_proj.weight": (q, 2 * d),
        "midlayer.self_attn.k_proj.weight": (kv, 2 * d),
        "midlayer.self_attn.v_proj.weight": (kv, 2 * d),
        "midlayer.self_attn.o_proj.weight": (d, q),
        "midlayer.mlp.gate_proj.weight": (c.ffn, d),
        "midlayer.mlp.up_proj.weight": (c.ffn, d),
        "midlayer.mlp.down_proj.weight": (d, c.ffn),
    }
    for name, shape in shapes.items():
        if name not in weights:
            raise ModelError(f"the head in {folder} lacks the tensor {name}")
        if tuple(weights[name].shape) != shape:
            raise ModelError(f"the head's {name} has shape {tuple(weights[name].shape)}, but the model needs {shape}")
    ids = weights.get("draft_ids")
    if ids is None or not len(ids) or int(ids.min()) < 0 or int(ids.max()) >= c.vocab:
        raise ModelError(f"the head in {folder} lacks draft_ids within the model's vocabulary")


class EagleHead:
    """The head on the target's device; its keys live in pages with the target's numbers, plus scratch for the tree."""

    def __init__(self, files: HeadFiles, target: Decoder, pages: int, scratch_pages: int, positions: int) -> None:
        c = replace(target.config, layers=1)
        self.config, self.native, self._target = c, target.native, target
        dtype, device = target.dtype, target.device
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
        )
        fc, rows = _fc_with_norms(weights, self._tap_count).to(dtype), target.head.rows_of(self.draft_ids).to(dtype)
        arena = None
        if self.native:
            size = layer.elements() + packed_rows(len(fc)) * fc.shape[1] + packed_rows(len(rows)) * c.hidden
            arena = Arena(size, dtype)
        self._layers: Layers = NativeLayers([layer], arena, target.workspace) if arena else TorchLayers([layer])
        self._fc = Linear(fc, self.native, arena)
        self._head = Linear(rows, self.native, arena, get("norm.weight"), c.rms_eps)
        wide = torch.float32 if self.native else dtype
        self._input_norm = get("midlayer.input_layernorm.weight").to(wide)
        self._hidden_norm = get("midlayer.hidden_norm.weight").to(wide)
        self._ones = torch.ones(c.hidden, dtype=wide, device=device)
        self._rotary = rotary_table(c, positions, device)
        self.kv = KVCache.empty(1, c.kv_heads, pages + scratch_pages, c.head_dim, dtype, device)

    @torch.inference_mode()
    def project(self, parts: Sequence[Tensor]) -> Tensor:
        """Projects tapped states [n_i, taps * hidden] of several requests to features [sum n_i, hidden]."""
        taps = torch.cat(list(parts))
        flat = taps.reshape(-1, self.config.hidden)
        return self._fc(self._norm(flat, self._ones).view(len(taps), -1))

    @torch.inference_mode()
    def run(self, rows: Rows, g: Tensor) -> Tensor:
        """One pass over pairs (g [rows, hidden], rows.token): the outputs [rows, hidden], fed back as g."""
        embedded = self._target.embed(torch.from_numpy(rows.token).to(self._target.device))
        x = g.clone()
        self._layers(x, Context(rows, *self._rotary), self.kv, self._inputs(embedded, x))
        return x

    def take(self, outs: Sequence[Tensor], rows: IntArray) -> Tensor:
        """Rows of the concatenation of earlier outputs: [rows, hidden]."""
        all_rows = outs[0] if len(outs) == 1 else torch.cat(list(outs))
        return all_rows[torch.from_numpy(rows).to(all_rows.device)]

    @torch.inference_mode()
    def rank(self, out: Tensor, rows: IntArray, k: int, temperature: FloatArray) -> tuple[IntArray, FloatArray]:
        """The k most likely next tokens after outputs `rows` and their probabilities (softmax over the draft
        vocabulary at each row's temperature, 1 for greedy rows): [rows, k], best first."""
        logits = self._head(out[torch.from_numpy(rows).to(out.device)])
        k = min(k, len(self.draft_ids))
        scale = np.where(temperature > 0, 1.0 / np.maximum(temperature, 1e-3), 1.0)
        ids, probs = np.empty((len(rows), k), np.int64), np.empty((len(rows), k))
        for value in set(scale.tolist()):  # usually one
            which = np.flatnonzero(scale == value)
            part = logits if len(which) == len(rows) else logits[torch.from_numpy(which)]
            found, top = self._top(part, k, float(value))
            ids[which], probs[which] = self.draft_ids[found].cpu().numpy(), top.cpu().numpy()
        return ids, probs

    def _top(self, logits: Tensor, k: int, scale: float) -> tuple[Tensor, Tensor]:
        if self.native:
            return kernels.top_k(logits.contiguous(), k, scale)
        top, ids = logits.float().topk(k)
        return ids, (top * scale - (logits.float() * scale).logsumexp(-1, keepdim=True)).exp()

    def _inputs(self, embedded: Tensor, g: Tensor) -> Tensor:
        if not self.native:
            parts = (self._norm(embedded, self._input_norm), self._norm(g, self._hidden_norm))
            return torch.cat(parts, dim=-1)
        out = torch.empty(len(g), 2 * self.config.hidden)
        kernels.rms_norm(embedded.contiguous(), self._input_norm, self.config.rms_eps, out)
        kernels.rms_norm(g.contiguous(), self._hidden_norm, self.config.rms_eps, out, self.config.hidden)
        return out

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        if not self.native:
            return rms_norm(x, weight, self.config.rms_eps)
        out = torch.empty_like(x)
        kernels.rms_norm(x.contiguous(), weight, self.config.rms_eps, out)
        return out


def _fc_with_norms(weights: Mapping[str, Tensor], taps: int) -> Tensor:
    """fc with the taps' norm weights folded into its columns."""
    fc = weights["fc.weight"].float()
    scales = [weights[f"fc_norm.{i}.weight"].float() for i in range(taps)]
    return fc * torch.cat(scales)[None]
