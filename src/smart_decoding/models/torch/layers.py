"""What decoder layers share, and layers on the CPU kernels (torch_layers.py: in plain torch)."""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
from collections.abc import Callable, Iterable, Mapping, Sequence
from ctypes import Structure
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from smart_decoding.engine.kv import PAGE
from smart_decoding.kernels import ops as kernels
from smart_decoding.kernels.memory import pointer
from smart_decoding.kernels.weights import (
    Arena,
    Matrix,
    PackedWeight,
    QuantizedTensor,
    Weight,
    as_tensor,
    interleaved,
    pack,
)
from smart_decoding.models.families.layer import (
    GATED_NORM,
    RATES,
    ROUTER,
    ROUTER_BIAS,
    SHARED,
    SHARED_GATE,
    Attention,
    Experts,
    LinearAttention,
    expert_prefix,
)
from smart_decoding.models.torch.recurrence import DeltaWeights, RecurrentStates, Steps
from smart_decoding.models.torch.rows import DeviceRows, GroupedRows, device_rows, upload

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from smart_decoding.engine.rows import Rows
    from smart_decoding.models.families.layer import LayerConfig


_VECTORS = (
    *("input_norm", "q_norm", "k_norm", "qkv_bias", "output_bias", "post_norm"),
    *("attention_norm", "ffn_norm", "sinks"),
)
_OF_DELTA = ("convolution", "decay", "bias", "norm")


@dataclass
class NetworkWeights:
    """A feed-forward network: gate and up [width, hidden], down [hidden, width]. gate_up_bias: the
    gates' first, [2 * width]."""

    gate: Matrix
    up: Matrix
    down: Matrix
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None


@dataclass
class RouterWeights:
    """What chooses a row's experts, by matrix [experts, hidden]. per_token, normalised, shared: as
    in Experts. Where one is shared, the matrix has a row more, for it."""

    matrix: Matrix
    per_token: int
    normalised: bool
    bias: Tensor | None = None
    shared: bool = False


@dataclass
class LayerWeights:
    """One layer under its usual names. Matrices are [out, in]; qkv: q, k and v.
    networks: the feed-forward network, or the experts that `router` chooses among, and behind them
    the shared one.

    `input` is the width that q, k and v read: `hidden`, or twice that in an EAGLE-3 head, which
    then has no input_norm. attention_norm, ffn_norm: of what both add to x. window: how many
    positions a row attends to, 0: all. angle: the first of its own among a position's rotary
    angles. gelu, clamped: how its gates are activated, as in FeedForward. sinks [heads]: one more
    logit of each head's softmax, without a value. Where scores are not divided by the root of
    head_dim, q_norm carries the difference. gate: by the sigmoid of whose products attention's
    outputs are multiplied. delta: linear attention in place of attention: `qkv` is then one matrix,
    and heads, kv_heads and head_dim are 0.
    """

    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    qkv: Sequence[Matrix]
    output: Matrix
    networks: Sequence[NetworkWeights]
    post_norm: Tensor
    router: RouterWeights | None = None
    input_norm: Tensor | None = None
    qkv_bias: Tensor | None = None
    output_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    attention_norm: Tensor | None = None
    ffn_norm: Tensor | None = None
    window: int = 0
    angle: int = 0
    gelu: bool = False
    gate: Matrix | None = None
    delta: DeltaWeights | None = None
    clamped: bool = False
    sinks: Tensor | None = None

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return int(self.output.shape[0])


