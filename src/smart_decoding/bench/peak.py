"""The highest resident memory of this process since it was last asked to forget, where Linux
tells."""

from __future__ import annotations

from pathlib import Path

_PROC = Path("/proc/self")


def forget_peak() -> bool:
    """Starts a new peak at the present size; false where that cannot be done."""
    try:
        (_PROC / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_gib() -> float | None:
    """GiB at the peak; None where the system does not tell."""
    try:
        lines = (_PROC / "status").read_text().splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith("VmHWM:")), None)
    return int(found.split()[1]) / 2**20 if found else None
