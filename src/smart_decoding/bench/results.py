"""What a run of `smart bench` found, to be read and shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from smart_decoding.bench.names import policy_of, short_names
from smart_decoding.bench.options import BASELINE
from smart_decoding.bench.sections import Cell, number, ratio_cell
from smart_decoding.bench.summary import POOLED

Run = Mapping[str, Any]
PLAIN, FLOOR = "speedup", "floor_speedup"  # what a headline may be, as runs name it


@dataclass(frozen=True)
class Results:
    """runs: as in the JSON. names: policy -> short name.

    copies: runs of contestants that verified the same trees as another one, which stands for them.
    load: what was measured under load, empty without."""

    provenance: Mapping[str, Any]
    runs: Sequence[Run]
    load: Mapping[str, Any] = field(default_factory=dict)
    copies: Sequence[Run] = ()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Of what a run returned."""
        return cls(
            provenance=mapping(data.get("provenance")),
            runs=originals(data["runs"]),
            copies=[run for run in data["runs"] if "copy_of" in run],
            load=mapping(data.get("load")),
        )

    @property
    def pooled(self) -> list[Run]:
        """The runs over all tasks, the baseline's included."""
        return [run for run in self.runs if run["task"] == POOLED]

    @property
    def contestants(self) -> list[Run]:
        """The pooled runs but the baseline's."""
        return [run for run in self.pooled if run["policy"] != BASELINE]

    @property
    def batch_sizes(self) -> list[int]:
        """Those of the pooled runs, ascending."""
        return sorted({run["batch_size"] for run in self.pooled})

    @property
    def tasks(self) -> list[str]:
        """All but the pool, in the order of measuring."""
        return list(dict.fromkeys(run["task"] for run in self.runs if run["task"] != POOLED))

    @property
    def names(self) -> dict[str, str]:
        """Policy -> short name; `smart` first, so that it always has the same colour."""
        names = short_names(run["policy"] for run in self.contestants)
        return dict(sorted(names.items(), key=lambda item: policy_of(item[0]) != "smart"))

    def find(self, policy: str, batch_size: int, task: str = POOLED) -> Run | None:
        """One run, if it was measured."""
        wanted = (policy, batch_size, task)
        return next(
            (r for r in self.runs if (r["policy"], r["batch_size"], r["task"]) == wanted), None
        )


def originals(runs: Sequence[Run]) -> list[Run]:
    """Those that are not copies of another one."""
    return [run for run in runs if "copy_of" not in run]


def interval(run: Mapping[str, Any], name: str = "speedup") -> tuple[float, float] | None:
    """The 95 % interval of a ratio; None where one block alone was measured."""
    low, high = number(run, f"{name}_low"), number(run, f"{name}_high")
    return (low, high) if low is not None and high is not None else None


def headline(run: Run) -> str:
    """The name of the speedup to quote: over plain decoding; on a GPU where that is slow, over what
    reading memory takes."""
    return FLOOR if run.get("headline") == FLOOR and number(run, FLOOR) is not None else PLAIN


def headline_cell(run: Run | None) -> Cell:
    """The speedup to quote, with its interval."""
    return ratio_cell(run) if run is None else ratio_cell(run, headline(run))


def mapping(value: Any) -> Mapping[str, Any]:
    """The value if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}
