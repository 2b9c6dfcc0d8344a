"""Finished work of a cut run, kept in a file, so that the same command goes on where it stopped.

The file holds a key (options, machine, versions) and units of finished work under names, such as
the blocks of a batch size. It is written whole after each unit. Another key is refused: figures of
two programs or machines do not belong into one table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smart_decoding.errors import ConfigError
from smart_decoding.files import write_text


class Progress:
    """Finished units by name. Without a path nothing is read or written."""

    def __init__(self, path: Path | None, key: Mapping[str, Any]) -> None:
        self._path, self._key = path, _through_json(dict(key))
        self._units: dict[str, list[Any]] = {}
        if path is not None and path.exists():
            self._read(path)

    def units(self, name: str) -> list[Any]:
        """Return what was finished under a name, in order."""
        return list(self._units.get(name, ()))

    def add(self, name: str, unit: Any) -> None:
        """Keep one more unit, on disk before this returns."""
        self._units.setdefault(name, []).append(_through_json(unit))
        if self._path is not None:
            write_text(self._path, json.dumps({"key": self._key, "units": self._units}) + "\n")

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
        self._units = units

    def _refusal(self, name: str, theirs: Any, ours: Any) -> str:
        theirs, ours, name = _difference(theirs, ours, name)
        return (
            f"{self._path} is of another run ({name} {theirs} there, {ours} here): "
            "give the same options on the same machine and source, or another file"
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
