"""Tables of results: aligned for a terminal of 100 columns, and in Markdown for the README."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from smart_decoding.bench.summary import POOLED

Run = Mapping[str, Any]
NAME_WIDTH = 20
_HEADER = (
    "policy",
    "b",
    "tok/s",
    "speedup (95 %)",
    "e2e",
    "worst task",
    "tok/rnd",
    "rows",
    "wasted",
    "same",
)


def everything(result: Mapping[str, Any], in_markdown: bool = False) -> str:
    """All tables of a result, each part under its name."""
    parts = [plain_torch(result.get("provenance") or {})]
    parts.append(runs_table(result.get("runs"), "", in_markdown))
    parts.append(runs_table(result.get("sampled_runs"), "at temperature {:g}\n", in_markdown))
    parts += [load_table(result["load"])] if result.get("load") else []
    return "\n\n".join(filter(None, parts))


def runs_table(runs: Sequence[Run] | None, title: str, in_markdown: bool) -> str:
    """Runs over all tasks, then task by task, under a title that may name their temperature; ''
    without runs."""
    if not runs:
        return ""
    table = markdown(runs) if in_markdown else terminal(runs)
    return f"{title.format(runs[0]['temperature'])}{table}\n\nspeedup by task\n{by_task(runs)}"


def plain_torch(provenance: Mapping[str, Any]) -> str:
    """That a CPU's figures are not those of the CPU kernels, and why; empty where they are."""
    reason = provenance.get("plain_torch")
    return f"plain torch, not the CPU kernels: {reason}" if reason else ""


def load_table(load: Mapping[str, Any]) -> str:
    """Policies under load: throughput and percentiles of latencies."""
    head = (
        "policy",
        "load",
        "req/s",
        "tok/s",
        "TTFT p50",
        "p95",
        "p99",
        "TPOT p50",
        "p95",
        "p99",
        "TPOT x",
        "same",
    )
    names = short_names(load["runs"])
    rows = [head, *(_load_cells(run, names[run["policy"]]) for run in load["runs"])]
    told = (
        f"load: Poisson arrivals at shares of {load['capacity_requests_per_s']:.2f} requests/s "
        f"({load['capacity_tokens_per_s']:.0f} tok/s), what plain decoding answers at {load['slots']} at once; ms"
    )
    return "\n".join([told, *aligned(rows)])


def _load_cells(run: Run, name: str) -> Sequence[str]:
    times = [
        shown(run[kind][p], digits)
        for kind, digits in (("ttft_ms", 0), ("tpot_ms", 1))
        for p in ("p50", "p95", "p99")
    ]
    return (
        name,
        f"{100 * run['load']:.0f} %",
        f"{run['requests_per_s']:.2f}",
        shown(run["tokens_per_s"], 0),
        *times,
        shown(run["tpot_ratio"], 2),
        "yes" if run["identical"] else "NO",
    )


def terminal(runs: Sequence[Run]) -> str:
    """The pooled runs as a table, then what a reader needs to judge it, line by line."""
    pooled = _pooled(runs)
    names = short_names(pooled)
    rows = [_cells(run, runs, names[run["policy"]]) for run in pooled]
    legend = [f"{short} = {full}" for full, short in names.items() if full != short]
    legend += [
        f"{run['policy']}, batch {run['batch_size']} = {run['setting']}"
        for run in pooled
        if run.get("setting")
    ]
    return "\n".join(
        [*aligned([_HEADER, *rows]), *legend, *over_table(runs, names), "", *notes(runs)]
    )


def over_table(runs: Sequence[Run], names: Mapping[str, str]) -> list[str]:
    """`smart` beside the strongest setting of each other policy."""
    rows = [
        (
            names[r["policy"]],
            str(r["batch_size"]),
            ratio(r, "smart_over"),
            _worst(r, runs, "smart_over"),
        )
        for r in strongest(runs)
    ]
    head = ("smart over the best", "b", "smart / it (95 %)", "worst task")
    return ["", *aligned([head, *rows])] if rows else []


def strongest(runs: Sequence[Run]) -> list[Run]:
    """The fastest setting of each other policy at each batch size, of those that were measured
    beside `smart`."""
    best: dict[tuple[int, str], Run] = {}
    for run in _pooled(runs):
        key = run["batch_size"], run["policy"].split("(")[0].split(" ")[0]
        if _known(run.get("smart_over")) and (
            key not in best or run["speedup"] > best[key]["speedup"]
        ):
            best[key] = run
    return list(best.values())


def markdown(runs: Sequence[Run]) -> str:
    """The pooled runs as a Markdown table."""
    lines = ["| " + " | ".join(_HEADER) + " |", "|---|" + "---:|" * (len(_HEADER) - 1)]
    return "\n".join(
        lines
        + ["| " + " | ".join(_cells(run, runs, run["policy"])) + " |" for run in _pooled(runs)]
    )


def by_task(runs: Sequence[Run]) -> str:
    """Speedups task by task, one line per run."""
    tasks = list(dict.fromkeys(run["task"] for run in runs if run["task"] != POOLED))
    rows: list[Sequence[str]] = [("policy", "b", *tasks)]
    names = short_names(_pooled(runs))
    for run in _pooled(runs):
        same = {r["task"]: r for r in runs if _key(r) == _key(run)}
        rows.append(
            (names[run["policy"]], str(run["batch_size"]), *(ratio(same.get(t)) for t in tasks))
        )
    return "\n".join(aligned(rows))


