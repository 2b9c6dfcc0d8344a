"""Files of random weights: read as published ones, and of the same sizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from smart_decoding.kernels.weights import QuantizedTensor, as_tensor
from smart_decoding.models.checkpoints.loading import load_checkpoint
from smart_decoding.models.families.reading import config_from_hf
from smart_lab.gguf.random_file import MODELS, Published, write

SMALL: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
}


def small(name: str) -> Published:
    model = MODELS[name]
    config = {**model.config, **SMALL}
    metadata = dict(model.metadata)
    if "num_experts_per_tok" in config:
        count = "num_experts" if "num_experts" in config else "num_local_experts"
        config |= {count: 8, "num_experts_per_tok": 2}
        metadata |= {"expert_count": 8, "expert_used_count": 2}
        if "moe_intermediate_size" in config:
            config["moe_intermediate_size"] = 256
        each = config.get("moe_intermediate_size", config["intermediate_size"])
        metadata["expert_feed_forward_length"] = each
        if "shared_expert_intermediate_size" in config:
            config["shared_expert_intermediate_size"] = each
            metadata["expert_shared_feed_forward_length"] = each
    return replace(model, config=config, metadata=metadata)


@pytest.mark.parametrize("name", MODELS)
def test_a_file_is_read_as_a_published_one(name: str, tmp_path: Path) -> None:
    model = small(name)
    write(tmp_path / "random.gguf", model, layers=4)
    checkpoint = load_checkpoint(tmp_path / "random.gguf", quantization=None)
    expected = config_from_hf({**model.config, "num_hidden_layers": 4})
    assert checkpoint.config.expected_shapes() == expected.expected_shapes()
    assert checkpoint.config.experts == expected.experts
    matrices = 0
    for weight_name in checkpoint.weights:
        weight = checkpoint.weights[weight_name]
        values = as_tensor(weight).float()
        assert values.isfinite().all(), weight_name
        if isinstance(weight, QuantizedTensor):
            matrices += 1
            assert 0.002 < values.std() < 0.2, (weight_name, weight.format)
            assert abs(values.mean()) < values.std(), weight_name
    assert matrices > 8


def test_published_sizes_are_those_of_the_models() -> None:
    billions = {}
    for name, model in MODELS.items():
        shapes = config_from_hf(model.config).expected_shapes()
        billions[name] = sum(torch.Size(shape).numel() for shape in shapes.values()) / 1e9
    assert billions["qwen3-30b-a3b"] == pytest.approx(30.5, abs=0.3)
    assert billions["gpt-oss-20b"] == pytest.approx(20.9, abs=0.3)
    assert 0.7 < billions["qwen3.5-0.8b"] < 0.9
    assert 4.0 < billions["qwen3.5-4b"] < 4.7
    assert 34 < billions["qwen3.5-35b-a3b"] < 36
