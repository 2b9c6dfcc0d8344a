"""Qwen3.5's mixtures of experts: a Qwen3.5 with many small feed-forward networks in each layer, and
one more that all rows run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from smart_decoding.errors import ModelError
from smart_decoding.models.families.family import (
    GGUF_EXPERTS,
    GGUF_SHARED,
    experts_from_gguf,
    experts_from_hf,
)
from smart_decoding.models.families.qwen3_5 import QWEN3_5

if TYPE_CHECKING:
    from smart_decoding.models.families.config import ModelConfig
    from smart_decoding.models.families.layer import Experts


def _with_experts(config: ModelConfig, experts: Experts, shared_width: Any) -> ModelConfig:
    """Raises ModelError for a shared network of another width than the experts'."""
    if int(shared_width) != experts.each.width:
        raise ModelError(
            f"a shared expert of {shared_width} gates beside experts of {experts.each.width} is "
            "not supported"
        )
    shared = replace(experts, normalised=True, stacked="in halves", shared=True)
    return replace(config, experts=shared)


def _from_hf(config: ModelConfig, source: Mapping[str, Any]) -> ModelConfig:
    width = source["shared_expert_intermediate_size"]
    return _with_experts(QWEN3_5.from_hf(config, source), experts_from_hf(source), width)


def _from_gguf(config: ModelConfig, metadata: Mapping[str, Any]) -> ModelConfig:
    experts = experts_from_gguf(metadata)
    width = metadata.get("qwen35moe.expert_shared_feed_forward_length", experts.each.width)
    return _with_experts(QWEN3_5.from_gguf(config, metadata), experts, width)


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    assert config.experts is not None
    width = config.experts.each.width
    return {
        **QWEN3_5.to_hf(config),
        "num_experts": config.experts.count,
        "num_experts_per_tok": config.experts.per_token,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": width,
    }


QWEN3_5_MOE = replace(
    QWEN3_5,
    name="qwen3_5_moe",
    architecture="Qwen3_5MoeForCausalLM",
    model_type="qwen3_5_moe_text",
    whole="Qwen3_5MoeForConditionalGeneration",
    gguf="qwen35moe",
    options=QWEN3_5.options
    | {"num_experts", "num_local_experts", "moe_intermediate_size"}
    | {"shared_expert_intermediate_size"},
    gguf_options=QWEN3_5.gguf_options | {"expert_count"},
    from_hf=_from_hf,
    from_gguf=_from_gguf,
    to_hf=_to_hf,
    gguf_names={**QWEN3_5.gguf_names, **GGUF_EXPERTS, **GGUF_SHARED},
)
