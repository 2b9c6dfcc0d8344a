"""The shape of a supported model: its sizes, and how each of its layers computes, as data.

The files of the families fill it in from a Hugging Face `config.json` or from GGUF metadata
(reading.py). Layers on torch and on the CPU kernels read it, and ask for no family.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smart_decoding.errors import ModelError
from smart_decoding.models.families import rope
from smart_decoding.models.families.layer import (
    PRE_NORMS,
    Attention,
    Experts,
    FeedForward,
    LayerConfig,
    LinearAttention,
    Norms,
    Shapes,
)

_USUAL_WINDOW = 4096  # of Mistral's and Gemma's configurations that do not say it
# what a model can have: what is beyond it would be counted for ever, or does not fit the kernels
_MOST = {
    "layers": 10_000,
    "hidden": 1 << 20,
    "heads": 1 << 16,
    "head_dim": 1 << 16,
    "ffn": 1 << 24,
    "vocab": 1 << 24,
    "max_positions": 1 << 30,
}
_MOST_EXPERTS = 1 << 17  # of all layers


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder of transformer layers. Sizes are counts; `max_positions` is the longest context in
    tokens.

    mrope: how many rotary frequencies follow time, height and width (M-RoPE); () where all follow
    the position. windows: how many positions each layer attends to, 0: all; () where all layers
    attend to all. local_theta: RoPE's base in layers with a window, where it is another.
    query_scalar: what scores are divided by the root of, in place of head_dim. shifted_norms:
    published weights of norms are what is beyond 1. embedding_scale: what embeddings are
    multiplied by. experts: what layers have in place of one feed-forward network, all but
    `dense_layers`. linear: what layers have in place of attention, all but `attention_layers`.
    rotary_dim: how many of a head's dimensions rotate, None: all. gated: see Attention. sinks: each
    head's softmax has one more logit, which has no value."""

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    rope_theta: float
    rms_eps: float
    max_positions: int
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    rope_scaling: rope.RopeScaling | None = None
    mrope: tuple[int, ...] = ()
    windows: tuple[int, ...] = ()
    local_theta: float | None = None
    query_scalar: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    norms: Norms = PRE_NORMS
    shifted_norms: bool = False
    gelu: bool = False
    embedding_scale: float = 1.0
    experts: Experts | None = None
    dense_layers: tuple[int, ...] = ()
    linear: LinearAttention | None = None
    attention_layers: tuple[int, ...] = ()
    rotary_dim: int | None = None
    gated: bool = False
    sinks: bool = False

    def __post_init__(self) -> None:
        # files may name further end tokens, which the model cannot draw
        ends = tuple(id_ for id_ in self.eos_token_ids if 0 <= id_ < self.vocab)
        object.__setattr__(self, "eos_token_ids", ends)
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ModelError(
                f"{self.heads} query heads cannot share {self.kv_heads} key heads: "
                "the config is wrong"
            )
        for name, most in _MOST.items():
            if not 1 <= getattr(self, name) <= most:
                raise ModelError(f"the config has {name} = {getattr(self, name)}, not 1 to {most}")
        if self.windows and (len(self.windows) != self.layers or min(self.windows) < 0):
            raise ModelError(f"the config has windows {self.windows} for {self.layers} layers")
        if self.query_scalar is not None and self.query_scalar < 1:
            raise ModelError(f"the config has query_pre_attn_scalar = {self.query_scalar}")
        if self.experts is not None:
            _check_experts(self.experts, self.layers)
        if self.linear is not None:
            _check_linear(self.linear, self.attention_layers)
        if self.rotary_dim not in (None, *range(2, self.head_dim + 1, 2)):
            raise ModelError(f"the config rotates {self.rotary_dim} of {self.head_dim} dimensions")
        with np.errstate(all="ignore"):
            frequencies = [*self.inverse_frequencies()[0], *self.local_frequencies()]
        if not np.isfinite([*frequencies, self.rms_eps]).all():
            raise ModelError("the config's rms_norm_eps or RoPE options give no finite numbers")

    def layer(self, number: int) -> LayerConfig:
        """Return how a layer computes, the first one being number 0."""
        window = self.windows[number] if self.windows else 0
        attention: Attention | LinearAttention = Attention(
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.qkv_bias,
            self.o_bias,
            self.qk_norm,
            window,
            local_rope=window > 0 and self.local_theta is not None,
            query_scalar=self.query_scalar,
            rotary_dim=self.rotary_dim,
            gated=self.gated,
            sinks=self.sinks,
        )
        if self.linear is not None and number not in self.attention_layers:
            attention = self.linear
        ffn: FeedForward | Experts = FeedForward(self.ffn, self.gelu)
        if self.experts is not None and number not in self.dense_layers:
            ffn = self.experts
        return LayerConfig(
            self.hidden, self.rms_eps, self.norms, self.shifted_norms, attention, ffn
        )

    @property
    def kv_layers(self) -> int:
        """How many layers have keys and values."""
        return self.layers if self.linear is None else len(self.attention_layers)

    @property
    def linear_layers(self) -> int:
        """How many layers have a recurrent state."""
        return self.layers - self.kv_layers

    @property
    def norm_before_ffn(self) -> str:
        """The name of a layer's norm at its feed-forward network's input."""
        return self.norms.before_ffn

    def with_end_token(self, token: int | None) -> ModelConfig:
        """Return the same shape with one more end token; None: none."""
        return replace(self, eos_token_ids=token_ids(self.eos_token_ids, token))

    def of_head(self) -> ModelConfig:
        """Return the shape of a draft head's layer for this model: a plain one of Llama, with the
        model's sizes, RoPE and tokens."""
        return ModelConfig(
            family="llama",
            layers=1,
            hidden=self.hidden,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            ffn=self.ffn,
            vocab=self.vocab,
            rope_theta=self.rope_theta,
            rms_eps=self.rms_eps,
            max_positions=self.max_positions,
            tie_embeddings=self.tie_embeddings,
            rope_scaling=self.rope_scaling,
            mrope=self.mrope,
            eos_token_ids=self.eos_token_ids,
            bos_token_id=self.bos_token_id,
        )

    def expected_shapes(self) -> Shapes:
        """Return every weight a checkpoint must hold: Hugging Face name to shape, in the order of
        use."""
        shapes: Shapes = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for i in range(self.layers):
            layer = self.layer(i).shapes(self.hidden)
            shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
        shapes["model.norm.weight"] = (self.hidden,)
        if not self.tie_embeddings:
            shapes["lm_head.weight"] = (self.vocab, self.hidden)
        return shapes

    def check_context(self, tokens: int) -> None:
        """Raise ModelError if `tokens` positions are more than the model has."""
        if tokens > self.max_positions:
            raise ModelError(
                f"a context of {tokens} tokens exceeds the model's {self.max_positions}; lower it"
            )

    def check_draft(self) -> None:
        """Raise ModelError if the model cannot be a draft model."""
        if self.linear is not None:
            raise ModelError(
                "a model with linear attention cannot be a draft model yet: recurrent states are "
                "kept of answers, and not of drafts"
            )

    def inverse_frequencies(self) -> tuple[NDArray[np.float64], float]:
        """RoPE frequencies, shape [head_dim / 2] in radians per position, and the factor on cos and
        sin. Frequencies of dimensions that do not rotate are 0, and come last."""
        rotary = self.rotary_dim or self.head_dim
        found, factor = rope.inverse_frequencies(self.rope_theta, rotary, self.rope_scaling)
        return np.concatenate((found, np.zeros((self.head_dim - rotary) // 2))), factor

    def local_frequencies(self) -> list[float]:
        """Return the same of layers with a window, where they have their own; else none."""
        if self.local_theta is None:
            return []
        return [*rope.inverse_frequencies(self.local_theta, self.head_dim, None)[0]]


def _check_experts(experts: Experts, layers: int) -> None:
    if not 1 <= experts.per_token <= experts.count <= _MOST_EXPERTS // layers:
        raise ModelError(
            f"the config has {experts.per_token} of {experts.count} experts for a token, "
            f"not 1 to all of at most {_MOST_EXPERTS // layers}"
        )
    if not 1 <= experts.each.width <= _MOST["ffn"]:
        raise ModelError(f"the config has experts of {experts.each.width} gates")


def _check_linear(linear: LinearAttention, attention_layers: tuple[int, ...]) -> None:
    sizes = (linear.key_heads, linear.value_heads, linear.key_dim, linear.value_dim)
    if not all(1 <= size <= _MOST["heads"] for size in (*sizes, linear.kernel - 1)):
        raise ModelError(f"the config has linear attention of the sizes {sizes}, {linear.kernel}")
    if linear.value_heads % linear.key_heads:
        raise ModelError(
            f"{linear.value_heads} value heads cannot share {linear.key_heads} key heads of linear "
            "attention: the config is wrong"
        )
    if not attention_layers:
        raise ModelError("the config has no layer of full attention, which is not supported")


def windows_of(size: int, has_window: Sequence[bool]) -> tuple[int, ...]:
    """Return `ModelConfig.windows`, given which layers have a window of `size` positions."""
    if size < 1 or not any(has_window):
        return ()
    size = min(size, _MOST["max_positions"])  # kernels count in int32
    return tuple(size if has else 0 for has in has_window)


def windows_from_hf(
    config: Mapping[str, Any], layers: int, has_window: Callable[[int], bool]
) -> tuple[int, ...]:
    """Return the same from the contents of config.json. has_window: whether a layer has one, by its
    number, where `layer_types` does not say it."""
    size = int(config.get("sliding_window", _USUAL_WINDOW) or 0)
    types = config.get("layer_types")
    if types is None:
        return windows_of(size, [has_window(layer) for layer in range(layers)])
    return windows_of(size, [kind == "sliding_attention" for kind in types])


def token_ids(*values: Any) -> tuple[int, ...]:
    """Return token ids out of None, an id, or a list of ids; each once, in order."""
    lists = [value if isinstance(value, (list, tuple)) else [value] for value in values]
    return tuple(dict.fromkeys(int(item) for items in lists for item in items if item is not None))


def refuse_quantised(config: Mapping[str, Any], served: Collection[str] = ()) -> None:
    """Raise ModelError for a config.json whose weights are quantised: GPTQ, AWQ, FP8 and others.

    served: methods that are read."""
    given = config.get("quantization_config")
    if given is not None:
        method = given.get("quant_method") if isinstance(given, Mapping) else None
        if method in served:
            return
        raise quantised(f"config.json: quant_method {str(method)[:40]!r}")


def quantised(how: str) -> ModelError:
    """Return the error for safetensors of quants; how: what shows it."""
    return ModelError(
        f"the checkpoint is quantised ({how}), which is not supported: take a GGUF file of the "
        "model, such as OWNER/NAME-GGUF:Q4_K_M, or its bf16 checkpoint"
    )


def check_shapes(
    where: str,
    found: Mapping[str, Collection[int]],
    expected: Mapping[str, Collection[int]],
    ignored: Collection[str],
    user: str,
    says: str = "the config says",
) -> None:
    """Raise ModelError for a tensor that is missing, misshapen, or neither expected nor ignored.

    where: which files they are found in; user: what expects them; says: by what."""
    for name, shape in expected.items():
        if name not in found:
            raise ModelError(
                f"{where} lacks the tensor {name}: it is incomplete, or its config does not fit it"
            )
        if tuple(found[name]) != tuple(shape):
            has = f"the tensor {name} has shape {tuple(found[name])}"
            raise ModelError(f"{where}: {has}, {says} {tuple(shape)}")
    unknown = [name for name in found if name not in expected and name not in ignored]
    if unknown:
        raise ModelError(f"{where} holds the tensor {unknown[0]}, which {user} does not use")
