"""Decoder layers on torch's matrix products: the reference, and the path for CUDA.

What lies between the products comes in two forms: plain torch, the reference, and Triton
kernels (triton_ops.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from smart_decoding.errors import ConfigError
from smart_decoding.kernels.weights import as_tensor
from smart_decoding.models.torch.recurrence import mix
from smart_decoding.models.torch.rows import GroupedRows

if TYPE_CHECKING:
    from smart_decoding.models.torch.layers import (
        Context,
        KVCache,
        LayerWeights,
        NetworkWeights,
        RouterWeights,
    )


CLAMP = 7.0  # see FeedForward
CLAMPED_SLOPE = 1.702


class TorchLayers:
    """Layers one after another, every kernel launched by itself. Works in the weights' dtype."""

    def __init__(self, layers: Iterable[LayerWeights], ops: TorchOps) -> None:
        self.each = [TorchLayer(w, ops) for w in layers]  # one layer's parts at a time
        # which experts run, and which states follow which, is known on the host only
        self.recordable = all(
            layer.weights.router is None and layer.weights.delta is None for layer in self.each
        )

    def __call__(self, x: Tensor, context: Context, cache: KVCache) -> None:
        """See `Layers`."""
        inputs = context.inputs
        keys_and_values = iter(cache.layers)
        states = iter(() if cache.states is None else cache.states.layers)
        for i, layer in enumerate(self.each, 1):
            is_linear = layer.weights.delta is not None
            layer(x, context, inputs, *next(states if is_linear else keys_and_values))
            inputs = None
            context.keep_aux(i, x)


class TorchLayer:
    """One layer: its matrix products, its norms, and what `ops` do between them."""

    def __init__(self, w: LayerWeights, ops: TorchOps) -> None:
        self._ops = ops
        self._qkv = torch.cat([as_tensor(part) for part in w.qkv])
        self._output = as_tensor(w.output).t()
        self._gate = None if w.gate is None else as_tensor(w.gate)
        w.qkv = (self._qkv,)  # which frees those that were given
        self._networks = [Network(each) for each in w.networks]
        self._router = None if w.router is None else as_tensor(w.router.matrix)
        self.weights = w

    def __call__(
        self, x: Tensor, context: Context, inputs: Tensor | None, keys: Tensor, values: Tensor
    ) -> None:
        """Add the layer's outputs to x [rows, hidden]. inputs: what q, k and v read, if not the
        normed x. keys, values: the layer's memory, in linear attention its inputs and states."""
        w = self.weights
        normed = inputs if inputs is not None else rms_norm(x, w.input_norm, w.eps)
        attended = (self._attend if w.delta is None else self._mix)(normed, context, keys, values)
        _add(x, attended, self._output, w.output_bias, w.attention_norm, w.eps)
        normed = rms_norm(x, w.post_norm, w.eps)
        if w.router is None:
            network = self._networks[0]
            gated = self._gated(normed, network)
            _add(x, gated, network.down, network.down_bias, w.ffn_norm, w.eps)
        else:
            x += rms_norm(self._mixture(normed, w.router, context), w.ffn_norm, w.eps)

    def _attend(self, normed: Tensor, context: Context, keys: Tensor, values: Tensor) -> Tensor:
        """Return what attention makes of normed rows, [rows, heads * head_dim]."""
        w = self.weights
        q = self._ops.write(F.linear(normed, self._qkv, w.qkv_bias), w, context, keys, values)
        attended = self._ops.attend(q, context, keys, values, w.window, w.sinks)
        if self._gate is None:
            return attended
        return attended * F.linear(normed, self._gate).sigmoid()

    def _mix(self, normed: Tensor, context: Context, inputs: Tensor, states: Tensor) -> Tensor:
        """Return what linear attention makes of normed rows, [rows, values]."""
        w = self.weights
        assert w.delta is not None
        assert self._gate is not None
        x, rates, gate = (
            F.linear(normed, matrix) for matrix in (self._qkv, w.delta.rates, self._gate)
        )
        return mix(x, rates, gate, w.delta, context.steps, (inputs, states), w.eps)

    def _gated(self, normed: Tensor, network: Network) -> Tensor:
        """Return what a network's last matrix reads, [rows, width]."""
        gate_up = F.linear(normed, network.gate_up, network.gate_up_bias)
        return self._ops.gate(gate_up, self.weights.gelu, self.weights.clamped)

    def _mixture(self, normed: Tensor, router: RouterWeights, context: Context) -> Tensor:
        """Return what experts add to normed rows [rows, hidden].

        A row's experts are added in the order of their numbers, whatever experts other rows
        have."""
        assert self._router is not None
        logits = F.linear(normed, self._router, router.bias)
        probs = logits[:, : len(self._networks) - router.shared].softmax(-1, dtype=torch.float32)
        # of equal ones the first: top-k would take any
        weight, chosen = probs.sort(dim=-1, descending=True, stable=True)
        weight, chosen = weight[:, : router.per_token], chosen[:, : router.per_token]
        if router.normalised:
            weight = weight / weight.sum(-1, keepdim=True)
        if router.shared:
            weight = torch.cat((weight, logits[:, -1:].float().sigmoid()), dim=1)
            chosen = F.pad(chosen, (0, 1), value=len(self._networks) - 1)
        of_row = chosen.shape[1]
        weight = weight.to(normed.dtype).flatten()
        chosen = chosen.flatten()
        counts = torch.bincount(chosen, minlength=len(self._networks)).tolist()
        context.experts.append(sum(count > 0 for count in counts) - router.shared)
        places = torch.split(chosen.argsort(stable=True), counts)  # rows ascend for each expert
        total = torch.zeros_like(normed)
        for network, at in zip(self._networks, places, strict=True):
            if not len(at):
                continue
            row = at // of_row
            outputs = self._gated(normed[row], network) @ network.down
            if network.down_bias is not None:
                outputs += network.down_bias
            total[row] += outputs * weight[at, None]
        return total


