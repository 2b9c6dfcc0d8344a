"""What rounds cost and gave, as figures: rows against time, tokens against rows, and whether
probabilities came true.

Needed by `report`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from smart_decoding.bench.options import BASELINE
from smart_decoding.bench.reliability import BINS, Floats
from smart_decoding.bench.results import Results, Run, mapping
from smart_decoding.bench.sections import number
from smart_lab.plots import (
    AGAIN,
    NEUTRAL,
    Figure,
    Panel,
    Point,
    Series,
    lines,
    runs_of,
)

if TYPE_CHECKING:
    from smart_decoding.core.cost import CostModel
    from smart_lab.results import LabResults

# rows per request beyond which a policy would push all others to the left of the cost figure
FAR = 24
PLAIN = "plain decoding"
DEFAULT_CONTEXT = 128.0  # tokens, for results that do not say theirs
NO_ROWS = f"These results do not say how many rows a round had: {AGAIN}."
Bins = tuple[Floats, Floats, Floats]  # predicted, chosen, count


def round_figures(results: LabResults) -> list[Figure]:
    """All three, those without data too."""
    return [cost(results), tokens(results), reliability(results)] if results.runs else []


def cost(results: LabResults) -> Figure:
    """The profile's verification seconds over rows, and where each policy's rounds really were."""
    title = "What a round costs, and the rows that policies chose"
    profile = results.cost
    if profile is None:
        told = f"These results hold no cost curve: {AGAIN}, with a policy such as smart."
        return Figure("cost", title, missing=told)
    panels = [_cost_panel(results, profile, size) for size in results.batch_sizes]
    drawn = [panel for panel in panels if panel is not None]
    if not drawn:
        return Figure("cost", title, missing=NO_ROWS)
    return Figure("cost", title, drawn)


def tokens(results: Results) -> Figure:
    """Tokens of a request per round against rows of the batch, one line per policy over batch
    sizes."""
    title = "Tokens per round against rows"
    points: dict[str, list[Point]] = {policy: [] for policy in results.names}
    for policy, found in points.items():
        for run in runs_of(results, policy):
            rows = number(run, "rows_per_round")
            gained = number(run, "tokens_per_round")
            if rows is not None and gained is not None and rows > 0:
                found.append(Point(rows, gained, label=str(run["batch_size"])))
    series = lines(results, points)
    if not series:
        return Figure("tokens", title, missing=NO_ROWS)
    x_label = "rows of the batch per round"
    y_label = "tokens per round of a request"
    panel = Panel("", x_label, y_label, series, (), True, level=(1.0, PLAIN))
    return Figure("tokens", title, [panel])


def reliability(results: Results) -> Figure:
    """Predicted against observed acceptance, before and after calibration, one panel per policy
    that calibrates."""
    title = "Do the probabilities come true?"
    panels = []
    for colour, (policy, name) in enumerate(results.names.items()):
        runs = runs_of(results, policy)
        before = _pooled_bins(runs, "draft")
        after = _pooled_bins(runs, "calibrated")
        if len(after[0]):
            panels.append(_reliability_panel(name, colour, before, after))
    if not panels:
        told = f"These results hold no acceptance probabilities: {AGAIN}."
        return Figure("reliability", title, missing=told)
    return Figure("reliability", title, panels, apart=True)


def _reliability_panel(name: str, colour: int, before: Bins, after: Bins) -> Panel:
    drafter = f"before: the drafter's confidence, off by {_error(before)}"
    series = [
        Series(drafter, NEUTRAL, _points(before)),
        Series(f"after calibration, off by {_error(after)}", colour, _points(after)),
    ]
    return Panel(
        name,
        "predicted",
        "chosen by the target",
        series,
        (0, 0.2, 0.4, 0.6, 0.8, 1),
        from_zero=True,
        diagonal=True,
    )


def _error(bins: Bins) -> str:
    """Mean |predicted - chosen| over tokens."""
    predicted, chosen, count = bins
    if not np.sum(count):
        return "0.0 %"
    return f"{100 * np.sum(count * np.abs(predicted - chosen)) / np.sum(count):.1f} %"


def _cost_panel(results: Results, profile: CostModel, size: int) -> Panel | None:
    series, used, contexts = [], [float(size)], []
    for colour, policy in ((NEUTRAL, BASELINE), *enumerate(results.names)):
        run = results.find(policy, size)
        rows = number(run, "rows_per_round") if run is not None else None
        if run is None or rows is None or rows > FAR * size:
            continue
        context = number(run, "context_tokens") or DEFAULT_CONTEXT
        ms = number(run, "verify_ms")
        if ms is None:
            ms = 1e3 * float(profile.verify_seconds(size, np.array([round(rows)]), context)[0])
        spread = _spread(_histogram(run, "row_counts"))
        name = results.names.get(policy, PLAIN)
        series.append(Series(name, colour, [Point(rows, ms, x_range=spread)], line=False))
        used += [rows, *(spread or ())]
        contexts.append(context)
    if not series:
        return None
    last = int(max(1.15 * max(used), size + 4))
    context = sum(contexts) / len(contexts)
    curve = 1e3 * profile.verify_curve(size, size, last - size + 1, context)
    points = [Point(size + i, float(ms)) for i, ms in enumerate(curve)]
    shown = [Series("profile", NEUTRAL, points, markers=False), *series]
    return Panel(f"batch {size}, context {context:.0f}", "rows", "ms", shown, from_zero=True)


def _histogram(run: Run, name: str) -> dict[int, float]:
    """{count: rounds} of a run's distribution; empty where there is none."""
    table = mapping(run.get(name))
    try:
        return {int(key): float(value) for key, value in table.items() if float(value) > 0}
    except (TypeError, ValueError):
        return {}


def _spread(counts: Mapping[int, float]) -> tuple[float, float] | None:
    """The rows between which the middle 80 % of rounds lie."""
    if not counts:
        return None
    rows = sorted(counts)
    total = np.cumsum([counts[r] for r in rows])
    first, last = np.searchsorted(total, [0.1 * total[-1], 0.9 * total[-1]])
    return float(rows[first]), float(rows[last])


def _pooled_bins(runs: Iterable[Run], part: str) -> Bins:
    """(predicted, chosen, count) of a part, by tenths of the prediction, over runs."""
    sums = np.zeros((3, BINS + 1))
    for run in runs:
        bins: Any = run.get("reliability")
        try:
            predicted, chosen, count = (
                np.asarray(bins[part][k], float) for k in ("predicted", "chosen", "count")
            )
            which = np.clip((predicted * BINS).astype(int), 0, BINS)
            for row, values in enumerate((count, count * predicted, count * chosen)):
                np.add.at(sums[row], which, values)
        except (KeyError, TypeError, ValueError, IndexError):
            continue
    count, predicted, chosen = sums[:, sums[0] > 0]
    return predicted / count, chosen / count, count


def _points(bins: Bins) -> list[Point]:
    predicted, chosen, count = bins
    share = count / count.max() if len(count) else count
    return [
        Point(float(x), float(y), weight=float(w))
        for x, y, w in zip(predicted, chosen, share, strict=True)
    ]
