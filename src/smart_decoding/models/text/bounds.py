"""Bounds of processes for what strangers may make slow or large: the operating system ends one that
breaks them, in native code, too."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

MEMORY = 256 * 2**20  # bytes of address space beyond what a process has when it is ready
NO_MEMORY = 77  # the exit status where Python found no memory; native code aborts
OVER_TIME = -signal.SIGPROF if hasattr(signal, "SIGPROF") else 1  # Windows has no such processes
OVER_MEMORY = (NO_MEMORY, -signal.SIGABRT, -signal.SIGSEGV)
# Variables that it needs. All others may be secrets, such as keys and tokens.
_KNOWN = ("HOME", "LANG", "LANGUAGE", "PATH", "TMPDIR", "TZ")
_KINDS = ("LC_", "LD_", "PYTHON")
bounded = False  # whether this is such a process


def environment() -> dict[str, str]:
    """Return the environment of such a process: no secrets, and this one's places of modules."""
    kept = {name: value for name, value in os.environ.items() if name.startswith(_KINDS)}
    kept |= {name: os.environ[name] for name in _KNOWN if name in os.environ}
    ours = str(Path(__file__).parents[3])  # it may have been found in the working folder
    return {**kept, "PYTHONPATH": os.pathsep.join([*filter(None, sys.path), ours])}


def limit_memory() -> None:
    """Bound the memory of this process from now on. macOS has no such limit."""
    import resource  # Windows lacks it

    global bounded
    bounded = True
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def limit_time(seconds: float) -> None:
    """End this process after so many seconds of a processor; 0: never."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
