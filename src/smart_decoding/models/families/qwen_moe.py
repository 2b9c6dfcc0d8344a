"""Qwen3's mixtures of experts: a Qwen3 with many small feed-forward networks in each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from smart_decoding.models.families.config import ModelConfig, windows_from_hf
from smart_decoding.models.families.family import (
    GGUF_EXPERTS,
    GGUF_NAMES,
    Family,
    experts_from_gguf,
    experts_from_hf,
)


def _from_hf(config: ModelConfig, source: Mapping[str, Any]) -> ModelConfig:
    windows: tuple[int, ...] = ()
    if source.get("use_sliding_window"):
        windows = windows_from_hf(source, config.layers, lambda layer: True)
    return replace(
        config,
        qk_norm=True,
        windows=windows,
        experts=experts_from_hf(source),
        dense_layers=_dense_layers(config.layers, source),
    )


def _dense_layers(layers: int, source: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the layers that have one feed-forward network."""
    listed = source.get("mlp_only_layers") or ()
    step = int(source.get("decoder_sparse_step", 1))
    return tuple(layer for layer in range(layers) if layer in listed or (layer + 1) % step)


def _from_gguf(config: ModelConfig, metadata: Mapping[str, Any]) -> ModelConfig:
    return replace(config, experts=experts_from_gguf(metadata))


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    assert config.experts is not None
    return {
        "num_experts": config.experts.count,
        "num_experts_per_tok": config.experts.per_token,
        "moe_intermediate_size": config.experts.each.width,
        "norm_topk_prob": config.experts.normalised,
        "mlp_only_layers": list(config.dense_layers),
        "decoder_sparse_step": 1,
    }


QWEN3_MOE = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    gguf="qwen3moe",
    options=frozenset(
        {"attention_bias", "num_experts", "num_local_experts", "moe_intermediate_size"}
    ),
    gguf_options=frozenset({"expert_count"}),
    from_hf=_from_hf,
    from_gguf=_from_gguf,
    to_hf=_to_hf,
    gguf_names={**GGUF_NAMES, **GGUF_EXPERTS},
)
