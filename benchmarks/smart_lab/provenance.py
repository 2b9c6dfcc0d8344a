"""The origin of a result: command, commit, versions, hardware, weights, head, seed, time. No host
or user names. And whether the file that it goes to can be written.

Needed by every command that writes JSON, and by tools/soak.py.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import smart_decoding
from smart_decoding.errors import ConfigError
from smart_decoding.files import without_folder
from smart_decoding.measuring.machine import machine, versions


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


def hardware() -> dict[str, Any]:
    """Return the machine, and which CPU kernels run."""
    from smart_decoding.kernels import library

    reason = library.unavailable()
    return {**machine(), "cpu_kernels": library.chosen() if reason is None else f"none: {reason}"}


def check_outputs(files: Sequence[Path | None]) -> None:
    """Raise ConfigError if a file cannot be written."""
    for file in files:
        if file is not None and (not file.parent.is_dir() or file.is_dir()):
            raise ConfigError(f"{file} cannot be written: it must be a file in an existing folder")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
