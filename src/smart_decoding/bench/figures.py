"""The figures of a report as plain data, which `plots` draws: what is shown is decided here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from smart_decoding.bench.options import BASELINE
from smart_decoding.bench.reliability import Floats
from smart_decoding.bench.report import Run
from smart_decoding.bench.results import Results, histogram, interval, number
from smart_decoding.core.cost import CostModel

NEUTRAL = -1  # the colour of what is no policy
# rows per request beyond which a policy would push all others to the left of the cost figure
FAR = 24
DEFAULT_CONTEXT = 128.0  # tokens, for results that do not say theirs
_UNDER_LOAD = (
    ("time per token, median", "tpot_ms", "p50"),
    ("time per token, p95", "tpot_ms", "p95"),
    ("time to first token, p95", "ttft_ms", "p95"),
)
AGAIN = "measure again with this version of smart bench to have it"


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
    found = (
        [speedup(results), cost(results), tokens(results), reliability(results)]
        if results.runs
        else []
    )
    return [*found, *([under_load(results)] if results.load else [])]


def speedup(results: Results) -> Figure:
    """Speedup against batch size, one line per policy."""
    title = "Speedup against batch size"
    series = []
    for colour, (policy, name) in enumerate(results.names.items()):
        points = [
            _speedup_point(run)
            for run in _runs_of(results, policy)
            if number(run, "speedup") is not None
        ]
        if points:
            series.append(Series(name, colour, points))
    if not series:
        return Figure("speedup", title, "", missing="No policy but plain decoding was measured.")
    caption = (
        "Throughput while decoding, divided by that of plain decoding in the same run; bands are 95 % intervals over "
        "paired blocks. Below the line at 1× speculation costs time."
    )
    sizes = [float(size) for size in results.batch_sizes]
    panel = Panel(
        "",
        "batch size",
        "speedup",
        series,
        sizes,
        True,
        level=(1.0, "1×, plain decoding: below it is slower"),
    )
    return Figure("speedup", title, caption, [panel])


def cost(results: Results) -> Figure:
    """The profile's verification seconds over rows, and where each policy's rounds really were."""
    title = "What a round costs, and the rows that policies chose"
    if results.cost is None:
        return Figure(
            "cost",
            title,
            "",
            missing=f"These results hold no cost curve: {AGAIN}, with a policy such as smart.",
        )
    panels = [
        panel
        for size in results.batch_sizes
        if (panel := _cost_panel(results, results.cost, size)) is not None
    ]
    caption = (
        "Grey: the measured profile, milliseconds of one verifying forward over its rows (one per request, and every "
        "verified draft token). Markers: each policy's mean rows and its measured mean time; the bar covers the middle "
        "80 % of its rounds. A marker off the curve means that the machine was faster or slower than when profiled. "
        f"Trees of more than {FAR} rows per request would lie far to the right."
    )
    if not panels:
        return Figure(
            "cost",
            title,
            "",
            missing=f"These results do not say how many rows a round had: {AGAIN}.",
        )
    return Figure("cost", title, caption, panels)


def tokens(results: Results) -> Figure:
    """Tokens of a request per round against rows of the batch, one line per policy over batch
    sizes."""
    title = "Tokens per round against rows"
    series = []
    for colour, (policy, name) in enumerate(results.names.items()):
        points = []
        for run in _runs_of(results, policy):
            x, y = number(run, "rows_per_round"), number(run, "tokens_per_round")
            if x is not None and y is not None and x > 0:
                points.append(Point(x, y, label=str(run["batch_size"])))
        if points:
            series.append(Series(name, colour, points))
    if not series:
        return Figure(
            "tokens",
            title,
            "",
            missing=f"These results do not say how many rows a round had: {AGAIN}.",
        )
    caption = (
        "One marker per batch size, which is printed at it. Up is more tokens for each request in a round; right is "
        "more rows to verify for the whole batch. Plain decoding makes one token a round."
    )
    panel = Panel(
        "",
        "rows of the batch per round",
        "tokens per round of a request",
        series,
        (),
        True,
        level=(1.0, "plain decoding"),
    )
    return Figure("tokens", title, caption, [panel])


def reliability(results: Results) -> Figure:
    """Predicted against observed acceptance, before and after calibration, one panel per policy
    that calibrates."""
    title = "Do the probabilities come true?"
    panels = []
    for colour, (policy, name) in enumerate(results.names.items()):
        parts = {
            part: _pooled_bins(_runs_of(results, policy), part) for part in ("draft", "calibrated")
        }
        if len(parts["calibrated"][0]):
            before, after = (calibration_error(parts[part]) for part in ("draft", "calibrated"))
            series = [
                Series(
                    f"before: the drafter's confidence, off by {100 * before:.1f} %",
                    NEUTRAL,
                    _bins(parts["draft"]),
                ),
                Series(
                    f"after calibration, off by {100 * after:.1f} %",
                    colour,
                    _bins(parts["calibrated"]),
                ),
            ]
            panels.append(
                Panel(
                    name,
                    "predicted",
                    "chosen by the target",
                    series,
                    (0, 0.2, 0.4, 0.6, 0.8, 1),
                    from_zero=True,
                    diagonal=True,
                )
            )
    if not panels:
        return Figure(
            "reliability",
            title,
            "",
            missing=f"These results hold no acceptance probabilities: {AGAIN}.",
        )
    caption = (
        "Drafted tokens in ten bins of the probability that was predicted for them, against the share that the target "
        "chose, over all batch sizes; on the diagonal predictions are right. Larger markers hold more tokens; 'off by' "
        "is the mean distance from the diagonal, over tokens. Only tokens whose predecessors were accepted are tested."
    )
    return Figure("reliability", title, caption, panels, apart=True)


def under_load(results: Results) -> Figure:
    """Latency percentiles against load, one line per policy."""
    runs = results.load["runs"]
    names = {run["policy"]: results.names.get(run["policy"], run["policy"]) for run in runs}
    order = list(
        dict.fromkeys([*results.names, *(policy for policy in names if policy != BASELINE)])
    )
    panels = []
    for title, kind, percentile in _UNDER_LOAD:
        series = []
        for policy, name in names.items():
            colour = NEUTRAL if policy == BASELINE else order.index(policy)
            points = [_load_point(run, kind, percentile) for run in runs if run["policy"] == policy]
            series.append(
                Series(
                    "plain decoding" if policy == BASELINE else name,
                    colour,
                    [p for p in points if p],
                )
            )
        if any(one.points for one in series):
            loads = sorted({100 * float(run["load"]) for run in runs})
            panels.append(
                Panel(
                    title,
                    "load, % of capacity",
                    "ms",
                    [s for s in series if s.points],
                    loads,
                    from_zero=True,
                )
            )
    title = "Under load"
    if not panels:
        return Figure("load", title, "", missing=f"These results hold no latencies: {AGAIN}.")
    caption = (
        "Requests arrive at random at shares of what plain decoding can answer; every policy gets the same ones at the "
        "same times. Latencies count from arrival."
    )
    return Figure("load", title, caption, panels)


def _load_point(run: Run, kind: str, percentile: str) -> Point | None:
    times = run.get(kind)
    value = number(times, percentile) if isinstance(times, Mapping) else None
    at = 100 * float(run["load"])
    return None if value is None else Point(at, value)


def calibration_error(bins: tuple[Floats, Floats, Floats]) -> float:
    """Mean |predicted - chosen| over tokens."""
    predicted, chosen, count = bins
    return (
        float(np.sum(count * np.abs(predicted - chosen)) / np.sum(count)) if np.sum(count) else 0.0
    )


def _speedup_point(run: Run) -> Point:
    return Point(run["batch_size"], float(run["speedup"]), interval(run))


def _cost_panel(results: Results, cost: CostModel, size: int) -> Panel | None:
    series, used, contexts = [], [float(size)], []
    for colour, policy in ((NEUTRAL, BASELINE), *enumerate(results.names)):
        run = results.find(policy, size)
        rows = number(run, "rows_per_round") if run is not None else None
        if run is None or rows is None or rows > FAR * size:
            continue
        context = number(run, "context_tokens") or DEFAULT_CONTEXT
        expected = 1e3 * float(cost.verify_seconds(size, np.array([round(rows)]), context)[0])
        measured = number(run, "verify_ms")
        name = results.names.get(policy, "plain decoding")
        y = measured if measured is not None else expected
        spread = _spread(histogram(run, "row_counts"))
        series.append(Series(name, colour, [Point(rows, y, x_range=spread)], line=False))
        used += [rows, *(spread or ())]
        contexts.append(context)
    if not series:
        return None
    last = int(max(1.15 * max(used), size + 4))
    context = sum(contexts) / len(contexts)
    curve = 1e3 * cost.verify_curve(size, size, last - size + 1, context)
    points = [Point(size + i, float(ms)) for i, ms in enumerate(curve)]
    profile = Series("profile", NEUTRAL, points, markers=False)
    return Panel(
        f"batch {size}, context {context:.0f}", "rows", "ms", [profile, *series], from_zero=True
    )


def _spread(
    counts: Mapping[int, float], low: float = 0.1, high: float = 0.9
) -> tuple[float, float] | None:
    """The rows between which the middle 80 % of rounds lie."""
    if not counts:
        return None
    rows = sorted(counts)
    total = np.cumsum([counts[r] for r in rows])
    first, last = np.searchsorted(total, [low * total[-1], high * total[-1]])
    return float(rows[first]), float(rows[last])


def _runs_of(results: Results, policy: str) -> list[Run]:
    return sorted(
        (r for r in results.contestants if r["policy"] == policy), key=lambda run: run["batch_size"]
    )


def _pooled_bins(runs: Iterable[Run], part: str) -> tuple[Floats, Floats, Floats]:
    """(predicted, chosen, count) of a part, by tenths of the prediction, over runs."""
    sums = np.zeros((3, 11))
    for run in runs:
        bins: Any = run.get("reliability")
        try:
            predicted, chosen, count = (
                np.asarray(bins[part][k], float) for k in ("predicted", "chosen", "count")
            )
            which = np.clip((predicted * 10).astype(int), 0, 10)
            for row, values in enumerate((count, count * predicted, count * chosen)):
                np.add.at(sums[row], which, values)
        except (KeyError, TypeError, ValueError, IndexError):
            continue
    count, predicted, chosen = sums[:, sums[0] > 0]
    return predicted / count, chosen / count, count


def _bins(bins: tuple[Floats, Floats, Floats]) -> list[Point]:
    predicted, chosen, count = bins
    share = count / count.max() if len(count) else count
    return [
        Point(float(x), float(y), weight=float(w))
        for x, y, w in zip(predicted, chosen, share, strict=True)
    ]
