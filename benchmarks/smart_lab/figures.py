"""The figures of a report as plain data: what is shown is decided here.

Needed by `report`, which draws docs/images/speedup-zen4.png.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from smart_decoding.bench.results import Results, interval
from smart_decoding.bench.sections import number
from smart_lab.plots import Figure, Panel, Point, lines, runs_of
from smart_lab.round_figures import round_figures

if TYPE_CHECKING:
    from smart_lab.results import LabResults


def figures(results: LabResults) -> list[Figure]:
    """All figures, those without data too."""
    return [
        *([speedup(results)] if results.runs else []),
        *round_figures(results),
    ]


def speedup(results: Results) -> Figure:
    """Speedup against batch size, one line per policy."""
    title = "Speedup against batch size"
    points = {
        policy: [
            Point(run["batch_size"], value, interval(run))
            for run in runs_of(results, policy)
            if (value := number(run, "speedup")) is not None
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
