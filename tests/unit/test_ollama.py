"""Models that Ollama has on this machine go by its names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from smart_decoding.errors import ModelError
from smart_decoding.models.checkpoints.ollama import ollama_file
from smart_decoding.models.checkpoints.registry import names_model, resolve

DIGEST = f"sha256:{'ab' * 32}"
WEIGHTS = {"mediaType": "application/vnd.ollama.image.model", "digest": DIGEST}
TEMPLATE = {"mediaType": "application/vnd.ollama.image.template", "digest": "sha256:00"}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / DIGEST.replace(":", "-")).write_bytes(b"GGUF")
    return tmp_path


def keep(store: Path, model: str, tag: str, manifest: Any) -> None:
    path = store / "manifests" / "registry.ollama.ai" / "library" / model / tag
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(manifest if isinstance(manifest, str) else json.dumps(manifest))


def test_a_name_means_the_file_that_ollama_has(store: Path) -> None:
    keep(store, "llama3", "latest", {"layers": [TEMPLATE, WEIGHTS]})
    keep(store, "qwen3", "8b", {"layers": [WEIGHTS]})
    for name in ("llama3", "llama3:latest", "qwen3:8b"):
        source = resolve(name)
        assert source.path == store / "blobs" / DIGEST.replace(":", "-")
        assert source.weights == f"Ollama's {name}"
        assert names_model(name)
    for name in ("qwen3", "llama3:8b", "phi4", "../library/llama3"):
        assert ollama_file(name) is None
    assert not names_model("qwen3")
    with pytest.raises(ModelError, match="nor one that Ollama has here"):
        resolve("qwen3")


@pytest.mark.parametrize(
    "manifest",
    [
        "",
        "[]",
        "{",
        {"layers": [{"digest": DIGEST}]},
        {"layers": [{**WEIGHTS, "digest": "sha256:../x"}]},
        {"layers": [{**WEIGHTS, "digest": f"sha256:{'cd' * 32}"}]},
        {"layers": [TEMPLATE]},
        {"layers": [{**WEIGHTS, "digest": 5}]},
        "[" * 100_000,
    ],
)
def test_a_manifest_without_a_model_means_nothing(store: Path, manifest: Any) -> None:
    keep(store, "odd", "latest", manifest)
    assert ollama_file("odd") is None


def test_without_ollama_no_word_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OLLAMA_MODELS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ollama_file("llama3") is None
    monkeypatch.setattr("smart_decoding.models.checkpoints.ollama.SERVICE", tmp_path / "own")
    blob = tmp_path / "own" / "blobs" / DIGEST.replace(":", "-")
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"GGUF")
    keep(tmp_path / "own", "llama3", "latest", {"layers": [WEIGHTS]})
    assert ollama_file("llama3") == blob
