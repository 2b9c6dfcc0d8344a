"""The shape of a supported model, read from a Hugging Face `config.json` or from GGUF metadata.

Whatever this project does not compute (other architectures, mixtures of experts, quantised weights,
other kinds of RoPE, ...) is refused here by name, before any weight is read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smart_decoding.errors import ModelError
from smart_decoding.models.families import rope

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma3ForCausalLM": "gemma3",
}
_ARCHITECTURES = {family: name for name, family in FAMILIES.items()}
_MODEL_TYPES = {"gemma3": "gemma3_text"}  # those that are not the family's name
_GGUF_FAMILIES = ("llama", "qwen2", "qwen3", "gemma3")
_USUAL_WINDOW = 4096  # of Mistral's and Gemma's configurations that do not say it
_GEMMA_PATTERN = 6  # one layer in so many of Gemma sees all positions
_USUAL_THETA, _GEMMA_THETA = 10_000.0, 1_000_000.0  # RoPE's base where a file does not say it
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
# Tokens that end an answer wherever a vocabulary has them, those of llama.cpp that our families
# have: a GGUF file names one or two, where generation_config.json has all.
_ENDS = frozenset(
    (
        *("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>"),
        *("<\uff5cend\u2581of\u2581sentence\uff5c>", "<EOT>", "_<EOT>"),
        *("<eos>", "<end_of_turn>"),  # not "</s>", which is HTML to Gemma
        *("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),  # of Qwen2.5-Coder
    )
)
_GELU = "gelu_pytorch_tanh"
_SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder of the Llama family. Sizes are counts; `max_positions` is the longest context in
    tokens.

    mrope: how many rotary frequencies follow time, height and width (M-RoPE); () where all follow
    the position. windows: how many positions each layer sees, 0: all; () where all layers see all.
    local_theta: RoPE's base in layers with a window, where it is another. query_scalar: what scores
    are divided by the root of, in place of head_dim."""

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
        with np.errstate(all="ignore"):
            frequencies = [*self.inverse_frequencies()[0], *self.local_frequencies()]
        if not np.isfinite([*frequencies, self.rms_eps]).all():
            raise ModelError("the config's rms_norm_eps or RoPE options give no finite numbers")

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], generation: Mapping[str, Any] | None = None
    ) -> ModelConfig:
        """From the contents of config.json and, for further end tokens, generation_config.json.

        Raises ModelError, naming what is not supported, and any error where an entry is missing or
        malformed (`files.reading` tells whose)."""
        family = _family_of(config)
        refuse_quantised(config)
        _refuse_options(config, family)
        return _from_hf(cls, family, config, generation or {})

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, Any],
        tensor_names: Collection[str],
        rope_factors: NDArray[np.float32] | None = None,
    ) -> ModelConfig:
        """From a GGUF file's metadata, the names of its tensors, and its `rope_freqs.weight` if
        there is one.

        Raises as `from_hf` does."""
        family = metadata.get("general.architecture")
        check_gguf_family(family)
        return _from_gguf(cls, str(family), metadata, tensor_names, rope_factors)

    def to_hf(self) -> dict[str, Any]:
        """Return the config.json that `from_hf` (and transformers, but for `factors` scaling) reads
        back."""
        return {
            "architectures": [_ARCHITECTURES[self.family]],
            "model_type": _MODEL_TYPES.get(self.family, self.family),
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.ffn,
            "vocab_size": self.vocab,
            "hidden_act": None if self.gemma else "silu",
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling.to_hf() if self.rope_scaling else None,
            "rms_norm_eps": self.rms_eps,
            "max_position_embeddings": self.max_positions,
            "tie_word_embeddings": self.tie_embeddings,
            "attention_bias": self.o_bias,
            **self._windows_to_hf(),
            "eos_token_id": list(self.eos_token_ids) or None,
            "bos_token_id": self.bos_token_id,
            "torch_dtype": "bfloat16",
        }

    def _windows_to_hf(self) -> dict[str, Any]:
        of_gemma = {
            "hidden_activation": _GELU,
            "query_pre_attn_scalar": self.query_scalar,
            "rope_local_base_freq": self.local_theta,
        }
        kinds = ("full_attention", "sliding_attention")
        return {
            "sliding_window": max(self.windows, default=None),
            "use_sliding_window": bool(self.windows),
            "layer_types": [kinds[w > 0] for w in self.windows] or None,
            **(of_gemma if self.gemma else {}),
        }

    def with_end_token(self, token: int | None) -> ModelConfig:
        """Return the same shape with one more end token; None: none."""
        return replace(self, eos_token_ids=token_ids(self.eos_token_ids, token))

    @property
    def gemma(self) -> bool:
        """Whether layers are Gemma's: norms of what they add, whose weights are what is beyond 1,
        GELU, and embeddings times the root of their width."""
        return self.family == "gemma3"

    @property
    def norm_before_ffn(self) -> str:
        """The name of a layer's norm at its feed-forward network's input. Gemma has one of the
        usual name, too: of what attention adds."""
        return "pre_feedforward_layernorm" if self.gemma else "post_attention_layernorm"

    def of_head(self) -> ModelConfig:
        """Return the shape of a draft head's layer for this model: a plain one of Llama."""
        return replace(
            self,
            family="llama",
            layers=1,
            qkv_bias=False,
            o_bias=False,
            qk_norm=False,
            windows=(),
            local_theta=None,
            query_scalar=None,
        )

    def expected_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every weight a checkpoint must hold: Hugging Face name to shape, in the order of
        use."""
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab, self.hidden)
        }
        layer = self.layer_shapes(self.hidden)
        for i in range(self.layers):
            shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
        shapes["model.norm.weight"] = (self.hidden,)
        if not self.tie_embeddings:
            shapes["lm_head.weight"] = (self.vocab, self.hidden)
        return shapes

    def layer_shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """Return the weights of one layer, whose q, k and v read vectors of this width."""
        q_out = self.heads * self.head_dim
        kv_out = self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (self.hidden,)}
        for name, rows in {"q_proj": q_out, "k_proj": kv_out, "v_proj": kv_out}.items():
            shapes[f"self_attn.{name}.weight"] = (rows, width)
            if self.qkv_bias:
                shapes[f"self_attn.{name}.bias"] = (rows,)
        if self.qk_norm:
            shapes["self_attn.q_norm.weight"] = (self.head_dim,)
            shapes["self_attn.k_norm.weight"] = (self.head_dim,)
        shapes["self_attn.o_proj.weight"] = (self.hidden, q_out)
        if self.o_bias:
            shapes["self_attn.o_proj.bias"] = (self.hidden,)
        shapes["post_attention_layernorm.weight"] = (self.hidden,)
        if self.gemma:
            shapes["pre_feedforward_layernorm.weight"] = (self.hidden,)
            shapes["post_feedforward_layernorm.weight"] = (self.hidden,)
        shapes["mlp.gate_proj.weight"] = (self.ffn, self.hidden)
        shapes["mlp.up_proj.weight"] = (self.ffn, self.hidden)
        shapes["mlp.down_proj.weight"] = (self.hidden, self.ffn)
        return shapes

    def check_tensors(self, found: Mapping[str, Collection[int]], where: str) -> None:
        """Raise ModelError, naming the tensor, if one is missing, misshapen, or would be ignored.

        found: shape by Hugging Face name; where: the file or folder for the message."""
        expected = self.expected_shapes()
        ignored = [name for name in found if name.endswith("inv_freq")]
        ignored += ["lm_head.weight"] if self.tie_embeddings else []
        check_shapes(where, found, expected, ignored, _ARCHITECTURES[self.family])

    def check_context(self, tokens: int) -> None:
        """Raise ModelError if `tokens` positions are more than the model has."""
        if tokens > self.max_positions:
            raise ModelError(
                f"a context of {tokens} tokens exceeds the model's {self.max_positions}; lower it"
            )

    def inverse_frequencies(self) -> tuple[NDArray[np.float64], float]:
        """RoPE frequencies, shape [head_dim / 2] in radians per position, and the factor on cos and
        sin."""
        return rope.inverse_frequencies(self.rope_theta, self.head_dim, self.rope_scaling)

    def local_frequencies(self) -> list[float]:
        """Return the same of layers with a window, where they have their own; else none."""
        if self.local_theta is None:
            return []
        return [*rope.inverse_frequencies(self.local_theta, self.head_dim, None)[0]]


def check_gguf_family(family: object) -> None:
    """Raise ModelError for the architecture of a GGUF file that is not supported."""
    if family not in _GGUF_FAMILIES:
        known = ", ".join(_GGUF_FAMILIES)
        raise ModelError(f"GGUF architecture {family!r} is not supported; supported: {known}")


def refuse_quantised(config: Mapping[str, Any]) -> None:
    """Raise ModelError for a config.json whose weights are quantised: GPTQ, AWQ, FP8 and others."""
    given = config.get("quantization_config")
    if given is not None:
        method = given.get("quant_method") if isinstance(given, Mapping) else None
        raise quantised(f"config.json: quant_method {str(method)[:40]!r}")


def quantised(how: str) -> ModelError:
    """Return the error for safetensors of quants; how: where they are told."""
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


def _family_of(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or []
    name = names[0] if names else f"model_type {config.get('model_type')!r}"
    if name not in FAMILIES:
        raise ModelError(f"architecture {name} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def _refuse_options(config: Mapping[str, Any], family: str) -> None:
    options = {**rope.options_of(config), **config}
    activations = (_GELU,) if family == "gemma3" else ("silu", "swish")
    refused = {
        "mlp_bias": bool(config.get("mlp_bias")),
        "rope_interleaved": bool(config.get("rope_interleaved")),
        "partial_rotary_factor": options.get("partial_rotary_factor", 1.0) not in (None, 1.0),
        "hidden_act": config.get("hidden_act") not in (None, *activations),
        "hidden_activation": config.get("hidden_activation") not in (None, *activations),
        "attention_bias": bool(config.get("attention_bias"))
        and family in ("mistral", "qwen2", "gemma3"),
        **{name: config.get(name) is not None for name in _SOFTCAPS},
        "use_bidirectional_attention": bool(config.get("use_bidirectional_attention")),
        **{name: bool(config.get(name)) for name in _EXPERTS},
    }
    for name, is_refused in refused.items():
        if is_refused:
            raise ModelError(
                f"the config option {name} = {options[name]!r} is not supported for "
                f"{_ARCHITECTURES[family]}"
            )


def _from_hf(
    cls: type[ModelConfig], family: str, config: Mapping[str, Any], generation: Mapping[str, Any]
) -> ModelConfig:
    heads = int(config["num_attention_heads"])
    hidden = int(config["hidden_size"])
    options = rope.options_of(config)
    positions = int(config["max_position_embeddings"])
    scaling = rope.scaling_from_hf(options, positions)
    has_bias = bool(config.get("attention_bias", False))
    gemma = family == "gemma3"
    return cls(
        family=family,
        layers=int(config["num_hidden_layers"]),
        hidden=hidden,
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        ffn=int(config["intermediate_size"]),
        vocab=int(config["vocab_size"]),
        rope_theta=float(options.get("rope_theta", _GEMMA_THETA if gemma else _USUAL_THETA)),
        rms_eps=float(config["rms_norm_eps"]),
        max_positions=positions if gemma else rope.stretched_positions(scaling, positions),
        tie_embeddings=bool(config.get("tie_word_embeddings", gemma)),
        qkv_bias=has_bias or family == "qwen2",
        o_bias=has_bias,
        qk_norm=family in ("qwen3", "gemma3"),
        rope_scaling=scaling,
        mrope=_mrope_of(options, config),
        windows=_windows_of(family, config),
        local_theta=rope.local_theta_of(config, _USUAL_THETA) if gemma else None,
        query_scalar=int(config["query_pre_attn_scalar"]) if gemma else None,
        eos_token_ids=token_ids(config.get("eos_token_id"), generation.get("eos_token_id")),
        bos_token_id=next(iter(token_ids(config.get("bos_token_id"))), None),
    )


def _mrope_of(options: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[int, ...]:
    sections = tuple(int(n) for n in options.get("mrope_section") or ())
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    half = int(head_dim) // 2
    if sections and (len(sections) != 3 or sum(sections) != half):
        raise ValueError(f"mrope_section {sections} does not fill the {half} rotary frequencies")
    return sections


def _windows_of(family: str, config: Mapping[str, Any]) -> tuple[int, ...]:
    if family == "llama" or (family.startswith("qwen") and not config.get("use_sliding_window")):
        return ()
    layers = min(int(config["num_hidden_layers"]), _MOST["layers"])
    window = int(config.get("sliding_window", _USUAL_WINDOW) or 0)
    types = config.get("layer_types")
    if types is not None:
        has_window = [kind == "sliding_attention" for kind in types]
    elif family == "gemma3":
        pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern")
        has_window = _all_but_each(int(pattern or _GEMMA_PATTERN), layers)
    else:
        first = int(config.get("max_window_layers", 28)) if family != "mistral" else 0
        has_window = [i >= first for i in range(layers)]
    return _windows(window, has_window)


def _all_but_each(nth: int, layers: int) -> list[bool]:
    """Return which layers have a window in a model where each `nth` has none."""
    return [(i + 1) % nth > 0 for i in range(layers)]


def _windows(window: int, has_window: Sequence[bool]) -> tuple[int, ...]:
    if window < 1 or not any(has_window):
        return ()
    window = min(window, _MOST["max_positions"])  # kernels count in int32
    return tuple(window if has else 0 for has in has_window)


def token_ids(*values: Any) -> tuple[int, ...]:
    """Return token ids out of None, an id, or a list of ids; each once, in order."""
    lists = [value if isinstance(value, (list, tuple)) else [value] for value in values]
    return tuple(dict.fromkeys(int(item) for items in lists for item in items if item is not None))


def _from_gguf(
    cls: type[ModelConfig],
    family: str,
    metadata: Mapping[str, Any],
    tensor_names: Collection[str],
    rope_factors: NDArray[np.float32] | None,
) -> ModelConfig:
    own = f"{family}."
    heads = int(metadata[own + "attention.head_count"])
    hidden = int(metadata[own + "embedding_length"])
    head_dim = int(metadata.get(own + "attention.key_length", hidden // heads))
    _refuse_in_gguf(metadata, own, head_dim, tensor_names)
    epsilon = float(metadata[own + "attention.layer_norm_rms_epsilon"])
    trained = int(metadata[own + "context_length"])
    scaling = rope.scaling_from_gguf(metadata, family, trained, rope_factors)
    tokens = metadata["tokenizer.ggml.tokens"]
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    ends += [id_ for id_, token in enumerate(tokens) if token in _ENDS]
    config = cls(
        family=family,
        layers=int(metadata[own + "block_count"]),
        hidden=hidden,
        heads=heads,
        kv_heads=int(metadata.get(own + "attention.head_count_kv", heads)),
        head_dim=head_dim,
        ffn=int(metadata[own + "feed_forward_length"]),
        vocab=len(tokens),
        rope_theta=float(metadata.get(own + "rope.freq_base", _USUAL_THETA)),
        rms_eps=round(epsilon, 12),  # stored as float32
        max_positions=rope.stretched_positions(scaling, trained),
        tie_embeddings="output.weight" not in tensor_names,
        qkv_bias="blk.0.attn_q.bias" in tensor_names,
        o_bias="blk.0.attn_output.bias" in tensor_names,
        qk_norm="blk.0.attn_q_norm.weight" in tensor_names,
        rope_scaling=scaling,
        eos_token_ids=token_ids(*ends),
        bos_token_id=next(iter(token_ids(metadata.get("tokenizer.ggml.bos_token_id"))), None),
    )
    return replace(config, **_of_gemma(metadata, config)) if config.gemma else config


def _of_gemma(metadata: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Return what GGUF files of Gemma say under other names, Ollama's first ones too, or leave
    out."""

    def given(*names: str, usual: Any) -> Any:
        return next(
            (metadata[key] for key in (f"gemma3.{n}" for n in names) if key in metadata), usual
        )

    has_window = given("attention.sliding_window_pattern", usual=_GEMMA_PATTERN)
    if not isinstance(has_window, list):
        has_window = _all_but_each(int(has_window or 1), config.layers)
    window = int(given("attention.sliding_window", usual=0))
    return {
        "rope_theta": float(given("rope.freq_base", "rope.global.freq_base", usual=_GEMMA_THETA)),
        "local_theta": float(
            given("rope.freq_base_swa", "rope.local.freq_base", usual=_USUAL_THETA)
        ),
        "max_positions": int(metadata["gemma3.context_length"]),  # stretched already
        "windows": _windows(window, has_window),
        "qk_norm": True,
        # of all sizes the one of 62 layers alone does not divide by the heads' own width
        "query_scalar": config.hidden // config.heads if config.layers == 62 else config.head_dim,
    }


def _refuse_in_gguf(
    metadata: Mapping[str, Any], own: str, head_dim: int, tensor_names: Collection[str]
) -> None:
    if own + "vision.block_count" in metadata or any(n.startswith("v.") for n in tensor_names):
        raise ModelError(
            "a GGUF file that holds a vision part, as Ollama's of Gemma 3 do, is not supported: "
            "take one of the text alone, such as those of llama.cpp's converter"
        )
    # Ollama's first converter wrote one of 30 by itself, which its runner did not apply
    by_itself = own + "rope.global.freq_base" in metadata
    if metadata.get(own + "final_logit_softcapping") and not by_itself:
        raise ModelError("GGUF option final_logit_softcapping is not supported")
    if metadata.get(own + "expert_count", 0):
        raise ModelError("GGUF option expert_count: mixtures of experts are not supported")
    if int(metadata.get(own + "rope.dimension_count", head_dim)) != head_dim:
        raise ModelError(
            "GGUF option rope.dimension_count: partial rotary embeddings are not supported"
        )
