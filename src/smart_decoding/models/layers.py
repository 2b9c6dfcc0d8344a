"""Decoder layers and linear maps, each in two forms: the CPU kernels, and torch (CUDA, or a CPU
without kernels)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from ctypes import Structure
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from smart_decoding.engine.kv import PAGE
from smart_decoding.engine.rows import Rows
from smart_decoding.kernels import ops as kernels
from smart_decoding.kernels.ops import Arena
from smart_decoding.models.rows import GatheredRows, native_rows


@dataclass
class LayerWeights:
    """One Llama-style layer under its usual names. Matrices are [out, in]; q, k, v stacked; gate
    and up apart.

    `input` is the width that q, k and v read: `hidden`, or twice that in an EAGLE-3 head, which
    then has no input_norm.
    """

    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    qkv: Tensor
    output: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    post_norm: Tensor
    input_norm: Tensor | None = None
    qkv_bias: Tensor | None = None
    output_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return int(self.output.shape[0])

    def elements(self) -> int:
        """Elements of the packed matrices."""
        rows = [len(self.qkv), len(self.output), 2 * len(self.gate), len(self.down)]
        widths = [self.qkv.shape[1], self.output.shape[1], self.gate.shape[1], self.down.shape[1]]
        lanes = kernels.vector_width()
        return sum(
            kernels.packed_rows(r + (-r) % (2 * lanes)) * w
            for r, w in zip(rows, widths, strict=True)
        )


@dataclass
class KVCache:
    """Keys and values [layers, kv_heads, pages, PAGE, head_dim].

    native: the CPU kernels write it. There a page's 16 keys lie next to each other for each
    dimension, [..., head_dim, PAGE], so that one vector load serves 16 positions; or its elements
    lie as tiles read them (pages.h)."""

    keys: Tensor
    values: Tensor
    native: bool = False

    @classmethod
    def empty(
        cls,
        layers: int,
        kv_heads: int,
        pages: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        native: bool,
    ) -> KVCache:
        """Zeros, in the layout of those who write it."""
        planes = (layers, kv_heads, pages)
        key_page = (head_dim, PAGE) if native else (PAGE, head_dim)
        keys = torch.zeros(*planes, *key_page, dtype=dtype, device=device)
        values = torch.zeros(*planes, PAGE, head_dim, dtype=dtype, device=device)
        return cls(keys, values, native)

    @property
    def bytes(self) -> int:
        """Of keys and values."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copies slots source[i] -> target[i] (int32, on the CPU) in every layer; targets never
        precede sources."""
        if self.native:
            kernels.move_kv(self.keys, self.values, source, target)
            return
        source = source.long().to(self.keys.device)
        target = target.long().to(self.keys.device)
        for part in (self.keys, self.values):
            moved = part[..., source // PAGE, source % PAGE, :]
            part[..., target // PAGE, target % PAGE, :] = moved


class Workspace:
    """Buffers that forwards share one after another: large ones are costly to allocate anew (page
    faults)."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, elements: int) -> Tensor:
        """[elements] float32 of arbitrary content, valid until the next take of this name."""
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < elements:
            buffer = self._buffers[name] = torch.empty(elements + elements // 4)
        return buffer[:elements]


@dataclass
class Context:
    """What the layers of one forward share: rows, the rotary tables [positions, head_dim / 2], and
    what either form makes of them.

    inputs: what q, k and v of the first layer read, [rows, width], if not its normed x. aux_hidden
    [rows, aux_layers * hidden] receives x as it is after as many layers as `aux_layers` says."""

    rows: Rows
    cosine: Tensor
    sine: Tensor
    inputs: Tensor | None = None
    aux_layers: tuple[int, ...] = ()
    aux_hidden: Tensor | None = None

    @cached_property
    def gathered(self) -> GatheredRows:
        """The rows as torch's attention reads them."""
        return GatheredRows(self.rows, self.cosine.device)

    @cached_property
    def rotation(self) -> tuple[Tensor, Tensor]:
        """cos and sin of each row: [rows, head_dim / 2]."""
        position = torch.from_numpy(self.rows.position).to(self.cosine.device)
        return self.cosine[position], self.sine[position]

    def keep_aux(self, layers: int, x: Tensor) -> None:
        """Keeps x [rows, hidden] as it is after so many layers, if that is wanted."""
        if self.aux_hidden is not None and layers in self.aux_layers:
            at = self.aux_layers.index(layers) * x.shape[1]
            self.aux_hidden[:, at : at + x.shape[1]] = x


class Layers(Protocol):
    """All layers of a model or head."""

    def __call__(self, x: Tensor, context: Context, cache: KVCache) -> None:
        """Updates x [rows, hidden] in place, layer by layer, and writes the rows' keys and values
        to the cache."""


class NativeLayers:
    """Layers on the CPU kernels: packed weights and fp32 activations, rounded where a linear layer
    reads them if its weights are bf16 and the CPU multiplies those."""

    def __init__(self, layers: Sequence[LayerWeights], arena: Arena, workspace: Workspace) -> None:
        self._bf16 = layers[0].qkv.dtype == torch.bfloat16
        self._keep: list[Tensor | None] = []
        self.structs = (kernels.Layer * len(layers))(*(self._struct(w, arena) for w in layers))
        self._workspace = workspace

    def __call__(self, x: Tensor, context: Context, cache: KVCache) -> None:
        """See `Layers`."""
        rows = native_rows(context.rows, context.cosine, context.sine)
        both = (cache.keys, cache.values)
        scratch = self._scratch(len(x))
        kernels.layers(self.structs, rows.struct, context.inputs, x, both, scratch, self._bf16)

    def _scratch(self, rows: int) -> Structure:
        """Working memory for `rows` rows."""
        w = self.structs[0]
        width = (w.heads + 2 * w.kv_heads) * w.head_dim
        sizes = (max(w.hidden, w.input), width, w.heads * w.head_dim, w.ffn)
        return kernels.Workspace(
            *(
                self._workspace.take(f"layer{i}", rows * size).data_ptr()
                for i, size in enumerate(sizes)
            )
        )

    def _struct(self, w: LayerWeights, arena: Arena) -> Structure:
        vectors = [
            None if vector is None else vector.float().contiguous()
            for vector in (w.input_norm, w.q_norm, w.k_norm, w.qkv_bias, w.output_bias, w.post_norm)
        ]
        matrices = [
            self._pack(m, arena) for m in (w.qkv, w.output, self._interleaved(w.gate, w.up), w.down)
        ]
        self._keep += [*vectors, *matrices]
        return kernels.Layer(
            w.hidden,
            w.qkv.shape[1],
            w.heads,
            w.kv_heads,
            w.head_dim,
            len(w.gate),
            arena.hint,
            w.eps,
            *(kernels.pointer(v) for v in vectors),
            *(m.data_ptr() for m in matrices),
        )

    @staticmethod
    def _pack(matrix: Tensor, arena: Arena) -> Tensor:
        return kernels.pack(matrix, arena.take(kernels.packed_rows(len(matrix)) * matrix.shape[1]))

    @staticmethod
    def _interleaved(gate: Tensor, up: Tensor) -> Tensor:
        """Rows alternating in blocks of one vector: gate, up, gate, ... (the kernel multiplies them
        in registers)."""
        lanes = kernels.vector_width()
        pad = (-len(gate)) % lanes
        blocks = [F.pad(m, (0, 0, 0, pad)).view(-1, lanes, m.shape[1]) for m in (gate, up)]
        return torch.stack(blocks, dim=1).view(-1, gate.shape[1])


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
        self._gate_up = torch.cat((w.gate, w.up))
        w.gate, w.up = self._gate_up.chunk(2)  # which frees those that were given
        self.weights = w

    def before(
        self, x: Tensor, cosine: Tensor, sine: Tensor, inputs: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [rows, heads, head_dim], and keys and values [rows, kv_heads, head_dim], for x
        [rows, hidden]."""
        w = self.weights
        normed = inputs if inputs is not None else rms_norm(x, w.input_norm, w.eps)
        qkv = F.linear(normed, w.qkv, w.qkv_bias).view(len(x), -1, w.head_dim)
        q, k, v = torch.split(qkv, [w.heads, w.kv_heads, w.kv_heads], dim=1)
        if w.q_norm is not None:
            q = rms_norm(q, w.q_norm, w.eps)
            k = rms_norm(k, w.k_norm, w.eps)
        return rotate(q, cosine, sine), rotate(k, cosine, sine), v

    def after(self, x: Tensor, attended: Tensor) -> None:
        """Adds to x what was attended to, [rows, heads * head_dim], and the feed-forward
        network."""
        w = self.weights
        x += F.linear(attended, w.output, w.output_bias)
        gate, up = F.linear(rms_norm(x, w.post_norm, w.eps), self._gate_up).chunk(2, dim=-1)
        x += F.linear(F.silu(gate) * up, w.down)


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


class Linear:
    """y = x W^T + b for W [out, in], optionally with an RMS norm before it."""

    def __init__(
        self,
        weight: Tensor,
        native: bool,
        arena: Arena | None = None,
        norm: Tensor | None = None,
        eps: float = 0.0,
        bias: Tensor | None = None,
    ) -> None:
        self.rows = len(weight)
        self._native = native
        self._eps = eps
        self._norm = norm
        self.bias = bias
        if not native:
            self._weight = weight
            return
        size = kernels.packed_rows(len(weight)) * weight.shape[1]
        arena = arena or Arena(size, weight.dtype)
        self._weight = kernels.pack(weight, arena.take(size))
        self._hint = arena.hint
        self._norm = None if norm is None else norm.float().contiguous()
        self.bias = None if bias is None else bias.float().contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out]; float32 on the CPU kernels, else in the weight's dtype."""
        if self._native:
            norm = None if self._norm is None else (self._norm, self._eps)
            return kernels.linear(x, self._weight, self.rows, norm, self.bias, hint=self._hint)
        return F.linear(rms_norm(x, self._norm, self._eps), self._weight, self.bias)

    @property
    def packed(self) -> Tensor:
        """The packed weight on the CPU kernels."""
        return self._weight

    def without_norm(self) -> Linear:
        """The same map without the norm before it, sharing the weight."""
        twin = copy.copy(self)
        twin._norm = None
        return twin

    def rows_of(self, index: Tensor) -> Tensor:
        """The weight's rows at `index` [n]: [n, in], float32 on the CPU kernels. Saves tied
        embeddings a second copy."""
        if not self._native:
            return self._weight[index]
        return kernels.unpack(
            self._weight, self._weight.numel() // kernels.packed_rows(self.rows), index
        )
