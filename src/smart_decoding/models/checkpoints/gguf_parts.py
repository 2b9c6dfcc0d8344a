"""GGUF files that llama.cpp has split: NAME-00001-of-00003.gguf and so on."""

from __future__ import annotations

import re
from pathlib import Path

_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def parts_of(name: str) -> list[str]:
    """Return the files of the model that this one is a part of, the first of which has the
    metadata; of a model in one file itself."""
    match = _PART.fullmatch(name)
    if match is None or not 1 <= int(match[2]) <= int(match[3]):
        return [name]
    return [f"{match[1]}-{n:05d}-of-{match[3]}.gguf" for n in range(1, int(match[3]) + 1)]


def files_of(path: Path) -> list[Path]:
    """Return the same as paths, whether they are there or not."""
    return [path.parent / name for name in parts_of(path.name)]


def without_part(name: str) -> str:
    """Return the file's name if the model were not split."""
    match = _PART.fullmatch(name)
    return name if match is None else f"{match[1]}.gguf"


def is_further_part(name: str) -> bool:
    """Return whether it is another than the first part of a split model."""
    match = _PART.fullmatch(name)
    return match is not None and int(match[2]) > 1
