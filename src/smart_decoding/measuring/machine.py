"""The machine that runs SMART, and the versions of what decides its speed."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import smart_decoding

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


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):  # the first on Windows
        return None
