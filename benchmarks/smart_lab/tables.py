"""Markdown tables of what was measured, for the pages of benchmarks/results. A ratio in bold is
below 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from smart_decoding.bench.report import strongest

Run = Mapping[str, Any]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def ratio(run: Run | None, key: str = "speedup") -> str:
    """1.35 (1.30–1.40)"""
    if run is None or run.get(key) is None:
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
        plain = found[size, "off"]
        noise = f"{plain['noise']:.2f}" if plain.get("noise") else "–"
        ratios = (ratio(found.get((size, name))) for name in names)
        same = all(run["identical"] for run in pooled if run["batch_size"] == size)
        ends = (noise, str(plain["blocks"]), "yes" if same else "NO")
        rows.append(
            (
                str(size),
                f"{plain['tokens_per_s']:.0f}",
                *ratios,
                *_did(found.get((size, "smart"))),
                *ends,
            )
        )
    head = (
        "batch",
        "plain tok/s",
        *(f"`{name}`" for name in names),
        *DID,
        "noise",
        "blocks",
        "same tokens",
    )
    return table(head, rows)


DID = ("`smart`: end to end", "tokens, rows per round", "rounds off", "controller", "worst request")


def _did(run: Run | None) -> Sequence[str]:
    """What `smart` did, as in DID."""
    if run is None:
        return ["–"] * len(DID)
    shares = (
        f"{100 * run[name]:.{digits}f} %"
        for name, digits in (("off_share", 0), ("controller_share", 1))
    )
    worst = run.get("worst_tpot_ratio")
    rounds = f"{run['tokens_per_round']:.2f}, {run['rows_per_round']:.0f}"
    return ratio(run, "end_to_end_speedup"), rounds, *shares, f"{worst:.2f} ×" if worst else "–"


def tuned(runs: Sequence[Run]) -> str:
    """Which settings the tuned contestants had."""
    rows = [
        (str(run["batch_size"]), run["policy"], run["setting"], ratio(run))
        for run in runs
        if run["task"] == "all" and run.get("setting")
    ]
    return table(("batch", "contestant", "setting", "speedup"), rows) if rows else ""


def over(runs: Sequence[Run]) -> str:
    """`smart` beside the strongest setting of each other policy."""
    rows = [
        (str(run["batch_size"]), run["policy"], ratio(run, "smart_over")) for run in strongest(runs)
    ]
    return table(("batch", "the best of another policy", "`smart` / it"), rows) if rows else ""


def replayed(of_sizes: Mapping[str, Mapping[str, Any]], part: str) -> str:
    sizes = sorted(of_sizes, key=int)
    names = [name for name, value in of_sizes[sizes[0]][part].items() if isinstance(value, float)]
    return table(
        ("", *sizes),
        [(name, *(f"{of_sizes[size][part][name]:.2f}" for size in sizes)) for name in names],
    )


def swept(of_sizes: Mapping[str, Mapping[str, Any]]) -> str:
    """The published rule's sweep, and the best fixed tree."""
    rows = []
    for size in sorted(of_sizes, key=int):
        best, near, worst = of_sizes[size]["paper"]
        setting = f"alpha {best['alpha']:g}, {best['budget'] // int(size)} nodes each, {best['family']}, {best['l_tree']}"
        rows.append(
            (
                size,
                f"{best['speedup']:.2f}",
                setting,
                f"{near['speedup']:.2f}",
                f"{worst['speedup']:.2f}",
                of_sizes[size]["gap"]["best fixed is"].removeprefix("eagle2:"),
            )
        )
    return table(
        ("batch", "best", "its setting", "alpha 0.8, published", "worst", "best fixed tree"), rows
    )