@dataclass
class KVCache:
    """Keys and values [layers, kv_heads, pages, PAGE, head_dim], of the layers with attention.
    states: of the layers with linear attention.

    native: the CPU kernels write it. There a page's 16 keys lie next to each other for each
    dimension, [..., head_dim, PAGE], so that one vector load serves 16 positions; or its elements
    lie as tiles read them (pages.h)."""

    keys: Tensor
    values: Tensor
    native: bool = False
    states: RecurrentStates | None = None

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
        keys = zeros((*planes, *key_page), dtype, device)
        values = zeros((*planes, PAGE, head_dim), dtype, device)
        return cls(keys, values, native)

    @cached_property
    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer."""
        return list(zip(self.keys.unbind(), self.values.unbind(), strict=True))

    @property
    def bytes(self) -> int:
        """Of keys and values."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy slots source[i] -> target[i] (int32, on the CPU) in every layer; targets never
        precede sources."""
        if self.native:
            kernels.move_kv(self.keys, self.values, source, target)
            return
        slots = np.stack((source.numpy(), target.numpy()))
        page, offset = upload(np.stack((slots // PAGE, slots % PAGE)), self.keys.device)
        for part in (self.keys, self.values):
            moved = part[..., page[0], offset[0], :]
            part[..., page[1], offset[1], :] = moved


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros, on a CPU in memory that the system makes when it is first written: a server
    reserves for many requests, and most programs have one. Where a head's part of a layer is less
    than a huge page, small ones: a prompt of any length would make all of it, which takes 0.1 to
    0.8 s for 117 MB."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    if size and math.prod(shape[2:]) * dtype.itemsize < Arena.HUGE:
        private = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(private, dtype=dtype).view(shape)
    memory = torch.from_numpy(np.zeros(size + 64, np.uint8))  # on huge pages, if there are any
    start = -memory.data_ptr() % 64  # a vector is to lie in one cache line, as in torch's memory
    return memory[start : start + size].view(dtype).view(shape)


@dataclass
class Context:
    """What the layers of one forward share: rows, the rotary tables [positions, angles], and what
    either form makes of them. angles: head_dim / 2 for each kind of layer that rotates by its own.

    inputs: what q, k and v of the first layer read, [rows, width], if not its normed x. aux_hidden
    [rows, aux_layers * hidden] receives x as it is after as many layers as `aux_layers` says.
    experts: that the rows woke, in each of a mixture's layers."""

    rows: Rows
    cosine: Tensor
    sine: Tensor
    inputs: Tensor | None = None
    aux_layers: tuple[int, ...] = ()
    aux_hidden: Tensor | None = None
    experts: list[int] = field(default_factory=list)

    @cached_property
    def steps(self) -> Steps:
        """The rows in the order in which recurrences reach them."""
        return Steps(self.rows, self.cosine.device)

    @cached_property
    def grouped(self) -> GroupedRows:
        """The rows as plain torch's attention reads them."""
        return GroupedRows(self.rows, self.cosine.device)

    @cached_property
    def on_device(self) -> DeviceRows:
        """The rows as kernels on a GPU read them."""
        return device_rows(self.rows, self.cosine.device)

    @cached_property
    def rotation(self) -> tuple[Tensor, Tensor]:
        """cos and sin of each row: [rows, angles]."""
        position = self.on_device.position
        return self.cosine[position], self.sine[position]

    def keep_aux(self, layers: int, x: Tensor) -> None:
        """Keep x [rows, hidden] as it is after so many layers, if a head reads it."""
        if self.aux_hidden is not None and layers in self.aux_layers:
            at = self.aux_layers.index(layers) * x.shape[1]
            self.aux_hidden[:, at : at + x.shape[1]] = x


class Layers(Protocol):
    """All layers of a model or head, on torch."""

    def __call__(self, x: Tensor, context: Context, cache: KVCache) -> None:
        """Update x [rows, hidden] in place, layer by layer, and write the rows' keys and values to
        the cache."""


