"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A scratch path to write to: it becomes `path` when the block ends, and vanishes if that fails
    (or Ctrl-C).

    Each process has its own, so that two may write the same file: the last one wins."""
    scratch = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield scratch
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
