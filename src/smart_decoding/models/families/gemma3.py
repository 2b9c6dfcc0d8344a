"""Gemma 3, text alone. What attention and the feed-forward network add is normed, too; published
norms are what is beyond 1; gates go through GELU; embeddings are multiplied by the root of their
width. One layer in six attends to all positions. The others have a window and a RoPE base of their
own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from smart_decoding.errors import ModelError
from smart_decoding.models.families.config import (
    ModelConfig,
    windows_from_hf,
    windows_of,
)
from smart_decoding.models.families.family import GGUF_NAMES, Family
from smart_decoding.models.families.layer import Norms

_GELU = "gelu_pytorch_tanh"
_PATTERN = 6  # one layer in so many has no window
_LOCAL_THETA = 10_000.0  # RoPE's base in layers with a window where a file does not say it
_NORMS = Norms(
    before_attention="input_layernorm",
    after_attention="post_attention_layernorm",
    before_ffn="pre_feedforward_layernorm",
    after_ffn="post_feedforward_layernorm",
)


def _as_computed(config: ModelConfig) -> ModelConfig:
    return replace(
        config,
        qk_norm=True,
        norms=_NORMS,
        shifted_norms=True,
        gelu=True,
        embedding_scale=config.hidden**0.5,
    )


def _from_hf(config: ModelConfig, source: Mapping[str, Any]) -> ModelConfig:
    pattern = source.get("sliding_window_pattern") or source.get("_sliding_window_pattern")
    return replace(
        _as_computed(config),
        max_positions=int(source["max_position_embeddings"]),  # stretched already
        tie_embeddings=bool(source.get("tie_word_embeddings", True)),
        windows=windows_from_hf(
            source, config.layers, lambda layer: _has_window(layer, int(pattern or _PATTERN))
        ),
        local_theta=_local_theta(source),
        query_scalar=int(source["query_pre_attn_scalar"]),
    )


def _local_theta(source: Mapping[str, Any]) -> float:
    """Return RoPE's base in layers with a window, which have no scaling."""
    options = (source.get("rope_parameters") or {}).get("sliding_attention") or {}
    return float(options.get("rope_theta") or source.get("rope_local_base_freq") or _LOCAL_THETA)


def _has_window(layer: int, pattern: int) -> bool:
    return (layer + 1) % pattern > 0


def _from_gguf(config: ModelConfig, metadata: Mapping[str, Any]) -> ModelConfig:
    """Read what files say under other names, Ollama's first ones too, or leave out."""

    def given(*names: str, usual: Any) -> Any:
        keys = [f"gemma3.{name}" for name in names]
        return next((metadata[key] for key in keys if key in metadata), usual)

    # Ollama's first converter wrote one of 30 by itself, which its runner did not apply
    by_itself = "gemma3.rope.global.freq_base" in metadata
    if given("final_logit_softcapping", usual=None) and not by_itself:
        raise ModelError("GGUF option final_logit_softcapping is not supported")
    has_window = given("attention.sliding_window_pattern", usual=_PATTERN)
    if not isinstance(has_window, list):
        pattern = int(has_window or 1)
        has_window = [_has_window(layer, pattern) for layer in range(config.layers)]
    return replace(
        _as_computed(config),
        rope_theta=float(given("rope.freq_base", "rope.global.freq_base", usual=config.rope_theta)),
        local_theta=float(given("rope.freq_base_swa", "rope.local.freq_base", usual=_LOCAL_THETA)),
        max_positions=int(metadata["gemma3.context_length"]),  # stretched already
        windows=windows_of(int(given("attention.sliding_window", usual=0)), has_window),
        # of all sizes the one of 62 layers alone does not divide by the heads' own width
        query_scalar=config.hidden // config.heads if config.layers == 62 else config.head_dim,
    )


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_act": None,
        "hidden_activation": _GELU,
        "query_pre_attn_scalar": config.query_scalar,
        "rope_local_base_freq": config.local_theta,
    }


GEMMA3 = Family(
    name="gemma3",
    architecture="Gemma3ForCausalLM",
    model_type="gemma3_text",
    gguf="gemma3",
    theta=1_000_000.0,
    activations=(_GELU,),
    gguf_options=frozenset({"final_logit_softcapping"}),
    from_hf=_from_hf,
    from_gguf=_from_gguf,
    to_hf=_to_hf,
    gguf_names={
        **GGUF_NAMES,
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
    gguf_space=False,  # Ollama's files do not say it
)