class NativeLayers:
    """Layers on the CPU kernels: packed weights and fp32 activations, rounded where a linear layer
    reads them if its weights are bf16 and the CPU multiplies those."""

    def __init__(self, layers: Iterable[LayerWeights], arena: Arena) -> None:
        self._alive: list[object] = []
        structs = [self._struct(w, arena) for w in layers]  # one layer's weights at a time
        self.structs = (kernels.Layer * len(structs))(*structs)

    def _struct(self, w: LayerWeights, arena: Arena) -> Structure:
        qkv = pack(w.qkv if w.gate is None else [*w.qkv, w.gate], arena)
        if w.qkv_bias is not None:  # gates have none
            w.qkv_bias = F.pad(w.qkv_bias, (0, qkv.n - len(w.qkv_bias)))
        vectors = {
            name: None if vector is None else vector.float().contiguous()
            for name, vector in ((name, getattr(w, name)) for name in _VECTORS)
        }
        output = pack([w.output], arena)
        width = len(w.networks[0].gate)
        order = interleaved(width)
        networks = [
            (pack([each.gate, each.up], arena, order), pack([each.down], arena))
            for each in w.networks
        ]
        self._alive += [*vectors.values(), qkv, output, *itertools.chain(*networks)]
        return kernels.Layer(
            hidden=w.hidden,
            input=qkv.k,
            heads=w.heads,
            kv_heads=w.kv_heads,
            head_dim=w.head_dim,
            ffn=width,
            hint=arena.hint,
            window=w.window,
            angle=w.angle,
            gelu=w.gelu,
            clamped=w.clamped,
            gated=w.gate is not None and w.delta is None,
            eps=w.eps,
            qkv=qkv.struct,
            output=output.struct,
            **{name: pointer(vector) for name, vector in vectors.items()},
            **self._networks(networks, w.router, arena),
            **self._biases(w, order),
            delta=None if w.delta is None else self._delta(w.delta, arena),
        )

    def _delta(self, w: DeltaWeights, arena: Arena) -> int:
        """Return the address of a structure Delta."""
        rates = pack([w.rates], arena)
        struct = kernels.Delta(
            key_heads=w.shape.key_heads,
            value_heads=w.shape.value_heads,
            key_dim=w.shape.key_dim,
            value_dim=w.shape.value_dim,
            kernel=w.shape.kernel,
            tiled=w.shape.tiled,
            rates=rates.struct,
            **{name: pointer(getattr(w, name)) for name in _OF_DELTA},
        )
        self._alive += [w, rates, struct]
        return ctypes.addressof(struct)

    def _biases(self, w: LayerWeights, order: NDArray[np.int64]) -> dict[str, Any]:
        """Return the fields of Layer that are biases of its networks or its router. order: of gate
        and up, -1: a column of zeros."""
        found: dict[str, Any] = {}
        of_gate_up = [each.gate_up_bias for each in w.networks if each.gate_up_bias is not None]
        of_down = [each.down_bias for each in w.networks if each.down_bias is not None]
        if of_gate_up:
            padded = F.pad(torch.stack(of_gate_up).float(), (0, 1))
            found["gate_up_bias"] = padded[:, torch.from_numpy(order)].contiguous()
        if of_down:
            found["down_bias"] = torch.stack(of_down).float().contiguous()
        if w.router is not None and w.router.bias is not None:
            found["router_bias"] = w.router.bias.float().contiguous()
        self._alive += found.values()
        return {name: pointer(vector) for name, vector in found.items()}

    def _networks(
        self,
        networks: Sequence[tuple[PackedWeight, PackedWeight]],
        router: RouterWeights | None,
        arena: Arena,
    ) -> dict[str, Any]:
        """Return the fields of Layer that are of its network, or of its experts. networks: gate and
        up of each, and down."""
        if router is None:
            ((gate_up, down),) = networks
            return {"gate_up": gate_up.struct, "down": down.struct}
        matrix = pack([router.matrix], arena)
        each = Weight * len(networks)
        all_gate_up = each(*(gate_up.struct for gate_up, _ in networks))
        all_down = each(*(down.struct for _, down in networks))
        self._alive += [matrix, all_gate_up, all_down]
        return {
            "experts": len(networks) - router.shared,
            "shared": router.shared,
            "per_token": router.per_token,
            "normalised": router.normalised,
            "router": matrix.struct,
            "expert_gate_up": ctypes.addressof(all_gate_up),
            "expert_down": ctypes.addressof(all_down),
        }


