"""The origin of a result: command, commit, versions, hardware, weights, head, seed, time. No host
or user names."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import smart_decoding
from smart_decoding.errors import CapacityError
from smart_decoding.files import whole, without_folder

_FLAGS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
    "sve",
)
_PACKAGES = ("numpy", "safetensors", "tokenizers")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def provenance(
    command: str, seed: int, weights: Mapping[str, str], head: Any, plain_torch: str | None = None
) -> dict[str, Any]:
    """Return the provenance in every result. head: the drafter's weights, or its name; plain_torch:
    why the CPU kernels did not run on a CPU."""
    return {
        "command": command,
        "commit": commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "hardware": hardware(),
        "plain_torch": plain_torch,
        "weights": {**weights, "model": without_folder(weights["model"])},
        "head": head,
        "seed": seed,
    }


def commit() -> str:
    """Return the commit of the source, '-dirty' if tracked files differ from it; the version where
    there is no repository."""
    folder = Path(smart_decoding.__file__).parent
    head = _git(folder, "rev-parse", "HEAD")
    changed = _git(folder, "status", "--porcelain", "-uno", ".")
    if head is None or _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return f"smart-decoding {smart_decoding.__version__}, not in a repository"
    return head + ("-dirty" if changed else "")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide speed and results."""
    import torch

    found = {
        "smart-decoding": smart_decoding.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # with its build, which PyPI's metadata leave out
    }
    return {**found, **{package: version_of(package) or "absent" for package in _PACKAGES}}


def version_of(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def hardware() -> dict[str, Any]:
    """Return the machine, and which CPU kernels run."""
    from smart_decoding.kernels import library

    reason = library.unavailable()
    return {**machine(), "cpu_kernels": library.chosen() if reason is None else f"none: {reason}"}


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, torch's threads, memory, when there are huge pages,
    the instruction sets that matter, any GPU."""
    import torch

    from smart_decoding.kernels.library import cpu_flags, cpu_info
    from smart_decoding.kernels.limits import usable_cpus

    return {
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": cpu_info().get("model name") or platform.processor() or platform.machine(),
        "cores": usable_cpus(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "huge_pages": huge_pages(),
        "flags": [flag for flag in _FLAGS if flag in cpu_flags()],
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }


def huge_pages() -> str | None:
    """Return when Linux grants huge pages: "always", "madvise" (on request) or "never"; None if it
    does not tell."""
    try:
        text = _HUGE_PAGES.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return None
    return text.partition("[")[2].partition("]")[0] or None


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


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):  # the first on Windows
        return None
