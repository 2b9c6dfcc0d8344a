"""Speedup against batch size, drawn by matplotlib (extra `bench`), which is imported only here.

Needed by `report`, which made docs/images/rules-*.png.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smart_decoding.errors import CapacityError, ConfigError
from smart_lab.sections import number

if TYPE_CHECKING:
    from smart_lab.results import Results

EXTRA = "in the clone, pip install -e '.[bench]'"  # how to get matplotlib
COLOURS = ("#2a78d6", "#d9541e", "#128a5e", "#b07800", "#c2478a", "#5a48c8", "#6b7d1e", "#a03a3a")
MUTED = "#777775"
BELOW = "#c0392b"  # where speculation costs time
MARKERS = "osD^"
DASHES = (0, (4, 4))


def can_draw() -> bool:
    """Return whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def write_plot(results: Results, path: Path) -> None:
    """The figure as a PNG file, its folder made if need be.

    Raises ConfigError without matplotlib, CapacityError if the file cannot be written."""
    if not can_draw():
        raise ConfigError(f"plots need matplotlib: {EXTRA}")
    try:
        path.parent.mkdir(exist_ok=True)
        drawn(results).savefig(path, dpi=150)
    except OSError as error:
        raise CapacityError(f"{path} could not be written: {error.strerror}") from error


def drawn(results: Results) -> Any:
    """Return a line for each policy, with its intervals as a band, as a figure of matplotlib's."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    canvas = Figure(figsize=(8.0, 5.0), layout="constrained")
    canvas.suptitle("Speedup against batch size", fontsize=13)
    axes = canvas.add_subplot()
    for i, policy in enumerate(results.policies):
        _line(axes, results, policy, COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)])
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(results.batch_sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    label = "1×, plain decoding: below it is slower"
    axes.axhline(1.0, color=MUTED, linestyle=DASHES, linewidth=1, label=label)
    low, high = axes.get_ylim()
    axes.axhspan(min(low, 1.0), 1.0, color=BELOW, alpha=0.06, linewidth=0)
    axes.set_ylim(low, high)
    axes.set_xlabel("batch size")
    axes.set_ylabel("speedup")
    axes.grid(axis="y", color=MUTED, alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    return canvas


def _line(axes: Any, results: Results, policy: str, colour: str, marker: str) -> None:
    found = [results.find(policy, size) for size in results.batch_sizes]
    runs = [run for run in found if run is not None and number(run, "speedup") is not None]
    x = [run["batch_size"] for run in runs]
    y, low, high = (
        [number(run, name) for run in runs] for name in ("speedup", "speedup_low", "speedup_high")
    )
    axes.plot(x, y, color=colour, linewidth=2, marker=marker, label=policy)
    band = [a is not None and b is not None for a, b in zip(low, high, strict=True)]
    ends = ([value or 0.0 for value in bound] for bound in (low, high))
    axes.fill_between(x, *ends, where=band, color=colour, alpha=0.15, linewidth=0)
