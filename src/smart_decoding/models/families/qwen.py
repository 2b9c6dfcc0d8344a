"""Qwen2 and 2.5, which have biases on q, k and v, and Qwen3, which norms q and k instead. Some
configurations give their last layers windows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from smart_decoding.models.families.config import ModelConfig, windows_from_hf
from smart_decoding.models.families.family import Family

_USUAL_FIRST = 28  # layer with a window, where a configuration does not say it


def _windows(config: ModelConfig, source: Mapping[str, Any]) -> tuple[int, ...]:
    if not source.get("use_sliding_window"):
        return ()
    return windows_from_hf(
        source,
        config.layers,
        lambda layer: layer >= int(source.get("max_window_layers", _USUAL_FIRST)),
    )


def _qwen2(config: ModelConfig, source: Mapping[str, Any]) -> ModelConfig:
    return replace(config, qkv_bias=True, windows=_windows(config, source))


def _qwen3(config: ModelConfig, source: Mapping[str, Any]) -> ModelConfig:
    return replace(config, qk_norm=True, windows=_windows(config, source))


QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    gguf="qwen2",
    from_hf=_qwen2,
)
QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    gguf="qwen3",
    options=frozenset({"attention_bias"}),
    from_hf=_qwen3,
)
