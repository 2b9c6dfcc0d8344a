"""Decoder layers in plain torch: the reference, and the path for CUDA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from smart_decoding.kernels.weights import as_tensor

if TYPE_CHECKING:
    from smart_decoding.models.layers import Context, KVCache, LayerWeights


class TorchLayers:
    """The same in plain torch: the reference, and the path for CUDA. Works in the weights'
    dtype."""

    def __init__(self, layers: Sequence[LayerWeights]) -> None:
        self.each = [TorchLayer(w) for w in layers]

    def __call__(self, x: Tensor, context: Context, cache: KVCache) -> None:
        """See `Layers`."""
        for i, layer in enumerate(self.each):
            q, k, v = layer.before(x, *context.rotation, context.inputs if i == 0 else None)
            layer.after(x, attend(q, k, v, context, cache.keys[i], cache.values[i]))
            context.keep_aux(i + 1, x)


class TorchLayer:
    """A layer's two halves, before and after attention: what of it depends on nothing but its
    rows."""

    def __init__(self, w: LayerWeights) -> None:
        self._qkv = torch.cat([as_tensor(part) for part in w.qkv])
        self._output = as_tensor(w.output)
        self._gate_up = torch.cat((as_tensor(w.gate), as_tensor(w.up)))
        self._down = as_tensor(w.down)
        w.qkv = (self._qkv,)  # which frees those that were given
        w.gate, w.up = self._gate_up.chunk(2)
        self.weights = w

    def before(
        self, x: Tensor, cosine: Tensor, sine: Tensor, inputs: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [rows, heads, head_dim], and keys and values [rows, kv_heads, head_dim], for x
        [rows, hidden]."""
        w = self.weights
        normed = inputs if inputs is not None else rms_norm(x, w.input_norm, w.eps)
        qkv = F.linear(normed, self._qkv, w.qkv_bias).view(len(x), -1, w.head_dim)
        q, k, v = torch.split(qkv, [w.heads, w.kv_heads, w.kv_heads], dim=1)
        if w.q_norm is not None:
            q = rms_norm(q, w.q_norm, w.eps)
            k = rms_norm(k, w.k_norm, w.eps)
        return rotate(q, cosine, sine), rotate(k, cosine, sine), v

    def after(self, x: Tensor, attended: Tensor) -> None:
        """Adds to x what was attended to, [rows, heads * head_dim], and the feed-forward
        network."""
        w = self.weights
        x += F.linear(attended, self._output, w.output_bias)
        gate, up = F.linear(rms_norm(x, w.post_norm, w.eps), self._gate_up).chunk(2, dim=-1)
        x += F.linear(F.silu(gate) * up, self._down)


def attend(
    q: Tensor, k: Tensor, v: Tensor, context: Context, keys: Tensor, values: Tensor
) -> Tensor:
    """Attention of all rows over the cache, their own keys and values included: [rows, heads *
    head_dim].

    Query heads that share keys are more queries of one head: so torch's memory-saving kernel takes
    it, which knows neither flash attention's lack of masks nor a grouping of heads."""
    rows = context.gathered
    for cache, new in ((keys, k), (values, v)):
        cache[:, rows.page, rows.offset] = new.transpose(0, 1).to(cache.dtype)
    groups, longest = rows.shape
    heads, width = q.shape[1:]
    kv_heads = k.shape[1]
    if not rows.even:
        padded = q.new_zeros(groups * longest, heads, width)
        padded[rows.query] = q
        q = padded
    k, v = (  # [groups, kv_heads, k, head_dim]
        cache[:, rows.key_page, rows.key_offset].transpose(0, 1).to(q.dtype)
        for cache in (keys, values)
    )
    folded = (
        q.view(groups, longest, kv_heads, -1, width)
        .permute(0, 2, 3, 1, 4)
        .reshape(groups, kv_heads, -1, width)
    )
    out = F.scaled_dot_product_attention(
        folded, k, v, attn_mask=rows.bias(heads // kv_heads, q.dtype)
    )
    out = (
        out.view(groups, kv_heads, -1, longest, width)
        .permute(0, 3, 1, 2, 4)
        .reshape(groups * longest, -1)
    )
    return out if rows.even else out[rows.query]


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, computed in float32."""
    if weight is None:
        return x
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding of x [rows, heads, head_dim], half-split layout; cosine, sine [rows,
    head_dim / 2]."""
    cosine, sine = (part[:, None].to(x.dtype) for part in (cosine, sine))
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cosine - b * sine, b * cosine + a * sine), dim=-1)
