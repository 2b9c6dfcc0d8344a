"""The heads that come with the package: whole, small, and for the models that they are named by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from smart_decoding.models.checkpoints import registry
from smart_decoding.models.checkpoints.registry import NAMED_MODELS, shipped_head
from smart_decoding.models.families.reading import config_from_hf
from smart_decoding.models.heads.files import is_for, load_head
from smart_decoding.speculation import stored_prior

if TYPE_CHECKING:
    from smart_decoding.models.families.config import ModelConfig

FOLDERS = sorted(registry._HEADS.iterdir())


def target_of(folder: Path) -> ModelConfig:
    """A model of the sizes that the head's config names."""
    stated = json.loads((folder / "config.json").read_text())
    layers = {"num_hidden_layers": stated["target_num_hidden_layers"]}
    return config_from_hf({**stated, **layers, "architectures": ["LlamaForCausalLM"]})


def test_there_is_one_for_each_model_that_says_so() -> None:
    assert [folder.name for folder in FOLDERS] == ["qwen2.5-coder-1.5b", "smollm2-135m"]
    assert shipped_head("qwen2.5-coder-0.5b") is None


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_shipped_head_is_whole_and_small_and_its_models(folder: Path) -> None:
    assert shipped_head(f"{folder.name}@pypi") == folder
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert files.keys() == {
        *("README.md", "config.json", "model.safetensors", "prior.json", "training.json")
    }
    assert sum(files.values()) < 20e6  # it is in every wheel, and in every clone
    target = target_of(folder)
    assert target.vocab == NAMED_MODELS[folder.name].vocab
    assert is_for(folder, target)
    head = load_head(folder, target)
    assert len(head.weights["draft_ids"]) == head.config["draft_vocab_size"]
    assert {*stored_prior(folder)} == {"calibration", "forecast"}
    card = json.loads((folder / "training.json").read_text())
    first_guess_right = card["figures"]["held_out_top_1_2_4_by_depth"]["1"][0]
    assert first_guess_right > 0.5
    assert f"{first_guess_right:.2f}"[1:] in (folder / "README.md").read_text()
