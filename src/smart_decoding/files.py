"""Files that are written whole or not at all, and files of unknown origin, read with limits."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from smart_decoding.errors import CapacityError, ConfigError, ModelError, SmartError

LARGEST = 64 << 20  # bytes of a model's text file; the largest vocabularies take 35 MB


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Return a scratch path to write to: it becomes `path` when the block ends, and vanishes if
    that fails (or Ctrl-C).

    Each writer has its own, so that two may write the same file: the last one wins. Containers
    that share a folder may have equal process ids."""
    scratch = path.with_name(f"{path.name}.{uuid4().hex[:8]}.partial")
    try:
        yield scratch
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write `result` whole or not at all; NaN and infinities become null. Raises CapacityError if
    it cannot."""
    write_text(path, json.dumps(plain(result), indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises CapacityError if it cannot."""
    try:
        with whole(path) as scratch:
            scratch.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CapacityError(f"{path} could not be written: {error.strerror}") from error


def plain(value: Any) -> Any:
    """Return a value for JSON: without numpy scalars, None for NaN and infinities."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()  # a numpy scalar
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn every error in the block into a ModelError of one line that names the file, since a file
    of a model may hold anything. A lack of memory becomes a CapacityError.

    Raises ModelError for a missing file, and for one that is no regular file: reading a device or a
    pipe may never end."""
    if not path.is_file():
        what = "no regular file" if path.exists() else "missing: is the folder a whole model?"
        raise ModelError(f"{path.name} in {path.parent} is {what}")
    try:
        yield
    except (SmartError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic in Rust's libraries is no Exception
        where = f"{path.name} in {path.parent}"
        number = errno_of(error)
        memory = isinstance(error, MemoryError) or number == errno.ENOMEM
        if memory or "allocate memory" in str(error) or "out of memory" in str(error):  # torch's
            raise CapacityError(f"there is no memory to read {where}: free some") from error
        if number not in (None, errno.EINVAL):  # a wrong offset
            raise ModelError(f"{where} cannot be read: {os.strerror(number)}") from error
        raise ModelError(
            f"{where} is corrupt, cut or malformed ({reason_of(error)}); fetch it again"
        ) from error


def expanded(path: str | Path) -> Path:
    """Put the home folder in place of ~. Raises ConfigError for a user who is not known, and for
    text that can name no file."""
    try:
        local = Path(path).expanduser()
        os.lstat(local)
    except RuntimeError as error:
        raise ConfigError(f"{path}: no such user, so there is no such folder") from error
    except (OSError, ValueError) as error:
        number = error.errno if isinstance(error, OSError) else errno.ENAMETOOLONG
        if number == errno.ENAMETOOLONG:  # or it has a NUL
            raise ConfigError(f"no file can have the name {_shortened(str(path))}") from error
    return local


def _shortened(text: str, most: int = 60) -> str:
    """Quote a text of unknown origin in one line, cut where it is long."""
    return repr(text) if len(text) <= most else f"{text[:most]!r}... ({len(text)} characters)"


def without_folder(name: str) -> str:
    """Return the last part of a path that exists, as its folder may name a user; else `name`."""
    path = expanded(name)
    return path.absolute().name if path.exists() else name


def errno_of(error: BaseException) -> int | None:
    """Return the errno of an error, which libraries in Rust put into its text; None without one."""
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"\(os error (\d+)\)", str(error))
    return int(match[1]) if match else None


def reason_of(error: BaseException) -> str:
    """Return an error's type and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def read_text(path: Path) -> str:
    """Return a text file of a model's folder. Raises ModelError."""
    with reading(path), path.open("rb") as file:
        content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError(f"larger than {LARGEST >> 20} MB")
        return content.decode()


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a model's folder. Raises ModelError."""
    with reading(path):
        content = json.loads(read_text(path))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        return content


def sha256_of(path: Path) -> str:
    """Return the checksum of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def are_intact(sums: Mapping[Path, str], marker: Path) -> bool:
    """Return whether files have these checksums. Raises OSError for one that cannot be read.

    Files are summed once (1.5 s for a gigabyte). `marker` then holds their sizes and times, and
    unchanged files are not summed again."""
    fingerprint = _fingerprint(sums)
    with suppress(OSError):
        if marker.read_bytes() == fingerprint:
            return True
    if any(sha256_of(path) != sha256 for path, sha256 in sums.items()):
        return False
    with suppress(OSError):  # a cache that is only read is summed each time
        marker.write_bytes(fingerprint)
    return True


def remember(sums: Mapping[Path, str], marker: Path) -> None:
    """Write the marker of files whose checksums were just taken."""
    marker.write_bytes(_fingerprint(sums))


def _fingerprint(sums: Mapping[Path, str]) -> bytes:
    stats = {path: path.stat() for path in sums}
    lines = (
        f"{path.name} {sha256} {stats[path].st_size} {stats[path].st_mtime_ns}"
        for path, sha256 in sums.items()
    )
    return "\n".join(lines).encode()
