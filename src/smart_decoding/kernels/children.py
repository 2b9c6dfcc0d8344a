"""What programs that we start inherit: the user's environment, and an end with us."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path

_OURS: dict[str, str] = {}  # variables that this package set for itself
_SIGNAL_OF_THE_PARENTS_END = 1  # PR_SET_PDEATHSIG
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def set_for_us(name: str, value: str) -> None:
    """Set a variable of this process, unless the user has."""
    if name not in os.environ:
        os.environ[name] = _OURS[name] = value


def environment() -> dict[str, str]:
    """Return the environment for another program: ours without what this package set."""
    return {name: value for name, value in os.environ.items() if _OURS.get(name) != value}


def become_another_program() -> None:
    """Unset what this package set, before an engine is imported that reads it."""
    for name, value in _OURS.items():
        if os.environ.get(name) == value:
            del os.environ[name]


def wait_for_group(group: int, seconds: float) -> None:
    """Wait until no process of a group runs, where Linux tells: a GPU's memory is free only
    then."""
    stop = time.monotonic() + seconds
    while _runs(group) and time.monotonic() < stop:
        time.sleep(0.01)


def _runs(group: int) -> bool:
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            state, _, of, *_ = file.read_text(errors="replace").rpartition(")")[2].split()
            if int(of) == group and state not in ("Z", "X"):  # nobody may reap zombies
                return True
    return False


def end_with_parent() -> None:
    """Let Linux kill this process when its parent ends, by force too. For `preexec_fn`."""
    if _prctl is not None:
        _prctl(_SIGNAL_OF_THE_PARENTS_END, signal.SIGKILL)
