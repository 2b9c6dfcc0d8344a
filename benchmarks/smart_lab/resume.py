"""The cycles of a cut benchmark, kept as units of a `Progress`, and the key of a run.

Policies that learn start afresh when a run goes on.

Needed by `bench`, `robustness` and `gguf-speed`, for runs that are cut.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import smart_decoding
from smart_decoding.bench.blocks import Answer, Block, Counts
from smart_decoding.measuring.machine import versions
from smart_lab.cycles import Measurement
from smart_lab.provenance import commit, hardware

if TYPE_CHECKING:
    from smart_decoding.measuring.resume import Progress
    from smart_lab.options import LabOptions

_MACHINE = ("machine", "cpu", "cores", "threads", "gpu", "cpu_kernels")
SOURCES = (Path(smart_decoding.__file__).parent, Path(__file__).parent)
_CODE = (".py", ".cpp", ".h", ".inc")
_NOT_PART = (
    "json",
    "time_limit",
    "resume",
)  # may change from call to call


class KeptMeasurement(Measurement):
    """A measurement that goes on from what a file has under `name`, and keeps each new cycle
    there."""

    def __init__(self, progress: Progress, name: str) -> None:
        super().__init__()
        for unit in progress.units(name):
            again = unit["again"]
            cycle = {label: block_of(block) for label, block in unit["cycle"].items()}
            super().add(cycle, None if again is None else block_of(again))
        self._progress = progress
        self._name = name

    def add(self, cycle: dict[str, Block], again: Block | None) -> None:
        super().add(cycle, again)
        unit = {
            "cycle": {label: plain_block(block) for label, block in cycle.items()},
            "again": None if again is None else plain_block(again),
        }
        self._progress.add(self._name, unit)


def key_of(options: LabOptions) -> dict[str, Any]:
    """Return the settings that must be the same for a run to go on."""
    names = (field.name for field in fields(options))
    option = {name: getattr(options, name) for name in names if name not in _NOT_PART}
    here = hardware()
    return {
        "option": option,
        "machine": {name: here[name] for name in _MACHINE},
        "version": versions(),
        "commit": commit(),
        "source": source_digest(),
    }


def source_digest() -> str:
    """Return a digest of the package's code and the laboratory's: a commit does not cover files
    changed since."""
    digest = hashlib.sha256()
    for root in SOURCES:
        for path in sorted(p for p in root.rglob("*") if p.suffix in _CODE):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def plain_block(block: Block) -> dict[str, Any]:
    """Return a block as JSON can hold it."""
    return {
        "task": block.task,
        "batch_size": block.batch_size,
        "counts": [getattr(block.counts, field.name) for field in fields(Counts)],
        "answers": {index: asdict(answer) for index, answer in block.answers.items()},
        "total_tokens": block.total_tokens,
        "total_seconds": block.total_seconds,
    }


def block_of(kept: Mapping[str, Any]) -> Block:
    """Return the inverse of `plain_block`."""
    return Block(
        kept["task"],
        kept["batch_size"],
        Counts(*kept["counts"]),
        {int(index): Answer(**answer) for index, answer in kept["answers"].items()},
        kept["total_tokens"],
        kept["total_seconds"],
    )
