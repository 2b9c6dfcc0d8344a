"""The results that `smart bench --json` wrote, checked: what is missing or odd is unknown, not an
error."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from smart_decoding.bench.floor import FLOOR, PLAIN
from smart_decoding.bench.names import policy_of, short_names
from smart_decoding.bench.options import BASELINE
from smart_decoding.bench.sections import UNDECIDED, Cell, RatioCell, number, ratio_cell
from smart_decoding.bench.summary import POOLED
from smart_decoding.core.cost import CostModel
from smart_decoding.errors import ConfigError

Run = Mapping[str, Any]


@dataclass(frozen=True)
class Results:
    """runs: as in the JSON. names: policy -> short name. cost: the measured profile, if the file
    has one.

    copies: runs of contestants that verified the same trees as another one, which stands for them.
    sampled, load: the further parts, empty where they were not measured. A subclass may read more
    of them."""

    PARTS: ClassVar[Sequence[str]] = ("sampled", "load")  # that several files may contribute

    provenance: Mapping[str, Any]
    runs: Sequence[Run]
    cost: CostModel | None = None
    memory: Mapping[str, Any] = field(default_factory=dict)
    sampled: Sequence[Run] = ()
    load: Mapping[str, Any] = field(default_factory=dict)
    limits: Mapping[str, Any] = field(default_factory=dict)
    copies: Sequence[Run] = ()

    @classmethod
    def from_dict(cls, data: Any, source: str = "the results") -> Self:
        """Raises ConfigError for what `smart bench` cannot have written."""
        if not isinstance(data, Mapping) or not isinstance(data.get("runs"), Sequence):
            raise ConfigError(f"{source} has no 'runs': give a file that smart bench --json wrote")
        parts = cls.parts_of(data, source)
        runs = checked_runs(data["runs"], source)
        if not runs and not any(parts.values()):
            raise ConfigError(f"{source} has no 'runs': give a file that smart bench --json wrote")
        if runs and not any(run["task"] == POOLED for run in runs):
            raise ConfigError(
                f"{source} has no runs of the task {POOLED!r}, which pools the others"
            )
        return cls(
            provenance=mapping(data.get("provenance")),
            runs=[run for run in runs if "copy_of" not in run],
            copies=[run for run in runs if "copy_of" in run],
            cost=_cost(data.get("cost")),
            memory=mapping(data.get("memory")),
            limits=mapping(data.get("limits")),
            **parts,
        )

    @classmethod
    def parts_of(cls, data: Mapping[str, Any], source: str) -> dict[str, Any]:
        """The fields of PARTS."""
        return {
            "sampled": [
                run
                for run in checked_runs(data.get("sampled_runs"), source)
                if "copy_of" not in run
            ],
            "load": _load(data.get("load")),
        }

    @classmethod
    def read(cls, path: Path, *others: Path) -> Self:
        """One file, or several whose parts are put together: the first that has runs gives them,
        and the machine.

        Raises ConfigError for a file that is missing or not what `smart bench --json` writes."""
        found = [cls.from_dict(_json_in(each), str(each)) for each in (path, *others)]
        main = next((each for each in found if each.runs), found[0])
        commands = [
            str(each.provenance.get("command")) for each in found if each.provenance.get("command")
        ]
        origin = {**main.provenance, **({"command": "\n".join(commands)} if commands else {})}
        return replace(
            main, provenance=origin, **{part: cls.joined(part, found) for part in cls.PARTS}
        )

    @classmethod
    def joined(cls, part: str, found: Sequence[Self]) -> Any:
        """A part of several files: the first that has it."""
        return next(
            (value for each in found if (value := getattr(each, part))), getattr(found[0], part)
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
    def decided(self) -> list[Run]:
        """The contestants whose speedup is known."""
        return [run for run in self.contestants if number(run, "speedup") is not None]

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


def verdict(run: Run) -> str:
    """FASTER or SLOWER by the speedup to quote, only where its whole interval says so."""
    cell = headline_cell(run)
    return cell.kind if isinstance(cell, RatioCell) else UNDECIDED


def _json_in(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error


def _load(value: Any) -> Mapping[str, Any]:
    """The part about load, if its runs can be read."""
    found = mapping(value)
    runs = found.get("runs")
    usable = (
        isinstance(runs, Sequence)
        and runs
        and all(
            isinstance(run, Mapping)
            and isinstance(run.get("policy"), str)
            and number(run, "load") is not None
            for run in runs
        )
    )
    return found if usable else {}


def checked_runs(value: Any, source: str) -> Sequence[Run]:
    """A list of runs; none if there is no list. Raises ConfigError for a run that cannot be one."""
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


def mapping(value: Any) -> Mapping[str, Any]:
    """The value if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def _cost(state: Any) -> CostModel | None:
    try:
        return CostModel.from_dict(state) if isinstance(state, Mapping) else None
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
