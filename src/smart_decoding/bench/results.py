"""What a run of `smart bench` found, to be read and shown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from smart_decoding.bench.options import BASELINE, OURS
from smart_decoding.bench.sections import number
from smart_decoding.bench.summary import POOLED

Run = Mapping[str, Any]
LONG = 20  # characters of a contestant's label


@dataclass(frozen=True)
class Results:
    """runs: as in the JSON. names: policy -> short name.

    copies: runs of contestants that verified the same trees as another one, which stands for
    them."""

    provenance: Mapping[str, Any]
    runs: Sequence[Run]
    copies: Sequence[Run] = ()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Of what a run returned."""
        return cls(
            provenance=mapping(data.get("provenance")),
            runs=originals(data["runs"]),
            copies=[run for run in data["runs"] if "copy_of" in run],
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
    def policies(self) -> list[str]:
        """All but the baseline; `smart` first, so that it always has the same colour."""
        found = dict.fromkeys(run["policy"] for run in self.contestants)
        return sorted(found, key=lambda policy: policy != OURS)

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


def mapping(value: Any) -> Mapping[str, Any]:
    """The value if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def short_names(policies: Iterable[str]) -> dict[str, str]:
    """Policy -> short name: of one with long options, the values of those that differ between its
    settings ('eagle2 7/10/60'); numbered where even that is long, or the same for two."""
    labels = list(dict.fromkeys(policies))
    long = [label for label in labels if len(label) > LONG]
    names = {label: _values(label, long) if label in long else label for label in labels}
    for label in long:
        if len(names[label]) > LONG or list(names.values()).count(names[label]) > 1:
            names[label] = f"{policy_of(label)}#{long.index(label) + 1}"
    return names


def policy_of(label: str) -> str:
    """The policy's own name in 'eagle2(depth=7)' or 'eagle2 tuned 1'."""
    return label.split("(")[0].split(" ")[0]


def _values(label: str, labels: Sequence[str]) -> str:
    """A policy and the values of its options, of those only that its other settings in `labels`
    have otherwise."""
    policy = policy_of(label)
    options = [_options(other) for other in labels if policy_of(other) == policy]
    mine = _options(label)
    if any(list(other) != list(mine) for other in options):
        return f"{policy} {','.join(f'{name}={value}' for name, value in mine.items())}"
    differing = [
        name for name in mine if len(options) == 1 or len({other[name] for other in options}) > 1
    ]
    return f"{policy} {'/'.join(mine[name] for name in differing)}"


def _options(label: str) -> dict[str, str]:
    """'eagle2(depth=7,top_k=10)' as {'depth': '7', 'top_k': '10'}."""
    inside = label.partition("(")[2].removesuffix(")")
    pairs = (item.partition("=") for item in inside.split(","))
    return {name: value for name, _, value in pairs if name}
