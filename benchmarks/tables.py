"""The Markdown tables of README.md and docs/results.md from the JSON of a run.

    smart bench --full --json results.json
    python benchmarks/robustness.py --json robustness.json
    python benchmarks/tables.py results.json [robustness.json]

A speedup in bold is below 1.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smart_decoding.bench.report import strongest

Run = Mapping[str, Any]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def ratio(run: Run | None, key: str = "speedup") -> str:
    """1.35 (1.30–1.40)"""
    if run is None:
        return "–"
    low, high = run.get(f"{key}_low"), run.get(f"{key}_high")
    value = f"{run[key]:.2f}" if run[key] >= 0.995 else f"**{run[key]:.2f}**"
    return value + (f" ({low:.2f}–{high:.2f})" if low and high else "")


def by_batch(runs: Sequence[Run]) -> str:
    """Speedups over all tasks, a row for each batch size."""
    pooled = [run for run in runs if run["task"] == "all"]
    names = list(dict.fromkeys(run["policy"] for run in pooled if run["policy"] != "off"))
    names.sort(key=lambda name: name != "smart")
    found = {(run["batch_size"], run["policy"]): run for run in pooled}
    rows = []
    for size in dict.fromkeys(run["batch_size"] for run in pooled):
        plain, ours = found[size, "off"], found.get((size, "smart"))
        did = f"{ours['tokens_per_round']:.2f}, {ours['rows_per_round']:.0f}" if ours else "–"
        noise = f"{plain['noise']:.2f}" if plain.get("noise") else "–"
        ratios = (ratio(found.get((size, name))) for name in names)
        rows.append((str(size), f"{plain['tokens_per_s']:.0f}", *ratios, did, noise, str(plain["blocks"])))
    shown = (f"`{name}`" for name in names)
    head = ("batch", "plain tok/s", *shown, "`smart`: tokens, rows per round", "noise", "blocks")
    return table(head, rows)


def tuned(runs: Sequence[Run]) -> str:
    """Which settings the tuned contestants had."""
    rows = [(str(run["batch_size"]), run["policy"], run["setting"], ratio(run)) for run in runs
            if run["task"] == "all" and run.get("setting")]  # fmt: skip
    return table(("batch", "contestant", "setting", "speedup"), rows) if rows else ""


def over(runs: Sequence[Run]) -> str:
    """`smart` beside the strongest setting of each other policy."""
    rows = [(str(run["batch_size"]), run["policy"], ratio(run, "smart_over")) for run in strongest(runs)]
    return table(("batch", "the best of another policy", "`smart` / it"), rows) if rows else ""


def replayed(of_sizes: Mapping[str, Mapping[str, Any]], part: str) -> str:
    sizes = sorted(of_sizes, key=int)
    names = [name for name, value in of_sizes[sizes[0]][part].items() if isinstance(value, float)]
    return table(("", *sizes), [(name, *(f"{of_sizes[size][part][name]:.2f}" for size in sizes)) for name in names])


def swept(of_sizes: Mapping[str, Mapping[str, Any]]) -> str:
    """The published rule's sweep, and the best fixed tree."""
    rows = []
    for size in sorted(of_sizes, key=int):
        best, near, worst = of_sizes[size]["paper"]
        setting = (
            f"alpha {best['alpha']:g}, {best['budget'] // int(size)} nodes each, {best['family']}, {best['l_tree']}"
        )
        rows.append((size, f"{best['speedup']:.2f}", setting, f"{near['speedup']:.2f}", f"{worst['speedup']:.2f}",
                     of_sizes[size]["gap"]["best fixed is"].removeprefix("likelihood:")))  # fmt: skip
    return table(("batch", "best", "its setting", "alpha 0.8, published", "worst", "best fixed tree"), rows)


def load(part: Mapping[str, Any]) -> str:
    rows = []
    for run in part["runs"]:
        times = [
            f"{run[kind][p]:.{digits}f}"
            for kind, digits in (("ttft_ms", 0), ("tpot_ms", 1), ("latency_ms", 0))
            for p in ("p50", "p95")
        ]
        rows.append((f"{100 * run['load']:.0f} %", run["policy"], f"{run['tokens_per_s']:.0f}", *times,
                     f"{run['tpot_ratio']:.2f}"))  # fmt: skip
    head = ("load", "policy", "tok/s", "TTFT p50", "p95", "TPOT p50", "p95", "latency p50", "p95", "TPOT ×")
    return table(head, rows)


def robust(rows: Sequence[Run]) -> str:
    cells = []
    for row in rows:
        noticed = row.get("rounds_until_noticed")
        told = "not noticed" if "rounds_until_noticed" in row and noticed is None else f"{noticed} rounds"
        cells.append((row["case"], str(row["batch_size"]), ratio(row), ratio(row, "end_to_end"),
                      f"{100 * row['off_share']:.0f} %", told if "rounds_until_noticed" in row else ""))  # fmt: skip
    return table(("case", "batch", "speedup", "end to end", "rounds off", "noticed after"), cells)


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for path in sys.argv[1:]:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if data.get("runs"):
            parts = (by_batch(data["runs"]), over(data["runs"]), tuned(data["runs"]))
            print("\n## Speedup by batch size", *parts, sep="\n\n")
        for part, title in (("sampled_runs", "Sampled"), ("variant_runs", "One ingredient exchanged, live")):
            if data.get(part):
                print(f"\n## {title}\n\n{by_batch(data[part])}")
        if data.get("suite_runs"):
            runs = [run for run in data["suite_runs"] if run["task"] != "all" and run["policy"] != "off"]
            rows = [(r["task"], r["policy"], ratio(r), ratio(r, "end_to_end_speedup")) for r in runs]
            print(f"\n## Suites\n\n{table(('task', 'policy', 'speedup', 'end to end'), rows)}")
        if data.get("replayed"):
            print(f"\n## Hindsight, by replay\n\n{replayed(data['replayed'], 'gap')}")
            print(f"\n## Ablations, by replay\n\n{replayed(data['replayed'], 'ablations')}")
            print(f"\n## Sweeps, by replay\n\n{swept(data['replayed'])}")
        if data.get("load"):
            print(f"\n## Load\n\n{load(data['load'])}")
        if data.get("robustness"):
            print(f"\n## Never slower?\n\n{robust(data['robustness'])}")


if __name__ == "__main__":
    main()
