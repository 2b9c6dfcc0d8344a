"""Files of random weights: read as published ones, and of the same sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from smart_decoding.kernels.weights import QuantizedTensor, as_tensor
from smart_decoding.models.checkpoints.loading import load_checkpoint
from smart_decoding.models.families.reading import config_from_hf
from smart_lab.gguf.random_file import MODELS, small, write


@pytest.mark.parametrize("name", MODELS)
def test_a_file_is_read_as_a_published_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMART_CACHE", str(tmp_path))  # what it converts is of no use later
    model = small(MODELS[name])
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
