"""How a layer computes, and its tensors: a part for each of what it adds to the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

# Hugging Face's name of each tensor, and its shape.
Shapes: TypeAlias = dict[str, tuple[int, ...]]
# The matrix that chooses a row's experts.
ROUTER = "mlp.gate.weight"
ROUTER_BIAS = "mlp.gate.bias"
# The network that all rows of a mixture run, and what says how much of it is added.
SHARED = "mlp.shared_expert."
SHARED_GATE = "mlp.shared_expert_gate.weight"
# Of linear attention: the norm of its outputs, and the matrices that give each row's decay and
# learning rate of the states.
GATED_NORM = "linear_attn.norm.weight"
RATES = ("linear_attn.in_proj_a.weight", "linear_attn.in_proj_b.weight")


@dataclass(frozen=True, slots=True)
class Norms:
    """The names of a layer's norms: of what attention and the feed-forward network read, and of
    what each adds to the residual stream (None: added as it is)."""

    before_attention: str = "input_layernorm"
    before_ffn: str = "post_attention_layernorm"
    after_attention: str | None = None
    after_ffn: str | None = None


PRE_NORMS = Norms()


@dataclass(frozen=True, slots=True)
class Attention:
    """Attention of grouped queries with RoPE.

    window: how many positions a row attends to, 0: all. local_rope: its angles are those of
    `local_theta`. query_scalar, rotary_dim, sinks: as in ModelConfig. gated: outputs are multiplied
    by the sigmoid of gates, whose rows follow each head's of q in one matrix."""

    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    window: int
    local_rope: bool
    query_scalar: int | None
    rotary_dim: int | None = None
    gated: bool = False
    sinks: bool = False

    def shapes(self, hidden: int, width: int) -> Shapes:
        """Return its weights. width: of the vectors that q, k and v read."""
        q_out = self.heads * self.head_dim
        kv_out = self.kv_heads * self.head_dim
        shapes: Shapes = {}
        q_rows = 2 * q_out if self.gated else q_out
        for name, rows in {"q_proj": q_rows, "k_proj": kv_out, "v_proj": kv_out}.items():
            shapes[f"self_attn.{name}.weight"] = (rows, width)
            if self.qkv_bias:
                shapes[f"self_attn.{name}.bias"] = (rows,)
        if self.qk_norm:
            shapes["self_attn.q_norm.weight"] = (self.head_dim,)
            shapes["self_attn.k_norm.weight"] = (self.head_dim,)
        shapes["self_attn.o_proj.weight"] = (hidden, q_out)
        if self.o_bias:
            shapes["self_attn.o_proj.bias"] = (hidden,)
        if self.sinks:
            shapes["self_attn.sinks"] = (self.heads,)
        return shapes


@dataclass(frozen=True, slots=True)
class LinearAttention:
    """Linear attention by the gated delta rule (Yang et al. 2025, arXiv 2412.06464): a state for
    each value head, [key_dim, value_dim], in place of keys and values.

    q, k and v go through a causal convolution over each channel's last `kernel` inputs. A key head
    serves as many value heads, next to each other, as there are for each. tiled: the first value
    heads of all key heads come first, then the second ones, as GGUF files have them."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    tiled: bool = False

    @property
    def keys(self) -> int:
        """The width of all queries, or of all keys."""
        return self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        """The width of all values."""
        return self.value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """What the convolution reads."""
        return 2 * self.keys + self.values

    @property
    def state_size(self) -> int:
        """Numbers that a layer keeps of a sequence: its state, and the convolution's inputs."""
        return self.values * self.key_dim + (self.kernel - 1) * self.channels

    @property
    def row_size(self) -> int:
        """Numbers that a row adds to a state: channels, and two rates of each head."""
        return self.channels + 2 * self.value_heads

    def packed_state_size(self, columns: int) -> int:
        """Numbers of a state where each head's columns are filled up to blocks of so many."""
        blocks = -(-self.value_dim // columns)
        return self.value_heads * blocks * columns * self.key_dim

    def shapes(self, hidden: int, width: int) -> Shapes:
        """Return its weights. width: of the vectors that it reads."""
        return {
            "linear_attn.in_proj_qkv.weight": (self.channels, width),
            "linear_attn.in_proj_z.weight": (self.values, width),
            "linear_attn.in_proj_b.weight": (self.value_heads, width),
            "linear_attn.in_proj_a.weight": (self.value_heads, width),
            "linear_attn.conv1d.weight": (self.channels, 1, self.kernel),
            "linear_attn.A_log": (self.value_heads,),
            "linear_attn.dt_bias": (self.value_heads,),
            GATED_NORM: (self.value_dim,),
            "linear_attn.out_proj.weight": (hidden, self.values),
        }


@dataclass(frozen=True, slots=True)
class FeedForward:
    """down(act(gate x) * up x), with `width` gates. gelu: act is GELU (by tanh) in place of
    SiLU. clamped: both are bounded by 7 first (the gate from above only), act(g) = g sigmoid(1.702
    g), and it multiplies up x + 1. bias: all three matrices have one."""

    width: int
    gelu: bool
    clamped: bool = False
    bias: bool = False

    def shapes(self, hidden: int, prefix: str = "mlp.") -> Shapes:
        """Return its weights."""
        shapes: Shapes = {}
        for name in ("gate_proj", "up_proj", "down_proj"):
            matrix = (hidden, self.width) if name == "down_proj" else (self.width, hidden)
            shapes[f"{prefix}{name}.weight"] = matrix
            if self.bias:
                shapes[f"{prefix}{name}.bias"] = matrix[:1]
        return shapes


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of `count` networks. A row runs the `per_token` of them that a router finds most
    probable, and adds their outputs by these probabilities. normalised: divided by their sum
    first. shared: all rows run one network more, and add the sigmoid of a further product of it.
    stacked: safetensors may hold the matrices of all experts in one tensor, rows of gate and up in
    turn, or in halves (checkpoints/weight_files.py)."""

    count: int
    per_token: int
    normalised: bool
    each: FeedForward
    router_bias: bool = False
    stacked: Literal["in turn", "in halves"] | None = None
    shared: bool = False

    def shapes(self, hidden: int) -> Shapes:
        """Return its weights, the router's first."""
        shapes: Shapes = {ROUTER: (self.count, hidden)}
        if self.router_bias:
            shapes[ROUTER_BIAS] = (self.count,)
        for number in range(self.count):
            shapes |= self.each.shapes(hidden, expert_prefix(number))
        if self.shared:
            shapes[SHARED_GATE] = (1, hidden)
            shapes |= self.each.shapes(hidden, SHARED)
        return shapes


def expert_prefix(number: int) -> str:
    """Return what the names of an expert's weights begin with in a layer."""
    return f"mlp.experts.{number}."


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """How one layer computes. shifted_norms: as in ModelConfig."""

    hidden: int
    rms_eps: float
    norms: Norms
    shifted_norms: bool
    attention: Attention | LinearAttention
    ffn: FeedForward | Experts

    @property
    def network(self) -> FeedForward:
        """The feed-forward network, or what each expert is."""
        return self.ffn.each if isinstance(self.ffn, Experts) else self.ffn

    def shapes(self, width: int) -> Shapes:
        """Return its weights, in the order of use. width: of the vectors that q, k and v read."""
        norms = self.norms
        between = (norms.after_attention, norms.before_ffn, norms.after_ffn)
        return {
            f"{norms.before_attention}.weight": (self.hidden,),
            **self.attention.shapes(self.hidden, width),
            **{f"{name}.weight": (self.hidden,) for name in between if name},
            **self.ffn.shapes(self.hidden),
        }
