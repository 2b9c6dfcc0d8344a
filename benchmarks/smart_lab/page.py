"""The page of `smart report` with what only the laboratory measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from smart_decoding.bench import page as measured
from smart_decoding.bench.options import BASELINE
from smart_decoding.bench.page import Further, Marked, Section, ratio_cell, said, speedups
from smart_decoding.bench.report import Run, short_names
from smart_decoding.bench.results import number
from smart_decoding.bench.summary import POOLED
from smart_lab.figures import replay_figures
from smart_lab.results import LabResults


def page(results: LabResults) -> str:
    """The whole document."""
    suites = [run for run in results.suites if run["task"] != POOLED]
    comparisons = [
        *speedups("suites", "Long contexts and edits", suites),
        *variants(results),
        *peers(results),
    ]
    return measured.page(results, Further(comparisons, replay_figures(results), replayed(results)))


def variants(results: LabResults) -> list[Section]:
    """`smart` with one ingredient exchanged, live."""
    runs = [run for run in results.variants if run["task"] == POOLED and run["policy"] != BASELINE]
    names = short_names(runs)
    rows = [
        (
            names[run["policy"]],
            str(run["batch_size"]),
            ratio_cell(run),
            said(run, "levels_per_round", 2),
            said(run, "rows_per_round", 1),
        )
        for run in runs
    ]
    told = (
        "Measured live, not by replay. all_levels: never stops before eight levels; cheap_costs: starts from a "
        "profile in which rows cost a fifth and levels a quarter of what they do; kept: and never corrects it."
    )
    head = ("policy", "batch", "speedup", "levels", "rows")
    return (
        [Section("variants", "Ablations confirmed live", head=head, rows=rows, captions=[told])]
        if rows
        else []
    )


def replayed(results: LabResults) -> list[Section]:
    """The replay's numbers, and the published rule's sweep."""
    if not results.replayed:
        return []
    found = results.replayed
    sizes = sorted(found, key=int)
    rows = []
    for part in ("gap", "ablations"):
        names = [name for name, value in found[sizes[0]][part].items() if isinstance(value, float)]
        for name in names if part == "gap" else names[1:]:
            rows.append((name, *(said(found[size][part], name, 2) for size in sizes)))
    best = "; ".join(
        f"batch {size}: {found[size]['gap'].get('best fixed is', '?')}" for size in sizes
    )
    paper = "; ".join(f"batch {size}: {_paper(found[size].get('paper'))}" for size in sizes)
    captions = [
        f"Best fixed setting: {best}.",
        f"paper's best of 60, its default's neighbour, its worst: {paper}.",
    ]
    head = ("speedup at batch", *sizes)
    return [Section("replayed", "By replay, in numbers", head=head, rows=rows, captions=captions)]


def peers(results: LabResults) -> list[Section]:
    """Other engines; where one is faster the cell is red, and a line says so."""
    if not results.peers:
        return []
    runs = [(peer, run) for peer in results.peers for run in _runs(peer)]
    rows = []
    for peer, run in runs:
        told = (str(peer["name"]), str(peer.get("version", "?")), str(peer.get("precision", "?")))
        rates = [said(run, f"{who}tokens_per_s", 0) for who in ("", "plain_", "smart_")]
        ratios = (ratio_cell(run, "plain_speedup"), ratio_cell(run))
        rows.append(
            (*told, str(run.get("batch_size")), *rates, *ratios, said(run, "same", 0, 100, " %"))
        )
    lines = [
        f"{peer['name']} is faster than ours at batch {run.get('batch_size')}: {_text(ratio_cell(run))}"
        for peer, run in runs
        if (number(run, "speedup") or 1.0) < 1
    ]
    lines += [
        f"{peer['name']}: {peer[what]}"
        for peer in results.peers
        for what in ("note", "error")
        if peer.get(what)
    ]
    caption = (
        "Decoding alone, answers of a fixed length, engines in turn on the same prompts. Above 1: ours is faster. "
        "Same tokens: the share of its answers before the first token that differs from ours (other kernels round "
        "otherwise, other precisions more so)."
    )
    ours = ("ours, plain", "ours, smart", "ours plain / it", "ours smart / it")
    head = ("engine", "version", "precision", "batch", "tokens/s", *ours, "same tokens")
    return [
        Section(
            "peers", "Beside other engines", head=head, rows=rows, lines=lines, captions=[caption]
        )
    ]


def _text(cell: str | Marked) -> str:
    return cell if isinstance(cell, str) else cell.text


def _paper(rows: Any) -> str:
    try:
        best, near, worst = rows
        setting = f"alpha {best['alpha']:g}, budget {best['budget']}, {best['family']} costs"
        return f"{best['speedup']:.2f} ({setting}), {near['speedup']:.2f}, {worst['speedup']:.2f}"
    except (TypeError, ValueError, KeyError):
        return "unknown"


def _runs(peer: Mapping[str, Any]) -> list[Run]:
    runs = peer.get("runs")
    return [run for run in runs if isinstance(run, Mapping)] if isinstance(runs, Sequence) else []
