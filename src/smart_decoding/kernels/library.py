"""Compiles and loads the CPU kernels: a few C++ files, one shared library per machine, cached by content.

No Python headers and no build system are needed, only a C++ compiler (Debian: g++). Without one the torch path runs."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from smart_decoding.models.hub import cache_dir

SOURCES = [Path(__file__).parent / "csrc" / name for name in ("kernels.cpp", "controller.cpp", "round.cpp")]
HEADERS = sorted((Path(__file__).parent / "csrc").glob("*.h"))
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-w")


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


@functools.cache
def unavailable() -> str | None:
    """Why the kernels cannot run here, or None."""
    if os.environ.get("SMART_NO_KERNELS"):
        return "SMART_NO_KERNELS is set"
    if compiler() is None:
        return "no C++ compiler was found (Debian: apt-get install g++)"
    try:
        library()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"the kernels did not compile or load: {error}"
    return None


def sources() -> str:
    return "\n".join(source.read_text() for source in (*SOURCES, *HEADERS))


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded kernels, compiled if these sources were not compiled on this machine before. OSError if that fails."""
    cxx = compiler()
    if cxx is None:
        raise OSError("no C++ compiler")
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=True).stdout
    key = hashlib.sha256("\n".join((sources(), *FLAGS, version, _cpu_flags())).encode()).hexdigest()[:16]
    folder = cache_dir() / "kernels"
    target = folder / f"kernels-{key}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / "kernels.so"
            subprocess.run(
                [cxx, *FLAGS, *map(str, SOURCES), "-o", str(built)], check=True, capture_output=True, text=True
            )
            os.replace(built, target)  # atomic: another process sees all of it or nothing
    return ctypes.CDLL(str(target))