def notes(runs: Sequence[Run]) -> list[str]:
    """Latency, loops, noise, differences and whether the run was cut short."""
    lines, names = [], short_names(_pooled(runs))
    for run in _pooled(runs):
        name = f"{names[run['policy']]} b={run['batch_size']}"
        if run.get("noise_pairs"):
            lines.append(
                f"batch {run['batch_size']}: the baseline against itself gives {shown(run['noise'], 3)} "
                f"({shown(run['noise_low'], 3)}-{shown(run['noise_high'], 3)});\n  "
                f"{_percent(run['looping_answers'])} of its answers ended in a loop, {_percent(run['looping_tokens'])} "
                "of its tokens were cut"
            )
        else:
            vision = (
                f", {shown(run['vision_ms'], 0)} ms of it the vision tower,"
                if run.get("vision_ms")
                else ""
            )
            lines.append(
                f"{name}: TTFT {shown(run['ttft_ms'], 0)} ms{vision} "
                f"({shown(run['ttft_ratio'], 2)} x), TPOT {shown(run['tpot_ms'], 1)} ms, worst request "
                f"{shown(run['worst_tpot_ratio'], 2)} x;\n  controller {_percent(run['controller_share'])}, "
                f"{_percent(run['off_share'])} of rounds off, {shown(run['levels_per_round'], 1)} levels, "
                f"{run['rounds']} rounds, {run['blocks']} blocks"
            )
        if not run["identical"]:
            lines.append(
                f"{name}: {_percent(run['differing_prompts'])} of answers and "
                f"{_percent(run['differing_tokens'])} of tokens differ from the baseline's"
            )
    if any(run.get("partial") for run in runs):
        lines.append("PARTIAL: the time limit came before all blocks had run")
    return lines


def _cells(run: Run, runs: Sequence[Run], name: str) -> Sequence[str]:
    return (
        name,
        str(run["batch_size"]),
        shown(run["tokens_per_s"], 1),
        ratio(run),
        shown(run["end_to_end_speedup"], 2),
        _worst(run, runs),
        shown(run["tokens_per_round"], 2),
        shown(run["rows_per_round"], 1),
        shown(run["wasted_rows"], 1),
        "yes" if run["identical"] else "NO",
    )


def _worst(run: Run, runs: Sequence[Run], name: str = "speedup") -> str:
    """The task with the least ratio."""
    tasks = [
        r for r in runs if _key(r) == _key(run) and r["task"] != POOLED and _known(r.get(name))
    ]
    if not tasks or run.get("noise_pairs") is not None:
        return "-"
    worst = min(tasks, key=lambda r: r[name])
    return f"{shown(worst[name], 2)} {worst['task']}"


def _pooled(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run["task"] == POOLED]


def _key(run: Run) -> tuple[str, int]:
    return run["policy"], run["batch_size"]


def ratio(run: Run | None, name: str = "speedup") -> str:
    """1.35 (1.30-1.40)"""
    if run is None or not _known(run.get(name)):
        return "-"
    if not _known(run[f"{name}_high"]):
        return f"{run[name]:.2f} (1 block)"
    return f"{run[name]:.2f} ({shown(run[f'{name}_low'], 2)}-{shown(run[f'{name}_high'], 2)})"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns two spaces apart, the first to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return lines


def short_names(runs: Sequence[Run]) -> dict[str, str]:
    """Short names for tables and plots: of a policy with long options, the values of those that
    differ between its settings ('eagle2 7/10/60'); numbered where even that is long, or the same
    for two."""
    labels = list(dict.fromkeys(run["policy"] for run in runs))
    long = [label for label in labels if len(label) > NAME_WIDTH]
    names = {label: _values(label, long) if label in long else label for label in labels}
    for label in long:
        if len(names[label]) > NAME_WIDTH or list(names.values()).count(names[label]) > 1:
            names[label] = f"{label.split('(')[0]}#{long.index(label) + 1}"
    return names


def _values(label: str, labels: Sequence[str]) -> str:
    """A policy and the values of its options, of those only that its other settings in `labels`
    have otherwise."""
    policy = label.split("(")[0]
    options = [_options(other) for other in labels if other.split("(")[0] == policy]
    mine = _options(label)
    if any(list(other) != list(mine) for other in options):
        return f"{policy} {','.join(f'{name}={value}' for name, value in mine.items())}"
    differing = [
        name for name in mine if len(options) == 1 or len({other[name] for other in options}) > 1
    ]
    return f"{policy} {'/'.join(mine[name] for name in differing)}"


def _options(label: str) -> dict[str, str]:
    """'eagle2(depth=7,top_k=10)' as {'depth': '7', 'top_k': '10'}."""
    inside = label.partition("(")[2].removesuffix(")")
    return {
        name: value
        for name, _, value in (item.partition("=") for item in inside.split(","))
        if name
    }


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def shown(value: float | None, digits: int) -> str:
    """A number, or a dash where it is not known."""
    return f"{value:.{digits}f}" if value is not None and math.isfinite(value) else "-"


def _percent(value: float | None) -> str:
    return f"{100 * value:.1f} %" if value is not None and math.isfinite(value) else "-"
