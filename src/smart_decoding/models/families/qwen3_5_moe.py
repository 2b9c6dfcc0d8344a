"""Qwen3.5's mixtures of experts: a Qwen3.5 with many small feed-forward networks in each layer, and
one more that all rows run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from smart_decoding.errors import ModelError
from smart_decoding.models.families.family import GGUF_EXPERTS, GGUF_SHARED
from smart_decoding.models.families.layer import Experts, FeedForward
from smart_decoding.models.families.qwen3_5 import QWEN3_5

if TYPE_CHECKING:
    from smart_decoding.models.families.config import ModelConfig


def _with_experts(
    config: ModelConfig, count: Any, per_token: Any, width: Any, shared_width: Any
) -> ModelConfig:
    """Raises ModelError for a shared network of another width than the experts'."""
    if int(shared_width) != int(width):
        raise ModelError(
            f"a shared expert of {shared_width} gates beside experts of {width} is not supported"
        )
    experts = Experts(
        count=int(count),
        per_token=int(per_token),
        normalised=True,
        each=FeedForward(int(width), gelu=False),
        stacked="in halves",
        shared=True,
    )
    return replace(config, experts=experts)


def _from_hf(config: ModelConfig, source: Mapping[str, Any]) -> ModelConfig:
    return _with_experts(
        QWEN3_5.from_hf(config, source),
        # transformers 5 writes num_local_experts
        source["num_experts"] if "num_experts" in source else source["num_local_experts"],
        source["num_experts_per_tok"],
        source["moe_intermediate_size"],
        source["shared_expert_intermediate_size"],
    )


def _from_gguf(config: ModelConfig, metadata: Mapping[str, Any]) -> ModelConfig:
    own = "qwen35moe.expert_"
    width = metadata[own + "feed_forward_length"]
    return _with_experts(
        QWEN3_5.from_gguf(config, metadata),
        metadata[own + "count"],
        metadata[own + "used_count"],
        width,
        metadata.get(own + "shared_feed_forward_length", width),
    )


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
