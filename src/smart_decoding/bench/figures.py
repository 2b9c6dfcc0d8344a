"""The figures of a report as plain data, which `plots` draws: what is shown is decided here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from smart_decoding.bench.floor import FLOOR
from smart_decoding.bench.options import BASELINE
from smart_decoding.bench.report import PLAIN
from smart_decoding.bench.results import Results, Run, headline, interval, mapping
from smart_decoding.bench.sections import number

NEUTRAL = -1  # the colour of what is no policy
AGAIN = "measure again with this version of smart bench to have it"
_UNDER_LOAD = (
    ("time per token, median", "tpot_ms", "p50"),
    ("time per token, p95", "tpot_ms", "p95"),
    ("time to first token, p95", "ttft_ms", "p95"),
)


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


def figures(results: Results) -> list[Figure]:
    """All figures, those without data too."""
    return [
        *([speedup(results)] if results.runs else []),
        *([under_load(results)] if results.load else []),
    ]


def lines(results: Results, points_of: dict[str, list[Point]]) -> list[Series]:
    """One line for each policy that has points, in the policy's colour."""
    found = enumerate(results.names.items())
    return [
        Series(name, colour, points_of[policy])
        for colour, (policy, name) in found
        if points_of.get(policy)
    ]


def speedup(results: Results) -> Figure:
    """Speedup against batch size, one line per policy."""
    title = "Speedup against batch size"
    points = {
        policy: [
            Point(run["batch_size"], value, interval(run, headline(run)))
            for run in runs_of(results, policy)
            if (value := number(run, headline(run))) is not None
        ]
        for policy in results.names
    }
    series = lines(results, points)
    if not series:
        return Figure("speedup", title, "", missing="No policy but plain decoding was measured.")
    caption = (
        "Throughput while decoding, divided by that of plain decoding in the same run; bands are "
        "95 % intervals over paired blocks. Below the line at 1× speculation costs time."
    )
    if any(headline(run) == FLOOR for run in results.contestants):
        caption += " Where plain decoding is slow for its GPU: over a round that reads memory once."
    sizes = [float(size) for size in results.batch_sizes]
    level = (1.0, "1×, plain decoding: below it is slower")
    panel = Panel("", "batch size", "speedup", series, sizes, True, level=level)
    return Figure("speedup", title, caption, [panel])


def under_load(results: Results) -> Figure:
    """Latency percentiles against load, one line per policy."""
    title = "Under load"
    panels = [_load_panel(results, *which) for which in _UNDER_LOAD]
    panels = [panel for panel in panels if panel.series]
    if not panels:
        return Figure("load", title, "", missing=f"These results hold no latencies: {AGAIN}.")
    caption = (
        "Requests arrive at random at shares of what plain decoding can answer; every policy gets "
        "the same ones at the same times. Latencies count from arrival."
    )
    return Figure("load", title, caption, panels)


def _load_panel(results: Results, title: str, kind: str, percentile: str) -> Panel:
    runs = results.load["runs"]
    policies = list(dict.fromkeys(run["policy"] for run in runs))
    order = list(dict.fromkeys([*results.names, *(p for p in policies if p != BASELINE)]))
    series = []
    for policy in policies:
        of_policy = [run for run in runs if run["policy"] == policy]
        points = [
            Point(100 * float(run["load"]), value)
            for run in of_policy
            if (value := number(mapping(run.get(kind)), percentile)) is not None
        ]
        if points:
            plain = policy == BASELINE
            name = PLAIN if plain else results.names.get(policy, policy)
            series.append(Series(name, NEUTRAL if plain else order.index(policy), points))
    loads = sorted({100 * float(run["load"]) for run in runs})
    return Panel(title, "load, % of capacity", "ms", series, loads, from_zero=True)


def runs_of(results: Results, policy: str) -> list[Run]:
    """A policy's runs over all tasks, by batch size."""
    runs: Iterable[Run] = (run for run in results.contestants if run["policy"] == policy)
    return sorted(runs, key=lambda run: run["batch_size"])
