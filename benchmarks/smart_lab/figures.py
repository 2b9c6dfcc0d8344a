"""The figures of a report as plain data: what is shown is decided here.

Needed by `report`, which draws docs/images/speedup-zen4.png and load.png.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from smart_decoding.bench.options import BASELINE
from smart_decoding.bench.report import PLAIN
from smart_decoding.bench.results import Results, headline, interval, mapping
from smart_decoding.bench.sections import number
from smart_lab.plots import AGAIN, NEUTRAL, Figure, Panel, Point, Series, lines, runs_of
from smart_lab.round_figures import round_figures

if TYPE_CHECKING:
    from smart_lab.results import LabResults

_UNDER_LOAD = (
    ("time per token, median", "tpot_ms", "p50"),
    ("time per token, p95", "tpot_ms", "p95"),
    ("time to first token, p95", "ttft_ms", "p95"),
)


def figures(results: LabResults) -> list[Figure]:
    """All figures, those without data too."""
    return [
        *([speedup(results)] if results.runs else []),
        *([under_load(results)] if results.load else []),
        *round_figures(results),
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
        return Figure("speedup", title, missing="No policy but plain decoding was measured.")
    sizes = [float(size) for size in results.batch_sizes]
    level = (1.0, "1×, plain decoding: below it is slower")
    panel = Panel("", "batch size", "speedup", series, sizes, True, level=level)
    return Figure("speedup", title, [panel])


def under_load(results: Results) -> Figure:
    """Latency percentiles against load, one line per policy."""
    title = "Under load"
    panels = [_load_panel(results, *which) for which in _UNDER_LOAD]
    panels = [panel for panel in panels if panel.series]
    if not panels:
        return Figure("load", title, missing=f"These results hold no latencies: {AGAIN}.")
    return Figure("load", title, panels)


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
