"""Decoder layers on torch's matrix products: the reference, and the path for CUDA.

What lies between the products comes in two forms: plain torch, the reference, and Triton
kernels (triton_ops.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from smart_decoding.engine.kv import PAGE
from smart_decoding.errors import ConfigError
from smart_decoding.kernels.weights import as_tensor

if TYPE_CHECKING:
    from smart_decoding.engine.rows import Ints, Rows
    from smart_decoding.models.layers import Context, KVCache, LayerWeights
    from smart_decoding.models.triton_ops import TritonOps

    Ops: TypeAlias = "TorchOps | TritonOps"


class TorchLayers:
    """Layers one after another, every kernel launched by itself. Works in the weights' dtype."""

    def __init__(self, layers: Iterable[LayerWeights], ops: Ops) -> None:
        self.each = [TorchLayer(w, ops) for w in layers]  # one layer's parts at a time

    def __call__(self, x: Tensor, context: Context, cache: KVCache) -> None:
        """See `Layers`."""
        inputs = context.inputs
        for i, (layer, (keys, values)) in enumerate(zip(self.each, cache.layers, strict=True), 1):
            layer(x, context, inputs, keys, values)
            inputs = None
            context.keep_aux(i, x)


class TorchLayer:
    """One layer: four matrix products, two norms, and what `ops` do between them."""

    def __init__(self, w: LayerWeights, ops: Ops) -> None:
        self._ops = ops
        self._qkv = torch.cat([as_tensor(part) for part in w.qkv])
        self._gate_up = torch.cat((as_tensor(w.gate), as_tensor(w.up)))
        self._output = as_tensor(w.output).t()
        self._down = as_tensor(w.down).t()
        w.qkv = (self._qkv,)  # which frees those that were given
        w.gate, w.up = self._gate_up.chunk(2)
        self.weights = w

    def __call__(
        self, x: Tensor, context: Context, inputs: Tensor | None, keys: Tensor, values: Tensor
    ) -> None:
        """Adds the layer's outputs to x [rows, hidden]. inputs: what q, k and v read, if not the
        normed x."""
        w = self.weights
        normed = inputs if inputs is not None else rms_norm(x, w.input_norm, w.eps)
        q = self._ops.write(F.linear(normed, self._qkv, w.qkv_bias), w, context, keys, values)
        x.addmm_(self._ops.attend(q, context, keys, values), self._output)
        if w.output_bias is not None:
            x += w.output_bias
        gate_up = F.linear(rms_norm(x, w.post_norm, w.eps), self._gate_up)
        x.addmm_(self._ops.gate(gate_up), self._down)


Slots: TypeAlias = tuple[Tensor, Tensor]  # pages, and offsets in them


class GroupedRows:
    """The rows of a forward as `TorchOps` read them.

    own: [rows] where each row's key goes. groups: of each group its rows, the slots [k] that it
    reads, and which of them each row reads [rows, k]."""

    def __init__(self, rows: Rows, device: torch.device) -> None:
        def slots(of: Ints) -> Slots:
            at = torch.from_numpy(of.astype(np.int64)).to(device)
            return at // PAGE, at % PAGE

        self.own = slots(rows.slot_mapping)
        self.groups: list[tuple[slice, Slots, Tensor]] = []
        for g, (first, last) in enumerate(itertools.pairwise(rows.query_start_loc.tolist())):
            context = rows.context_len[first:last, None]
            at = np.arange(context.max())
            pages = rows.pages[rows.block_table_start[g] + at // PAGE]
            begin = rows.ancestors_start[first : last + 1]
            of_row = np.repeat(np.arange(first, last), np.diff(begin))
            own = of_row == np.arange(first, last)[:, None]
            read = np.concatenate((pages * PAGE + at % PAGE, rows.ancestors[begin[0] : begin[-1]]))
            mask = torch.from_numpy(np.concatenate((at < context, own), axis=1)).to(device)
            self.groups.append((slice(first, last), slots(read), mask))


class TorchOps:
    """What of a layer is neither a product with its weights nor a norm of all of a row."""

    def write(
        self, qkv: Tensor, w: LayerWeights, context: Context, keys: Tensor, values: Tensor
    ) -> Tensor:
        """The queries [rows, heads, head_dim] of qkv [rows, (heads + 2 * kv_heads) * head_dim],
        normed and rotated. Keys, treated alike, and values go to the cache."""
        each = qkv.view(len(qkv), -1, w.head_dim)
        q, k, v = torch.split(each, [w.heads, w.kv_heads, w.kv_heads], dim=1)
        q = rotate(rms_norm(q, w.q_norm, w.eps), *context.rotation)
        k = rotate(rms_norm(k, w.k_norm, w.eps), *context.rotation)
        page, offset = context.grouped.own
        for cache, new in ((keys, k), (values, v)):
            cache[:, page, offset] = new.transpose(0, 1).to(cache.dtype)
        return q

    def attend(self, q: Tensor, context: Context, keys: Tensor, values: Tensor) -> Tensor:
        """What each row attends to, its own key and value included: [rows, heads * head_dim]."""
        parts = []
        for rows, (page, offset), mask in context.grouped.groups:
            k, v = (cache[:, page, offset].to(q.dtype) for cache in (keys, values))
            parts.append(
                F.scaled_dot_product_attention(
                    q[rows].transpose(0, 1)[None], k[None], v[None], mask, enable_gqa=True
                )[0].transpose(0, 1)
            )
        return torch.cat(parts).flatten(1)

    def gate(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up of [rows, 2 * ffn]: [rows, ffn]."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up


def ops_for(device: torch.device) -> Ops:
    """Triton's kernels on CUDA, else the reference. Raises ConfigError where Triton is missing."""
    if device.type != "cuda":
        return TorchOps()
    try:
        from smart_decoding.models.triton_ops import TritonOps
    except ImportError as error:
        raise ConfigError(
            "device='cuda' needs Triton, which torch for CUDA brings on Linux: pip install triton"
        ) from error
    return TritonOps()


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, computed in float32."""
    return x if weight is None else F.rms_norm(x, weight.shape, weight, eps)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding of x [rows, heads, head_dim], half-split layout; cosine, sine [rows,
    head_dim / 2]."""
    cosine, sine = (part[:, None].to(x.dtype) for part in (cosine, sine))
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cosine - b * sine, b * cosine + a * sine), dim=-1)


class Linear:
    """y = x W^T + b for W [out, in]."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out] in the weight's dtype."""
        return F.linear(x, self._weight, self._bias)

    def rows_of(self, index: Tensor) -> Tensor:
        """The weight's rows at `index` [n]: [n, in]."""
        return self._weight[index]
