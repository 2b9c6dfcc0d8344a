"""`smart info`: what it says of the kernels, the machine, the cache and the versions."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import pytest
import torch

from smart_decoding.cli import info
from smart_decoding.cli import main as cli
from smart_decoding.core.costs import CostModel
from smart_decoding.errors import ConfigError
from smart_decoding.kernels import library
from smart_decoding.models.checkpoints import loading
from smart_decoding.profiling import cache


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with one file, in a process in which no kernels are in use."""
    monkeypatch.setenv("SMART_CACHE", str(tmp_path))
    monkeypatch.setattr(library, "_running", library._Running())
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "0123-tiny.gguf").write_bytes(bytes(3_000_000))
    return tmp_path


def shown(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert cli.main(["info", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_kernels_that_run(capsys: pytest.CaptureFixture[str]) -> None:
    found = shown(capsys)["kernels"]
    assert found["chosen"] == library.chosen()
    mine = [variant for variant in library.variants() if variant.machine == platform.machine()]
    assert list(found["variants"]) == [variant.name for variant in mine]
    assert found["variants"][library.chosen()] is None
    for variant in mine:
        if variant.refusal() is not None:
            assert found["variants"][variant.name] == variant.refusal()


def test_what_the_system_denies_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(name: str) -> None:
        raise ConfigError(f"{name} is denied")

    best = library.runnable()[0]
    monkeypatch.setattr(library, "load", denied)
    assert info.kernels()["variants"][best] == f"{best} is denied"


def test_a_choice_that_cannot_run_is_told_and_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    library.best.cache_clear()
    monkeypatch.setenv("SMART_ISA", "nonsense")
    assert cli.main(["info"]) == 0
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first.startswith(
        "CPU kernels: none (the kernels' variant 'nonsense' is no variant; here run: "
    )
    assert second.startswith("  ")  # the variants are listed all the same


def test_choices_of_auto_are_told_with_their_reasons(
    own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shown(capsys)["auto"] == {}
    told = {"1": "8 bits on amx, 1.50 times as fast", "8": "exact on amx"}
    cost = CostModel.from_table({1: {1: 0.001, 8: 0.002}}, {1: 0.001})
    cache.save_profile(own_cache / "profiles" / "a.json", cost, "tiny")
    cache.save(own_cache / "profiles" / "b.json", {"seconds": {}, "told": told}, "tiny")
    (own_cache / "profiles" / "c.json").write_text("[]")
    assert shown(capsys)["auto"] == {"tiny": told}
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert "  tiny: 8 bits on amx, 1.50 times as fast\n  tiny: exact on amx\n" in text


def test_the_size_of_the_cache(own_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = shown(capsys)["cache"]
    assert found["path"] == str(own_cache)
    assert found["bytes"] == 3_000_000


def test_the_text_has_it_all_and_loads_no_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], own_cache: Path
) -> None:
    monkeypatch.setattr(loading, "load_checkpoint", None)
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"CPU kernels: {library.chosen()} (the best one that runs here)\n")
    machine = ("threads: ", "memory: ", "GPU: ", "transformers ", f"torch {torch.__version__}")
    assert text.endswith("what can draft: eagle, mtp, draft_model, ngram, union\n")
    for words in ("runs here\n", f"cache: {own_cache}, 3 MB\n", *machine):
        assert words in text
