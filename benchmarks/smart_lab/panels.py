"""Figures as plain data, which `plots` draws."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from smart_decoding.bench.results import Results, Run

NEUTRAL = -1  # the colour of what is no policy
AGAIN = "measure again with this version of bench to have it"


@dataclass(frozen=True, slots=True)
class Point:
    """y_range: its interval; x_range: where x mostly lies; weight: relative area of the marker;
    label: printed at the marker."""

    x: float
    y: float
    y_range: tuple[float, float] | None = None
    x_range: tuple[float, float] | None = None
    weight: float = 1.0
    label: str = ""


@dataclass(frozen=True, slots=True)
class Series:
    """colour: number of the policy, or NEUTRAL."""

    name: str
    colour: int
    points: Sequence[Point]
    line: bool = True
    markers: bool = True


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes. x_ticks: where they are not to be found by itself; x_log: to base 2. level:
    a horizontal line, with its name; diagonal: the line y = x."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    x_ticks: Sequence[float] = ()
    x_log: bool = False
    from_zero: bool = False
    level: tuple[float, str] | None = None
    diagonal: bool = False


@dataclass(frozen=True, slots=True)
class Figure:
    """caption: how to read it. missing: why there are no panels. apart: each panel has series of
    its own."""

    key: str
    title: str
    caption: str
    panels: Sequence[Panel] = ()
    missing: str = ""
    apart: bool = False


def lines(results: Results, points_of: dict[str, list[Point]]) -> list[Series]:
    """One line for each policy that has points, in the policy's colour."""
    found = enumerate(results.names.items())
    return [
        Series(name, colour, points_of[policy])
        for colour, (policy, name) in found
        if points_of.get(policy)
    ]


def runs_of(results: Results, policy: str) -> list[Run]:
    """A policy's runs over all tasks, by batch size."""
    runs: Iterable[Run] = (run for run in results.contestants if run["policy"] == policy)
    return sorted(runs, key=lambda run: run["batch_size"])
