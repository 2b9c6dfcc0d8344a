"""Figures drawn by matplotlib (extra `bench`), which is imported only here: PNG files, and SVG for
the page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from smart_decoding.bench import options
from smart_decoding.errors import CapacityError, ConfigError
from smart_lab.panels import NEUTRAL, Figure, Panel, Series

EXTRA = "in the clone, pip install -e '.[bench]'"  # how to get matplotlib
COLOURS = ("#2a78d6", "#d9541e", "#128a5e", "#b07800", "#c2478a", "#5a48c8", "#6b7d1e", "#a03a3a")
MUTED = "#777775"
BELOW = "#c0392b"  # where speculation costs time
MARKERS = "osD^"
DASHES = (0, (4, 4))
INK = "#010203"  # stands for the page's own colour of text, light or dark
_PAGE_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "smart",  # the same picture is the same file
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    ),
}


_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def check_outputs(files: Sequence[Path | None], plots: Path | None) -> None:
    """Raises ConfigError if a file, or the folder `plots`, cannot be written, or if matplotlib is
    missing for it."""
    options.check_outputs(files)
    if plots is None:
        return
    if not plots.parent.is_dir() or (plots.exists() and not plots.is_dir()):
        raise ConfigError(f"{plots} cannot be made: it must be a folder in an existing folder")
    if not can_draw():
        raise ConfigError(f"plots need matplotlib: {EXTRA}")


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


def inline_svgs(figure: Figure) -> list[str]:
    """The figure's panels as SVG elements for a page, each by itself, so that they can stand in
    turn on a phone."""
    import matplotlib

    drawings = []
    with matplotlib.rc_context(_PAGE_STYLE):
        for number, panel in enumerate(figure.panels):
            canvas = _canvas(_size(panel, len(figure.panels)))
            _axes(canvas.add_subplot(), panel, legend=number == 0 or figure.apart)
            file = io.StringIO()
            canvas.savefig(file, format="svg", transparent=True, metadata=_NO_METADATA)
            name = f"{panel.title} {panel.y_label} against {panel.x_label}".strip()
            drawings.append(_for_page(file.getvalue(), f"{figure.key}-{number}-", name))
    return drawings


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


def _for_page(svg: str, prefix: str, name: str) -> str:
    """The SVG element alone, without namespaces and fixed sizes, its ids made unique on the
    page."""
    svg = svg[svg.index("<svg") :].strip()
    head, body = svg.split(">", 1)
    (box,) = re.findall(r'viewBox="[^"]*"', head)
    body = re.sub(r'\bid="', f'id="{prefix}', body)
    body = re.sub(r"url\(#", f"url(#{prefix}", body)
    body = re.sub(r'xlink:href="#', f'href="#{prefix}', body)
    label = name.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return f'<svg {box} role="img" aria-label="{label}">{body.replace(INK, "currentColor")}'


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
