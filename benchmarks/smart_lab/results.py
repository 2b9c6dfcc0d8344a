"""The results that `bench --json` wrote, checked: missing or odd values are unknown, not errors.

Needed by `results` and `report`, for all of benchmarks/results.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from smart_decoding.bench.options import BASELINE, OURS
from smart_decoding.errors import ConfigError
from smart_lab.summary import POOLED

Run = Mapping[str, Any]


@dataclass(frozen=True)
class Results:
    """The runs of a file, as in its JSON."""

    runs: Sequence[Run]

    @classmethod
    def from_dict(cls, data: Any, source: str = "the results") -> Self:
        """Raise ConfigError for what `bench` cannot have written."""
        none = ConfigError(f"{source} has no 'runs': give a file that smart_lab bench --json wrote")
        if not isinstance(data, Mapping) or not isinstance(data.get("runs"), Sequence):
            raise none
        runs = checked_runs(data["runs"], source)
        if not runs:
            raise none
        if not any(run["task"] == POOLED for run in runs):
            raise ConfigError(
                f"{source} has no runs of the task {POOLED!r}, which pools the others"
            )
        return cls(runs)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raise ConfigError for a file that is missing or not what `bench --json` writes."""
        return cls.from_dict(_json_in(path), str(path))

    @property
    def policies(self) -> list[str]:
        """All policies but the baseline; `smart` first, so that it always has the same colour."""
        found = dict.fromkeys(run["policy"] for run in self.runs if run["policy"] != BASELINE)
        return sorted(found, key=lambda policy: policy != OURS)

    @property
    def batch_sizes(self) -> list[int]:
        """The batch sizes, ascending."""
        return sorted({run["batch_size"] for run in self.runs})

    def find(self, policy: str, batch_size: int) -> Run | None:
        """Return one run over all tasks, if it was measured."""
        key = (policy, batch_size, POOLED)
        return next(
            (r for r in self.runs if (r["policy"], r["batch_size"], r["task"]) == key), None
        )


def mapping(value: Any) -> Mapping[str, Any]:
    """Return the value if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def _json_in(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error


def checked_runs(value: Any, source: str) -> Sequence[Run]:
    """Return a list of runs; none if there is no list. Raises ConfigError for a run that cannot be
    one."""
    runs = value if isinstance(value, Sequence) and not isinstance(value, str) else ()
    for run in runs:
        if not isinstance(run, Mapping):
            raise ConfigError(f"{source}: each of 'runs' must be an object")
        for name, kind in (("policy", str), ("task", str), ("batch_size", int)):
            if not isinstance(run.get(name), kind):
                raise ConfigError(f"{source}: a run has no usable {name!r}")
        if "speedup" not in run:
            raise ConfigError(f"{source}: a run has no 'speedup'")
    return runs
