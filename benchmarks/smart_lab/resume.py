"""The results of a cut benchmark, kept in a file, so that the same command goes on where it
stopped.

The file holds a key (options, machine, source and versions) and units of finished work under names,
such as the cycles of a batch size. It is written whole after each unit. Another key is refused:
figures of two programs or machines do not belong into one table. Policies that learn start afresh
when a run goes on.

Needed by `bench`, `robustness` and `gguf-speed`, for runs that are cut.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import smart_decoding
from smart_decoding.bench.blocks import Answer, Block, Counts
from smart_decoding.bench.cycles import Measurement
from smart_decoding.bench.provenance import commit, hardware, versions, write_text
from smart_decoding.errors import ConfigError

if TYPE_CHECKING:
    from smart_lab.options import LabOptions

_MACHINE = ("machine", "cpu", "cores", "threads", "gpu", "cpu_kernels")
SOURCES = (Path(smart_decoding.__file__).parent, Path(__file__).parent)
_CODE = (".py", ".cpp", ".h", ".inc")
_NOT_PART = (
    "json",
    "time_limit",
    "resume",
)  # may change from call to call


class Progress:
    """Finished units by name. Without a path nothing is read or written."""

    def __init__(self, path: Path | None, key: Mapping[str, Any]) -> None:
        self._path, self._key = path, _through_json(dict(key))
        self._units: dict[str, list[str]] = defaultdict(list)
        if path is not None and path.exists():
            self._read(path)

    def units(self, name: str) -> list[Any]:
        """Return what was finished under a name, in order."""
        return [json.loads(unit) for unit in self._units.get(name, ())]

    def add(self, name: str, unit: Any) -> None:
        """Keep one more unit, on disk before this returns."""
        self._units[name].append(json.dumps(unit))
        if self._path is not None:
            write_text(self._path, self._text())

    def agree(self, name: str, value: Any) -> None:
        """Add to the key what was not known before. Raises ConfigError if the file has another
        value."""
        value = _through_json(value)
        if self._key.setdefault(name, value) != value:
            raise ConfigError(self._refusal(name, self._key[name], value))

    def _read(self, path: Path) -> None:
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            found, units = dict(kept["key"]), {name: list(of) for name, of in kept["units"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{path} is not a run to go on with: give a file that --resume wrote, or none"
            ) from error
        for name, value in self._key.items():
            if found.get(name) != value:
                raise ConfigError(self._refusal(name, found.get(name), value))
        self._key = found
        self._units.update({name: [json.dumps(unit) for unit in of] for name, of in units.items()})

    def _refusal(self, name: str, theirs: Any, ours: Any) -> str:
        theirs, ours, name = _difference(theirs, ours, name)
        return (
            f"{self._path} is of another run ({name} {theirs} there, {ours} here): "
            "give the same options on the same machine and source, or another file"
        )

    def _text(self) -> str:
        units = ",\n".join(
            f"{json.dumps(name)}: [{','.join(of)}]" for name, of in self._units.items()
        )
        return f'{{"key": {json.dumps(self._key)},\n"units": {{{units}}}}}\n'


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


def _difference(theirs: Any, ours: Any, name: str) -> tuple[Any, Any, str]:
    """Return the first entry that differs between two mappings."""
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        for inner in [*ours, *theirs]:
            if theirs.get(inner) != ours.get(inner):
                return theirs.get(inner), ours.get(inner), f"{name} {inner}"
    return theirs, ours, name


def _through_json(value: Any) -> Any:
    """Return the value as read back from JSON: tuples become lists, paths become strings."""
    return json.loads(json.dumps(value, default=str))
