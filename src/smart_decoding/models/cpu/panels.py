"""Packed quants of a GGUF file, kept in the cache: a later start maps them and packs nothing.

A folder beside the one that was made of the file holds them, for one build of the kernels. It is
checked as converted weights are, and `pack` compares a strip of each matrix with the file. Mapped
pages are shared by processes, come when they are first read, and make way when memory is short.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from smart_decoding.errors import DownloadError, ModelError
from smart_decoding.files import read_json
from smart_decoding.kernels import library
from smart_decoding.kernels.weights import Arena, Matrix
from smart_decoding.models.checkpoints.hub import (
    RECORD,
    is_whole,
    move_into_place,
    remove_unused,
    scratch,
    write_record,
)
from smart_decoding.models.checkpoints.weight_files import Weights
from smart_decoding.progress import long_step

log = logging.getLogger("smart.models")

_NAME = "panels"


def kept_panels(
    weights: Mapping[str, Matrix], dtype: torch.dtype, in_bytes: bool
) -> KeptPanels | None:
    """Of a GGUF file whose quants stay as they are, on Linux; None for all others. in_bytes: as of
    an Arena."""
    made = weights.folder if isinstance(weights, Weights) else None
    if made is None or dtype != torch.bfloat16 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    return KeptPanels(made, in_bytes)


class KeptPanels:
    """made: the converted folder of the file."""

    def __init__(self, made: Path, in_bytes: bool) -> None:
        self._made = made
        self._stem = f"{made.name.removesuffix('-stored')}-panels-{library.chosen()}"
        self._stem += "-bytes" if in_bytes else ""
        build = hashlib.sha256(library.identity(library.chosen()).encode()).hexdigest()[:8]
        self._folder = made.with_name(f"{self._stem}-{build}")

    def read(self) -> Tensor | None:
        """uint8 [bytes], mapped; None where none are kept, or they are damaged."""
        if not is_whole(self._folder):
            return None
        with suppress(OSError), (self._folder / _NAME).open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE)
            with suppress(OSError):  # only advice
                mapped.madvise(mmap.MADV_HUGEPAGE)
            return torch.frombuffer(mapped, dtype=torch.uint8)
        return None

    def write(self, panels: Sequence[Tensor]) -> None:
        """Keep them in this order. Those for other kernels are removed, if none used them lately:
        two builds may share a cache. Where that cannot be, or
        would leave less room than it takes, a line in the log says so."""
        size = sum(map(len, panels))
        try:
            source = read_json(self._made / RECORD)["source"]
            step = long_step(f"keeping the packed weights of {source}, once", size, "B")
            with scratch(2 * size) as part, step as progress:
                with (part / _NAME).open("wb") as file:
                    for piece in _pieces(panels):
                        file.write(piece)
                        progress(len(piece))
                write_record(part, {"source": source})
                shutil.rmtree(self._folder, ignore_errors=True)  # of another order of packing
                move_into_place(part, self._folder)
            others = self._made.parent.glob(f"{self._stem}-{'[0-9a-f]' * 8}")
            remove_unused(each for each in others if each != self._folder)
        except (DownloadError, ModelError) as error:
            log.warning("packed weights are not kept, each start packs them: %s", error)


def _pieces(panels: Sequence[Tensor]) -> Iterator[bytearray]:
    """Return all bytes, a huge page at a time: as they are written, so they are mapped."""
    piece = bytearray()
    for panel in panels:
        for start in range(0, len(panel), Arena.HUGE):
            piece += panel[start : start + Arena.HUGE].numpy().data
            if len(piece) >= Arena.HUGE:
                yield piece[: Arena.HUGE]
                del piece[: Arena.HUGE]
    yield piece
