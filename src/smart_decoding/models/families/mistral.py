"""Mistral: a Llama whose first release has a window in each layer. GGUF files call it llama."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from smart_decoding.models.families.config import ModelConfig, windows_from_hf
from smart_decoding.models.families.family import Family


def _from_hf(config: ModelConfig, source: Mapping[str, Any]) -> ModelConfig:
    return replace(config, windows=windows_from_hf(source, config.layers, lambda layer: True))


MISTRAL = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    model_type="mistral",
    from_hf=_from_hf,
)
