"""A GGUF file that was renamed keeps the head of the model that it says it is, if it has its
sizes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from smart_decoding.llm import LLM
from smart_decoding.models.checkpoints import registry
from smart_decoding.models.checkpoints.loading import load_checkpoint
from smart_decoding.models.heads.export import smart_config
from smart_decoding.training.head import Form, TrainableHead

from .test_loading import own_cache, write_gguf  # noqa: F401  # a cache for each test

CODER = {"name": "Qwen2.5 Coder 1.5B Instruct GGUF"}


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A head for tiny models in place of the one that comes with qwen2.5-coder-1.5b."""
    write_gguf(tmp_path / "shape.gguf", "qwen2")
    config = load_checkpoint(tmp_path / "shape.gguf").config
    folder = tmp_path / "heads" / "qwen2.5-coder-1.5b"
    folder.mkdir(parents=True)
    weights = TrainableHead(Form(config.of_head(), 1)).exported()
    save_file(weights | {"draft_ids": torch.arange(config.vocab)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(smart_config(config, (2,), config.vocab)))
    monkeypatch.setattr(registry, "_HEADS", folder.parent)
    return folder


def drafter_of(path: Path, **options: Any) -> str:
    llm = LLM(path, max_model_len=64, max_num_seqs=1, allow_slow=True, **options)
    return llm.speculation.description


@pytest.mark.parametrize("quantization", [None, "off"])
def test_a_renamed_file_keeps_its_head(
    quantization: str | None, shipped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    write_gguf(tmp_path / "mine.gguf", "qwen2", words=CODER)
    found = drafter_of(tmp_path / "mine.gguf", quantization=quantization)
    assert found == "eagle head qwen2.5-coder-1.5b"
    assert "is qwen2.5-coder-1.5b by its file, and its sizes: its head may draft" in caplog.text


def test_a_file_of_other_sizes_has_no_head(
    shipped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor one that says nothing."""
    caplog.set_level(logging.INFO)
    write_gguf(tmp_path / "other.gguf", "qwen3", words=CODER)
    assert drafter_of(tmp_path / "other.gguf") == "ngram"
    assert "is qwen2.5-coder-1.5b by its file, but not by its sizes: no head" in caplog.text
    write_gguf(tmp_path / "silent.gguf", "qwen2")
    assert drafter_of(tmp_path / "silent.gguf") == "ngram"


def test_a_files_name_still_says_it(
    shipped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    write_gguf(tmp_path / "qwen2.5-coder-1.5b-instruct-q8_0.gguf", "qwen2")
    found = drafter_of(tmp_path / "qwen2.5-coder-1.5b-instruct-q8_0.gguf")
    assert found == "eagle head qwen2.5-coder-1.5b"
    assert "by its name, and its sizes" in caplog.text
