"""The report's figures as PNG files, drawn by matplotlib (extra `bench`), which is imported only here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from smart_decoding.bench.figures import NEUTRAL, Figure, Panel, Series, figures
from smart_decoding.bench.results import Results
from smart_decoding.bench.style import LIGHT, MUTED
from smart_decoding.bench.svg import ticks
from smart_decoding.errors import CapacityError, ConfigError

MARKERS = "osD^"


def write_plots(results: Results, folder: Path) -> list[Path]:
    """One PNG for each figure that has data, in `folder`, made if need be; returns their paths.

    Raises ConfigError without matplotlib, CapacityError if a file cannot be written."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ConfigError("plots need matplotlib: in the clone, pip install -e '.[bench]'") from error
    paths = []
    try:
        folder.mkdir(exist_ok=True)
        for figure in figures(results):
            if figure.panels:
                path = folder / f"{figure.key}.png"
                drawn(figure).savefig(path, dpi=150)
                paths.append(path)
    except OSError as error:
        raise CapacityError(f"plots could not be written to {folder}: {error.strerror}") from error
    return paths


def drawn(figure: Figure) -> Any:
    """The figure on a canvas of matplotlib's."""
    from matplotlib.figure import Figure as Canvas

    columns = len(figure.panels) if len(figure.panels) <= 3 else 2
    lines = math.ceil(len(figure.panels) / columns)
    size = (8.0, 5.0) if columns == 1 and not figure.panels[0].diagonal else (5.0 * columns, 4.2 * lines)
    canvas = Canvas(figsize=size, layout="constrained")
    canvas.suptitle(figure.title, fontsize=13)
    for i, panel in enumerate(figure.panels):
        _axes(canvas.add_subplot(lines, columns, i + 1), panel, legend=i == 0 or figure.apart)
    return canvas


def _axes(axes: Any, panel: Panel, legend: bool) -> None:
    for series in panel.series:
        _series(axes, series)
    x_ticks, _ = ticks(panel)
    if panel.x_log:
        axes.set_xscale("log", base=2)
    axes.set_xticks(x_ticks, [f"{value:g}" for value in x_ticks])
    if panel.diagonal:
        axes.plot([0, 1], [0, 1], color="black", linestyle=(0, (4, 4)), linewidth=1)
    if panel.from_zero:
        axes.set_ylim(bottom=0)
    if panel.level is not None:
        value, name = panel.level
        axes.axhline(value, color="black", linestyle=(0, (4, 4)), linewidth=1, label=name)
        low, high = axes.get_ylim()
        axes.axhspan(min(low, value), value, color="#c0392b", alpha=0.06, linewidth=0)
        axes.set_ylim(low, high)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.set_title(panel.title, fontsize=10)
    axes.grid(axis="y", color="#e4e4df")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(fontsize=8, frameon=False)


def _series(axes: Any, series: Series) -> None:
    colour = MUTED if series.colour == NEUTRAL else LIGHT[series.colour % len(LIGHT)]
    x, y = [p.x for p in series.points], [p.y for p in series.points]
    if series.line:
        axes.plot(x, y, color=colour, linewidth=2, linestyle="--" if series.colour >= len(LIGHT) else "-",
                  label=None if series.markers else series.name)  # fmt: skip
    if series.markers:
        area = [20 + 40 * p.weight for p in series.points]
        shape = MARKERS[max(series.colour, 0) % len(MARKERS)]
        axes.scatter(x, y, s=area, color=colour, marker=shape, edgecolor="white", zorder=3, label=series.name)
    for p in series.points:
        if p.label:
            axes.annotate(p.label, (p.x, p.y), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8)
        if p.x_range is not None:
            axes.hlines(p.y, *p.x_range, color=colour, alpha=0.6, linewidth=2)
    bands = [(p.x, *p.y_range) if p.y_range else (p.x, math.nan, math.nan) for p in series.points]
    if series.line and series.markers and bands:
        at, low, high = zip(*bands, strict=True)
        axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