def converted(weight: Matrix, dtype: torch.dtype, device: torch.device) -> Matrix:
    """Return the weight on a device; quants stay what they are on a CPU in bfloat16."""
    if isinstance(weight, QuantizedTensor) and device.type == "cpu" and dtype == torch.bfloat16:
        return weight
    return as_tensor(weight).to(device, dtype)


def layer_weights(
    layer: LayerConfig,
    weights: Mapping[str, Matrix],
    prefix: str,
    dtype: torch.dtype,
    device: torch.device,
    input_norm: bool = True,
) -> LayerWeights:
    """Collect one layer's tensors from a checkpoint in Hugging Face's names.

    input_norm: whether the layer has a norm of its own at its input; the first one of a head has
    none."""

    def matrix(name: str) -> Matrix:
        return converted(weights[prefix + name], dtype, device)

    def get(name: str) -> Tensor:
        return as_tensor(weights[prefix + name]).to(device, dtype)

    def network(name: str) -> NetworkWeights:
        gate, up, down = (f"{name}{part}_proj" for part in ("gate", "up", "down"))
        found = NetworkWeights(
            matrix(f"{gate}.weight"), matrix(f"{up}.weight"), matrix(f"{down}.weight")
        )
        if layer.network.bias:
            found.gate_up_bias = torch.cat((get(f"{gate}.bias"), get(f"{up}.bias")))
            found.down_bias = get(f"{down}.bias")
        return found

    norms = _layer_norms(layer, weights, prefix, dtype, input_norm)
    prefixes = ["mlp."]
    router = None
    if isinstance(layer.ffn, Experts):
        prefixes = [expert_prefix(number) for number in range(layer.ffn.count)]
        router = _router(layer.ffn, matrix, get)
        prefixes += [SHARED] if layer.ffn.shared else []
    attention = layer.attention
    if isinstance(attention, LinearAttention):
        mixing = _linear_attention(
            attention,
            matrix,
            lambda name: as_tensor(weights[prefix + name]).to(device, torch.float32),
        )
    else:
        mixing = _attention(attention, matrix, get)
    return LayerWeights(
        eps=layer.rms_eps,
        networks=[network(each) for each in prefixes],
        router=router,
        gelu=layer.network.gelu,
        clamped=layer.network.clamped,
        **mixing,
        **{name: norm.to(device) for name, norm in norms.items()},
    )


def _router(
    experts: Experts, matrix: Callable[[str], Matrix], get: Callable[[str], Tensor]
) -> RouterWeights:
    rows = matrix(ROUTER)
    if experts.shared:
        rows = torch.cat((as_tensor(rows), get(SHARED_GATE)))
    return RouterWeights(
        rows,
        experts.per_token,
        experts.normalised,
        get(ROUTER_BIAS) if experts.router_bias else None,
        experts.shared,
    )


def _attention(
    attention: Attention, matrix: Callable[[str], Matrix], get: Callable[[str], Tensor]
) -> dict[str, Any]:
    """Return the fields of LayerWeights that are of attention."""
    names = [f"self_attn.{name}_proj" for name in "qkv"]
    q, k, v = (matrix(f"{name}.weight") for name in names)
    gate = None
    if attention.gated:
        rows = np.arange(len(q)).reshape(attention.heads, 2, -1)
        q, gate = q[rows[:, 0].reshape(-1)], q[rows[:, 1].reshape(-1)]
    if attention.rotary_dim is not None:
        q, k = (each[_rotating_first(attention, len(each))] for each in (q, k))
    return {
        "heads": attention.heads,
        "kv_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "qkv": [q, k, v],
        "gate": gate,
        "output": matrix("self_attn.o_proj.weight"),
        "qkv_bias": torch.cat([get(f"{n}.bias") for n in names]) if attention.qkv_bias else None,
        "output_bias": get("self_attn.o_proj.bias") if attention.o_bias else None,
        "window": attention.window,
        "angle": attention.head_dim // 2 if attention.local_rope else 0,
        "sinks": get("self_attn.sinks") if attention.sinks else None,
    }


