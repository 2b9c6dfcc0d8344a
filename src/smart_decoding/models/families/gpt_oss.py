"""OpenAI's gpt-oss. Each layer is a mixture of experts with biases everywhere and a clamped gate;
each second layer has a window of 128 positions; each head has a sink, one more logit without a
value. RoPE is scaled by YaRN.

Answers are written in Harmony: <|end|> ends a message, and others follow it in the same answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from smart_decoding.errors import ModelError
from smart_decoding.models.families import rope
from smart_decoding.models.families.config import (
    ModelConfig,
    token_ids,
    windows_from_hf,
    windows_of,
)
from smart_decoding.models.families.family import GGUF_EXPERTS, GGUF_NAMES, Family
from smart_decoding.models.families.layer import Experts, FeedForward

_WINDOW = 128
_TRAINED = 4096  # positions before YaRN
_ENDS = ("<|return|>", "<|call|>")
_END_OF_MESSAGE = "<|end|>"
# of the gate: what the kernels compute, and all that was published
_GATE = {"swiglu_limit": 7.0, "swiglu_alpha": 1.702}


def _as_computed(config: ModelConfig, count: Any, per_token: Any, width: Any) -> ModelConfig:
    experts = Experts(
        count=int(count),
        per_token=int(per_token),
        normalised=True,  # as a softmax over the chosen ones' logits is
        each=FeedForward(int(width), gelu=False, clamped=True, bias=True),
        router_bias=True,
        stacked="in turn",
    )
    return replace(
        config, qkv_bias=True, o_bias=True, qk_norm=False, sinks=True, gelu=False, experts=experts
    )


def _has_window(layer: int) -> bool:
    return layer % 2 == 0


def _from_hf(config: ModelConfig, source: Mapping[str, Any]) -> ModelConfig:
    if source.get("attention_bias", True) is not True:
        raise ModelError("the config option attention_bias = False is not supported for gpt-oss")
    for name, usual in _GATE.items():
        if source.get(name) not in (None, usual):
            raise ModelError(
                f"the config option {name} = {source[name]!r} is not supported; supported: {usual}"
            )
    config = _as_computed(
        config,
        source["num_local_experts"],
        source["num_experts_per_tok"],
        source["intermediate_size"],
    )
    return replace(
        config,
        windows=windows_from_hf({"sliding_window": _WINDOW, **source}, config.layers, _has_window),
    )


def _from_gguf(config: ModelConfig, metadata: Mapping[str, Any]) -> ModelConfig:
    """Read what llama.cpp's files and Ollama's say under the name of their architecture."""
    own = f"{metadata['general.architecture']}."
    config = _as_computed(
        config,
        metadata[own + "expert_count"],
        metadata[own + "expert_used_count"],
        metadata.get(own + "expert_feed_forward_length", config.ffn),
    )
    window = int(metadata.get(own + "attention.sliding_window", _WINDOW))
    scaling, positions = _scaling_of(config, metadata, own)
    return replace(
        config,
        rope_scaling=scaling,
        max_positions=positions,
        windows=windows_of(window, [_has_window(layer) for layer in range(config.layers)]),
        eos_token_ids=_ends_of(config, metadata["tokenizer.ggml.tokens"]),
    )


def _scaling_of(
    config: ModelConfig, metadata: Mapping[str, Any], own: str
) -> tuple[rope.RopeScaling | None, int]:
    """Return YaRN's options, and the positions that it reaches.

    Its ramp is not rounded, as in config.json and transformers. GGUF has no key for that, and
    llama.cpp rounds it: some of its angles are others. Ollama's files leave out the kind."""
    scaling = config.rope_scaling
    factor = float(metadata.get(own + "rope.scaling.factor", 1.0))
    if scaling is None and factor > 1:
        trained = metadata.get(own + "rope.scaling.original_context_length") or _TRAINED
        numbers = {"factor": factor, "original_max_position_embeddings": float(trained)}
        scaling = rope.RopeScaling("yarn", numbers)
    if scaling is not None and scaling.kind == "yarn":
        scaling = replace(scaling, numbers={**scaling.numbers, "truncate": 0.0})
    return scaling, rope.stretched_positions(scaling, config.max_positions)


def _ends_of(config: ModelConfig, tokens: list[str]) -> tuple[int, ...]:
    """Return the tokens that end an answer: not the one that ends each message of it."""
    given = [id_ for id_ in config.eos_token_ids if tokens[id_] != _END_OF_MESSAGE]
    return token_ids(given, [id_ for id_, token in enumerate(tokens) if token in _ENDS])


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    assert config.experts is not None
    return {
        "num_local_experts": config.experts.count,
        "num_experts_per_tok": config.experts.per_token,
        "intermediate_size": config.experts.each.width,
        **_GATE,
    }


GPT_OSS = Family(
    name="gpt_oss",
    architecture="GptOssForCausalLM",
    model_type="gpt_oss",
    gguf="gpt-oss",
    gguf_alias="gptoss",
    theta=150_000.0,
    options=frozenset({"attention_bias", "num_local_experts", "num_experts"}),
    gguf_options=frozenset({"expert_count"}),
    quantisations=frozenset({"mxfp4"}),
    from_hf=_from_hf,
    from_gguf=_from_gguf,
    to_hf=_to_hf,
    gguf_names={
        **GGUF_NAMES,
        **GGUF_EXPERTS,
        "attn_sinks.weight": "self_attn.sinks",
        "post_attention_norm": "post_attention_layernorm",
        # Ollama's
        "attn_sinks": "self_attn.sinks",
        "attn_out": "self_attn.o_proj",
    },
    gguf_pre="gpt-4o",
)
