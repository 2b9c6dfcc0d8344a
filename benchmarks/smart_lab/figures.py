"""The figures of rounds and of replay, as data, after those of `smart bench`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from smart_decoding.bench import figures as measured
from smart_decoding.bench.figures import NEUTRAL, Figure, Panel, Point, Series
from smart_decoding.bench.sections import number
from smart_lab.round_figures import round_figures

if TYPE_CHECKING:
    from smart_lab.results import LabResults


def figures(results: LabResults) -> list[Figure]:
    """All figures, those without data too."""
    return [*measured.figures(results), *further_figures(results)]


def further_figures(results: LabResults) -> list[Figure]:
    """Those that `smart bench` does not have."""
    replayed = results.replayed
    found = round_figures(results)
    return [*found, *([oracle(replayed), ablations(replayed)] if replayed else [])]


def oracle(replayed: Mapping[str, Any]) -> Figure:
    """Policies by replay against the best that knowing acceptance would give."""
    shown = ("smart", "best fixed", "paper", "eagle2, EAGLE-2's size", "oracle, a plan")
    steps = (
        "smart",
        "+ calibration fitted to these answers",
        "+ deeper levels foreseen",
        "oracle, a plan",
    )
    caption = (
        "By replay of recorded drafts of other prompts, not live. 'Best fixed' is chosen "
        "afterwards, for each batch size, on the very answers that it is judged by. Oracle knows "
        "which drafts come true: a plan that exists."
    )
    panels = [
        _replayed_panel("policies", replayed, "gap", shown),
        _replayed_panel("what smart lacks", replayed, "gap", steps),
    ]
    return Figure("replay-gap", "How far from oracle?", caption, panels, apart=True)


def ablations(replayed: Mapping[str, Any]) -> Figure:
    """`smart` with one ingredient exchanged."""
    rule = (
        "smart",
        "stop rule: look back",
        "stop rule: always 2 levels",
        "stop rule: always 8 levels",
        "greedy rule",
    )
    costs = (
        "smart",
        "a wrong profile, corrected",
        "a wrong profile, no correction",
        "no calibration",
        "even budget",
    )
    caption = (
        "By replay of recorded drafts of other prompts, not live: smart, and smart with one "
        "decision taken in another way. Lines that lie on one another are ingredients that make no "
        "difference here."
    )
    panels = [
        _replayed_panel("when to stop, what to keep", replayed, "ablations", rule),
        _replayed_panel("costs, calibration, budget", replayed, "ablations", costs),
    ]
    return Figure(
        "replay-ablations", "What does each ingredient give?", caption, panels, apart=True
    )


def _replayed_panel(
    title: str, replayed: Mapping[str, Any], part: str, names: Iterable[str]
) -> Panel:
    sizes = sorted(map(int, replayed))
    series = []
    for colour, name in enumerate(names):
        values = [(size, number(replayed[str(size)][part], name)) for size in sizes]
        points = [Point(size, y) for size, y in values if y is not None]
        if points:
            series.append(Series(name, NEUTRAL if "oracle" in name else colour, points))
    return Panel(
        title,
        "batch size",
        "speedup, by replay",
        series,
        [float(size) for size in sizes],
        True,
        level=(1.0, "1×"),
    )
