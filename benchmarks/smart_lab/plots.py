"""Figures as plain data, and how matplotlib (extra `bench`), imported only here, draws them.

Needed by `report`, which made docs/images/speedup-zen4.png.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smart_decoding.errors import CapacityError, ConfigError

if TYPE_CHECKING:
    from smart_decoding.bench.results import Results, Run

NEUTRAL = -1  # the colour of what is no policy
AGAIN = "measure again with this version of bench to have it"
EXTRA = "in the clone, pip install -e '.[bench]'"  # how to get matplotlib
COLOURS = ("#2a78d6", "#d9541e", "#128a5e", "#b07800", "#c2478a", "#5a48c8", "#6b7d1e", "#a03a3a")
MUTED = "#777775"
BELOW = "#c0392b"  # where speculation costs time
MARKERS = "osD^"
DASHES = (0, (4, 4))


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
    """missing: why there are no panels. apart: each panel has series of its own."""

    key: str
    title: str
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


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def write_plots(figures: Sequence[Figure], folder: Path) -> list[Path]:
    """One PNG for each figure that has data, in `folder`, made if need be; returns their paths.

    Raises ConfigError without matplotlib, CapacityError if a file cannot be written."""
    if not can_draw():
        raise ConfigError(f"plots need matplotlib: {EXTRA}")
    paths = []
    try:
        folder.mkdir(exist_ok=True)
        for figure in figures:
            if figure.panels:
                path = folder / f"{figure.key}.png"
                drawn(figure).savefig(path, dpi=150)
                paths.append(path)
    except OSError as error:
        raise CapacityError(f"plots could not be written to {folder}: {error.strerror}") from error
    return paths


def drawn(figure: Figure) -> Any:
    """The figure with all its panels, as a figure of matplotlib's."""
    columns = len(figure.panels) if len(figure.panels) <= 3 else 2
    lines = math.ceil(len(figure.panels) / columns)
    width, height = _size(figure.panels[0], len(figure.panels))
    canvas = _canvas((width * columns, height * lines))
    canvas.suptitle(figure.title, fontsize=13)
    for i, panel in enumerate(figure.panels):
        _axes(canvas.add_subplot(lines, columns, i + 1), panel, legend=i == 0 or figure.apart)
    return canvas


def _canvas(size: tuple[float, float]) -> Any:
    from matplotlib.figure import Figure as Canvas

    return Canvas(figsize=size, layout="constrained")


def _size(panel: Panel, count: int) -> tuple[float, float]:
    """Inches of one panel among `count`."""
    return (8.0, 5.0) if count == 1 and not panel.diagonal else (5.0, 4.2)


def _axes(axes: Any, panel: Panel, legend: bool) -> None:
    for series in panel.series:
        _series(axes, series)
    _x_axis(axes, panel)
    if panel.diagonal:
        axes.plot([0, 1], [0, 1], color=MUTED, linestyle=DASHES, linewidth=1)
    if panel.from_zero:
        axes.set_ylim(bottom=0)
    if panel.level is not None:
        _level(axes, *panel.level)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.set_title(panel.title, fontsize=10)
    axes.grid(axis="y", color=MUTED, alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(fontsize=8, frameon=False)


def _x_axis(axes: Any, panel: Panel) -> None:
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, StrMethodFormatter

    if panel.x_log:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(LogLocator(2))
        axes.xaxis.set_minor_locator(NullLocator())
    if panel.x_ticks:
        axes.xaxis.set_major_locator(FixedLocator(panel.x_ticks))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _level(axes: Any, value: float, name: str) -> None:
    """A line that matters, and the side of it that is bad."""
    axes.axhline(value, color=MUTED, linestyle=DASHES, linewidth=1, label=name)
    low, high = axes.get_ylim()
    axes.axhspan(min(low, value), value, color=BELOW, alpha=0.06, linewidth=0)
    axes.set_ylim(low, high)


def _series(axes: Any, series: Series) -> None:
    colour = MUTED if series.colour == NEUTRAL else COLOURS[series.colour % len(COLOURS)]
    x = [p.x for p in series.points]
    y = [p.y for p in series.points]
    if series.line:
        style = "--" if series.colour >= len(COLOURS) else "-"
        label = None if series.markers else series.name
        axes.plot(x, y, color=colour, linewidth=2, linestyle=style, label=label)
    if series.markers:
        area = [20 + 40 * p.weight for p in series.points]
        shape = MARKERS[max(series.colour, 0) % len(MARKERS)]
        axes.scatter(
            x, y, s=area, color=colour, marker=shape, edgecolor="white", zorder=3, label=series.name
        )
    for p in series.points:
        if p.label:
            axes.annotate(
                p.label,
                (p.x, p.y),
                xytext=(0, 6),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
        if p.x_range is not None:
            axes.hlines(p.y, *p.x_range, color=colour, alpha=0.6, linewidth=2)
    bands = [(p.x, *p.y_range) if p.y_range else (p.x, math.nan, math.nan) for p in series.points]
    if series.line and series.markers and bands:
        at, low, high = zip(*bands, strict=True)
        axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