class Network:
    """A feed-forward network's matrices as products read them, and its biases."""

    def __init__(self, w: NetworkWeights) -> None:
        self.gate_up = torch.cat((as_tensor(w.gate), as_tensor(w.up)))
        self.down = as_tensor(w.down).t()
        w.gate, w.up = self.gate_up.chunk(2)  # which frees those that were given
        self.gate_up_bias = w.gate_up_bias
        self.down_bias = w.down_bias


def _add(
    x: Tensor,
    inputs: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
) -> None:
    """x += inputs @ matrix + bias, or what a norm makes of that."""
    if norm is not None:
        added = inputs @ matrix if bias is None else torch.addmm(bias, inputs, matrix)
        x += rms_norm(added, norm, eps)
        return
    x.addmm_(inputs, matrix)
    if bias is not None:
        x += bias


class TorchOps:
    """What of a layer is neither a product with its weights nor a norm of all of a row."""

    def write(
        self, qkv: Tensor, w: LayerWeights, context: Context, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Return the queries [rows, heads, head_dim] of qkv [rows, (heads + 2 * kv_heads) *
        head_dim], normed and rotated. Keys, treated alike, and values go to the cache."""
        each = qkv.view(len(qkv), -1, w.head_dim)
        q, k, v = torch.split(each, [w.heads, w.kv_heads, w.kv_heads], dim=1)
        cosine, sine = (each[:, w.angle : w.angle + w.head_dim // 2] for each in context.rotation)
        q = rotate(rms_norm(q, w.q_norm, w.eps), cosine, sine)
        k = rotate(rms_norm(k, w.k_norm, w.eps), cosine, sine)
        page, offset = context.grouped.own
        for cache, new in ((keys, k), (values, v)):
            cache[:, page, offset] = new.transpose(0, 1).to(cache.dtype)
        return q

    def attend(
        self,
        q: Tensor,
        context: Context,
        keys: Tensor,
        values: Tensor,
        window: int = 0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Return what each row attends to, its own key and value included: [rows, heads *
        head_dim]. window: how many positions it attends to, 0: all. sinks: of LayerWeights."""
        parts = []
        for rows, (page, offset), behind in context.grouped.groups:
            mask = behind < (window or GroupedRows.NOTHING)
            k, v = (cache[:, page, offset].to(q.dtype) for cache in (keys, values))
            if sinks is not None:
                k, v, mask = _with_sinks(k, v, mask, sinks)
            parts.append(
                F.scaled_dot_product_attention(
                    q[rows].transpose(0, 1)[None], k[None], v[None], mask, enable_gqa=True
                )[0].transpose(0, 1)
            )
        return torch.cat(parts).flatten(1)

    def gate(self, gate_up: Tensor, gelu: bool = False, clamped: bool = False) -> Tensor:
        """silu(gate) * up, or as FeedForward has it with GELU or clamped, of [rows, 2 * ffn]:
        [rows, ffn]."""
        gate, up = gate_up.chunk(2, dim=-1)
        if clamped:
            gate = gate.clamp(max=CLAMP)
            return (up.clamp(-CLAMP, CLAMP) + 1) * (gate * torch.sigmoid(CLAMPED_SLOPE * gate))
        return (F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * up


def _with_sinks(k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys and values [kv_heads, positions, head_dim] with one more of zeros, and the mask
    [heads, rows, positions] as what is added to scores: a head's sink at the last position."""
    none = torch.zeros((), dtype=k.dtype, device=k.device).masked_fill(~mask, -torch.inf)
    seen = none.expand(len(sinks), *mask.shape)
    last = sinks.to(k.dtype)[:, None, None].expand(-1, len(mask), 1)
    k, v = (F.pad(part, (0, 0, 0, 1)) for part in (k, v))
    return k, v, torch.cat((seen, last), dim=-1)


def ops_for(device: torch.device) -> TorchOps:
    """Triton's kernels on CUDA, else the reference. Raises ConfigError where Triton is missing."""
    if device.type != "cuda":
        return TorchOps()
    try:
        from smart_decoding.models.torch.triton_ops import TritonOps
    except ImportError as error:
        raise ConfigError(
            "device='cuda' needs Triton, which torch for CUDA brings on Linux: pip install triton"
        ) from error
    return TritonOps()


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, computed in float32."""
    if weight is None:
        return x
    if weight.dtype == x.dtype:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype)  # shifted ones


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
        """Return the weight's rows at `index` [n]: [n, in]."""
        return self._weight[index]

    def replace_rows(self, index: Tensor, rows: Tensor) -> None:
        """Write rows [n, in] to `index` [n] of the weight."""
        self._weight[index] = rows