def load(part: Mapping[str, Any]) -> str:
    rows = []
    for run in part["runs"]:
        times = [
            f"{run[kind][p]:.{digits}f}"
            for kind, digits in (("ttft_ms", 0), ("tpot_ms", 1), ("latency_ms", 0))
            for p in ("p50", "p95")
        ]
        rows.append(
            (
                f"{100 * run['load']:.0f} %",
                run["policy"],
                f"{run['tokens_per_s']:.0f}",
                *times,
                f"{run['tpot_ratio']:.2f}",
            )
        )
    head = (
        "load",
        "policy",
        "tok/s",
        "TTFT p50",
        "p95",
        "TPOT p50",
        "p95",
        "latency p50",
        "p95",
        "TPOT ×",
    )
    return table(head, rows)


def robust(rows: Sequence[Run]) -> str:
    cells = []
    for row in rows:
        noticed = row.get("rounds_until_noticed")
        told = (
            "not noticed"
            if "rounds_until_noticed" in row and noticed is None
            else f"{noticed} rounds"
        )
        cells.append(
            (
                row["case"],
                str(row["batch_size"]),
                ratio(row),
                ratio(row, "end_to_end"),
                f"{100 * row['off_share']:.0f} %",
                told if "rounds_until_noticed" in row else "",
            )
        )
    return table(("case", "batch", "speedup", "end to end", "rounds off", "noticed after"), cells)


def suites(runs: Sequence[Run]) -> str:
    """Long contexts and edits."""
    shown = [run for run in runs if run["task"] != "all" and run["policy"] != "off"]
    rows = [
        (run["task"], run["policy"], ratio(run), ratio(run, "end_to_end_speedup")) for run in shown
    ]
    return table(("task", "policy", "speedup", "end to end"), rows)


def peers(found: Sequence[Run]) -> str:
    """Other engines beside ours, and who failed."""
    rows = []
    for peer in found:
        for run in peer.get("runs", ()):
            told = (peer["name"], str(peer.get("version", "?")), str(peer.get("precision", "?")))
            rates = (f"{run[f'{who}tokens_per_s']:.0f}" for who in ("", "plain_", "smart_"))
            ratios = (ratio(run, "plain_speedup"), ratio(run))
            rows.append(
                (*told, str(run["batch_size"]), *rates, *ratios, f"{100 * run['same']:.0f} %")
            )
    ours = ("ours, plain", "ours, `smart`", "plain ours / it", "`smart` / it")
    parts = [
        table(("engine", "version", "precision", "batch", "tok/s", *ours, "same tokens"), rows)
    ]
    parts += [f"{peer['name']}: {peer['error']}" for peer in found if peer.get("error")]
    return "\n\n".join(parts)


def vllm(run: Mapping[str, Any]) -> str:
    """SMART inside vLLM: a row for each batch size; ratios are [value, low, high]."""
    rows = []
    for size, found in run["results"].items():
        rates = (f"{found[name]:.0f}" for name in ("plain", "spec", "smart"))
        names = ("spec_speedup", "smart_speedup", "smart_over_better")
        rows.append(
            (
                size,
                *rates,
                *(_triple(found[name]) for name in names),
                found["same"],
                str(found["blocks"]),
            )
        )
    rates = ("plain tok/s", "stock speculation", "SMART")
    ratios = ("stock / plain", "SMART / plain", "SMART / the better")
    return table(("batch", *rates, *ratios, "same answers", "blocks"), rows)


def transformers(run: Mapping[str, Any]) -> str:
    """SMART inside transformers: a row for each way to generate."""
    rows = [
        (
            size,
            way,
            f"{found['tokens_per_second']:.1f}",
            _triple(found["speedup"]),
            str(found["answers_unlike_generate"]),
        )
        for size, ways in run["batch"].items()
        for way, found in ways.items()
    ]
    return table(
        ("batch", "way", "tok/s", "over `generate` (lowest–highest)", "answers that differ"), rows
    )


def _triple(values: Sequence[float | None]) -> str:
    value, low, high = values
    return ratio({"speedup": value, "speedup_low": low, "speedup_high": high})