def _rotating_first(attention: Attention, rows: int) -> NDArray[np.int64]:
    """Return the order of heads' dimensions in which those that rotate lead both halves of a head.

    RoPE then pairs dimensions as it does where all rotate, and the others have an angle of 0.
    Scores do not depend on an order that q and k share."""
    rotary = attention.rotary_dim or attention.head_dim
    order = np.arange(attention.head_dim)
    first = order[:rotary].reshape(2, -1)
    others = order[rotary:].reshape(2, -1)
    heads = np.arange(0, rows, attention.head_dim)[:, None]
    return (heads + np.concatenate((first, others), axis=1).reshape(-1)).reshape(-1)


def _linear_attention(
    linear: LinearAttention, matrix: Callable[[str], Matrix], vector: Callable[[str], Tensor]
) -> dict[str, Any]:
    """Return the fields of LayerWeights that are of linear attention. vector: a tensor in
    float32."""
    return {
        "heads": 0,
        "kv_heads": 0,
        "head_dim": 0,
        "qkv": [matrix("linear_attn.in_proj_qkv.weight")],
        "gate": matrix("linear_attn.in_proj_z.weight"),
        "output": matrix("linear_attn.out_proj.weight"),
        "delta": DeltaWeights(
            shape=linear,
            rates=torch.cat([as_tensor(matrix(name)) for name in RATES]),
            convolution=vector("linear_attn.conv1d.weight")[:, 0].t().contiguous(),
            decay=vector("linear_attn.A_log").exp().neg(),
            bias=vector("linear_attn.dt_bias"),
            norm=vector(GATED_NORM),
        ),
    }


def _layer_norms(
    layer: LayerConfig,
    weights: Mapping[str, Matrix],
    prefix: str,
    dtype: torch.dtype,
    input_norm: bool,
) -> dict[str, Any]:
    """Return a layer's norms by their names in LayerWeights."""
    attention = layer.attention
    has_qk_norm = isinstance(attention, Attention) and attention.qk_norm
    names = {
        "input_norm": layer.norms.before_attention if input_norm else None,
        "post_norm": layer.norms.before_ffn,
        "q_norm": "self_attn.q_norm" if has_qk_norm else None,
        "k_norm": "self_attn.k_norm" if has_qk_norm else None,
        "attention_norm": layer.norms.after_attention,
        "ffn_norm": layer.norms.after_ffn,
    }
    norms: dict[str, Any] = {
        name: norm_weight(weights, f"{prefix}{theirs}.weight", dtype, layer.shifted_norms)
        for name, theirs in names.items()
        if theirs is not None
    }
    if isinstance(attention, LinearAttention):
        return norms
    if has_qk_norm and attention.rotary_dim is not None:
        order = _rotating_first(attention, attention.head_dim)
        norms |= {name: norms[name][order] for name in ("q_norm", "k_norm")}
    scalar = attention.query_scalar
    if scalar is not None:  # scores are divided by its root: queries bring the rest
        norms["q_norm"] = norms["q_norm"] * (attention.head_dim / scalar) ** 0.5
    return norms


def norm_weight(
    weights: Mapping[str, Matrix], name: str, dtype: torch.dtype, shifted: bool
) -> Tensor:
    """Return a norm's weight: in the dtype of all weights, but shifted ones, which have more
    digits, in float32."""
    return as_tensor(weights[name]).to(torch.float32 if shifted else dtype)
