"""The figures of a report as plain data: what is shown is decided here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from smart_decoding.bench.options import BASELINE
from smart_decoding.bench.report import PLAIN
from smart_decoding.bench.results import FLOOR, Results, headline, interval, mapping
from smart_decoding.bench.sections import number
from smart_lab.panels import AGAIN, NEUTRAL, Figure, Panel, Point, Series, lines, runs_of
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
    replayed = results.replayed
    return [
        *([speedup(results)] if results.runs else []),
        *([under_load(results)] if results.load else []),
        *round_figures(results),
        *([oracle(replayed), ablations(replayed)] if replayed else []),
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
