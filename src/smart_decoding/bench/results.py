"""The results of a run of `smart bench`, to be read and shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from smart_decoding.bench.options import BASELINE, OURS
from smart_decoding.bench.summary import POOLED

Run = Mapping[str, Any]


@dataclass(frozen=True)
class Results:
    """runs: as in the JSON."""

    provenance: Mapping[str, Any]
    runs: Sequence[Run]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Make them of a run's return value."""
        return cls(mapping(data.get("provenance")), data["runs"])

    @property
    def pooled(self) -> list[Run]:
        """The runs over all tasks, the baseline's included."""
        return [run for run in self.runs if run["task"] == POOLED]

    @property
    def policies(self) -> list[str]:
        """All policies but the baseline; `smart` first, so that it always has the same colour."""
        found = dict.fromkeys(run["policy"] for run in self.pooled if run["policy"] != BASELINE)
        return sorted(found, key=lambda policy: policy != OURS)

    @property
    def batch_sizes(self) -> list[int]:
        """The batch sizes of the pooled runs, ascending."""
        return sorted({run["batch_size"] for run in self.pooled})

    @property
    def tasks(self) -> list[str]:
        """All tasks but the pool, in the order of measuring."""
        return list(dict.fromkeys(run["task"] for run in self.runs if run["task"] != POOLED))

    def find(self, policy: str, batch_size: int, task: str = POOLED) -> Run | None:
        """Return one run, if it was measured."""
        key = (policy, batch_size, task)
        return next(
            (r for r in self.runs if (r["policy"], r["batch_size"], r["task"]) == key), None
        )


def mapping(value: Any) -> Mapping[str, Any]:
    """Return the value if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}
