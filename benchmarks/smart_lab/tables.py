"""Tables of what only the laboratory measures, for its page, its terminal and the pages of
benchmarks/results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from smart_decoding.bench.names import short_names
from smart_decoding.bench.options import BASELINE
from smart_decoding.bench.results import headline_cell
from smart_decoding.bench.sections import (
    UNKNOWN,
    Cell,
    Section,
    number,
    ratio_cell,
    said,
    same_tokens,
    text_of,
)
from smart_decoding.bench.summary import POOLED
from smart_lab.gguf.report import build_of, not_tried, title

if TYPE_CHECKING:
    from smart_decoding.bench.results import Run

Replayed = Mapping[str, Mapping[str, Any]]
PEERS = (
    "Decoding alone, answers of a fixed length, engines in turn on the same prompts. Above 1: ours "
    "is faster. Same tokens: the share of its answers before the first token that differs from "
    "ours (other kernels round otherwise, other precisions more so)."
)
DID = ("`smart`: end to end", "tokens, rows per round", "rounds off", "controller", "worst request")


def suites(runs: Sequence[Run]) -> list[Section]:
    """Long contexts and edits."""
    of_tasks = [run for run in runs if run["task"] != POOLED]
    return speedups("suites", "Long contexts and edits", of_tasks)


def speedups(key: str, title: str, all_runs: Sequence[Run]) -> list[Section]:
    """A table of runs other than those of the main comparison, if there are any."""
    runs = [run for run in all_runs if run["policy"] != BASELINE]
    names = short_names(run["policy"] for run in runs)
    rows = [
        (
            names[run["policy"]],
            str(run["batch_size"]),
            str(run["task"]),
            headline_cell(run),
            ratio_cell(run, "end_to_end_speedup"),
            same_tokens(run),
        )
        for run in runs
    ]
    head = ("policy", "b", "task", "speedup (95 %)", "end to end", "same")
    return [Section(key, title, head=head, rows=rows)] if rows else []


def peers(found: Sequence[Mapping[str, Any]]) -> list[Section]:
    """Other engines beside ours, where one is faster, and who failed."""
    if not found:
        return []
    runs = [(peer, run) for peer in found for run in _runs(peer)]
    rows = [
        (
            *(str(peer.get(what, "?")) for what in ("name", "version", "precision")),
            str(run.get("batch_size")),
            *(said(run, f"{who}tokens_per_s", 0) for who in ("", "plain_", "smart_")),
            ratio_cell(run, "plain_speedup"),
            ratio_cell(run),
            said(run, "same", 0, 100, " %"),
        )
        for peer, run in runs
    ]
    lines = [
        f"{peer['name']} is faster than ours at batch {run.get('batch_size')}: "
        + text_of(ratio_cell(run))
        for peer, run in runs
        if (number(run, "speedup") or 1.0) < 1
    ]
    lines += [
        f"{peer['name']}: {peer[what]}"
        for peer in found
        for what in ("note", "error")
        if peer.get(what)
    ]
    ours = ("ours, plain", "ours, smart", "ours plain / it", "ours smart / it")
    head = ("engine", "version", "precision", "batch", "tok/s", *ours, "same tokens")
    title = "Beside other engines"
    return [Section("peers", title, head=head, rows=rows, lines=lines, captions=[PEERS])]


def replayed(of_sizes: Replayed) -> list[Section]:
    """Oracle, ablations and sweeps by replay."""
    if not of_sizes:
        return []
    return [
        _speedups(of_sizes, "gap", "Oracle, by replay"),
        _speedups(of_sizes, "ablations", "Ablations, by replay"),
        swept(of_sizes),
    ]


def _speedups(of_sizes: Replayed, part: str, title: str) -> Section:
    sizes = sorted(of_sizes, key=int)
    first = of_sizes[sizes[0]][part]
    rows = [
        (name, *(said(of_sizes[size][part], name, 2) for size in sizes))
        for name, value in first.items()
        if isinstance(value, float)
    ]
    return Section(f"replayed-{part}", title, head=("speedup at batch", *sizes), rows=rows)


def swept(of_sizes: Replayed) -> Section:
    """The published rule's sweep, and the best fixed tree."""
    rows = []
    for size in sorted(of_sizes, key=int):
        fixed = of_sizes[size]["gap"].get("best fixed is", UNKNOWN).removeprefix("eagle2:")
        try:
            best, near, worst = of_sizes[size]["paper"]
            nodes = f"{best['budget'] // int(size)} nodes each"
            given = f"alpha {best['alpha']:g}, {nodes}, {best['family']}, {best['l_tree']}"
            found = [f"{row['speedup']:.2f}" for row in (best, near, worst)]
        except (TypeError, ValueError, KeyError):
            given = UNKNOWN
            found = [UNKNOWN] * 3
        rows.append((size, found[0], given, *found[1:], fixed))
    head = ("batch", "best", "its setting", "alpha 0.8, published", "worst", "best fixed tree")
    return Section("swept", "Sweeps, by replay", head=head, rows=rows)


def by_batch(runs: Sequence[Run], title: str) -> Section:
    """Speedups over all tasks, a row for each batch size."""
    pooled = [run for run in runs if run["task"] == POOLED]
    names = list(dict.fromkeys(run["policy"] for run in pooled if run["policy"] != BASELINE))
    names.sort(key=lambda name: name != "smart")
    found = {(run["batch_size"], run["policy"]): run for run in pooled}
    rows = []
    for size in dict.fromkeys(run["batch_size"] for run in pooled):
        plain = found[size, BASELINE]
        same = all(run["identical"] for run in pooled if run["batch_size"] == size)
        rows.append(
            (
                str(size),
                said(plain, "tokens_per_s", 0),
                *(ratio_cell(found.get((size, name))) for name in names),
                *_did(found.get((size, "smart"))),
                said(plain, "noise", 2),
                str(plain["blocks"]),
                "yes" if same else "NO",
            )
        )
    ends = ("noise", "blocks", "same tokens")
    head = ("batch", "plain tok/s", *(f"`{name}`" for name in names), *DID, *ends)
    return Section("by-batch", title, head=head, rows=rows)


def _did(run: Run | None) -> Sequence[Cell]:
    """What `smart` did, as in DID."""
    if run is None:
        return [UNKNOWN] * len(DID)
    return (
        ratio_cell(run, "end_to_end_speedup"),
        f"{said(run, 'tokens_per_round', 2)}, {said(run, 'rows_per_round', 0)}",
        said(run, "off_share", 0, 100, " %"),
        said(run, "controller_share", 1, 100, " %"),
        said(run, "worst_tpot_ratio", 2, unit=" ×"),
    )


def tuned(runs: Sequence[Run]) -> Section:
    """Which settings the tuned contestants had."""
    rows = [
        (str(run["batch_size"]), run["policy"], run["setting"], ratio_cell(run))
        for run in runs
        if run["task"] == POOLED and run.get("setting")
    ]
    head = ("batch", "contestant", "setting", "speedup")
    return Section("tuned", "Tuned settings", head=head, rows=rows)


def robust(rows: Sequence[Run]) -> Section:
    """Bad heads, prompts, neighbours and profiles."""
    cells = [
        (
            row["case"],
            str(row["batch_size"]),
            ratio_cell(row),
            ratio_cell(row, "end_to_end"),
            said(row, "off_share", 0, 100, " %"),
            _noticed(row),
        )
        for row in rows
    ]
    head = ("case", "batch", "speedup", "end to end", "rounds off", "noticed after")
    return Section("robust", "", head=head, rows=cells)


def busy(found: Mapping[str, Run]) -> Section:
    """Tokens per second of each entry point, alone and beside busy processes."""
    rows = [
        (name, f"{row['quiet']:.1f}", f"{row['busy']:.1f}", f"{row['ratio']:.2f}")
        for name, row in found.items()
    ]
    head = ("entry point", "alone, tok/s", "beside a busy process for every two CPUs", "ratio")
    return Section("busy", "", head=head, rows=rows)


def _noticed(row: Run) -> str:
    if "rounds_until_noticed" not in row:
        return ""
    rounds = row["rounds_until_noticed"]
    return "not noticed" if rounds is None else f"{rounds} rounds"


def vllm(run: Mapping[str, Any]) -> Section:
    """SMART inside vLLM: a row for each batch size; ratios are [value, low, high]."""
    names = ("spec_speedup", "smart_speedup", "smart_over_better")
    rows = [
        (
            size,
            *(said(found, arm, 0) for arm in ("plain", "spec", "smart")),
            *(_triple(found[name]) for name in names),
            found["same"],
            str(found["blocks"]),
        )
        for size, found in run["results"].items()
    ]
    rates = ("plain tok/s", "stock speculation", "SMART")
    ratios = ("stock / plain", "SMART / plain", "SMART / the better")
    head = ("batch", *rates, *ratios, "same answers", "blocks")
    return Section("vllm", run["name"], head=head, rows=rows)


def transformers(run: Mapping[str, Any]) -> Section:
    """SMART inside transformers: a row for each way to generate."""
    rows = [
        (
            size,
            way,
            said(found, "tokens_per_second", 1),
            _triple(found["speedup"]),
            str(found["answers_unlike_generate"]),
        )
        for size, ways in run["batch"].items()
        for way, found in ways.items()
    ]
    head = ("batch", "way", "tok/s", "over `generate` (lowest–highest)", "answers that differ")
    title = f"{run['dtype']}, commit {run['about']['commit'][:7]}"
    return Section("transformers", title, head=head, rows=rows)


def _triple(values: Sequence[float | None]) -> Cell:
    value, low, high = values
    return ratio_cell({"speedup": value, "speedup_low": low, "speedup_high": high})


def _runs(peer: Mapping[str, Any]) -> list[Run]:
    runs = peer.get("runs")
    return [run for run in runs if isinstance(run, Mapping)] if isinstance(runs, Sequence) else []


def simulated(found: Sequence[Mapping[str, Any]]) -> list[Section]:
    """What `smart_lab published` simulates, a table a card."""
    return [_simulated(each) for each in found]


def _simulated(found: Mapping[str, Any]) -> Section:
    published = found["published"]
    ranges = list(next(iter(found["profiled"].values())))
    rows = [
        _predicted(o, found["profiled"][str(o["batch_size"])], published) for o in found["outlooks"]
    ]
    head = (
        "batch",
        "plain tok/s",
        "fixed tree, 59 nodes",
        "published rule",
        "best of 15 fixed trees",
        "smart",
        *(f"smart, profile of {name}" for name in ranges),
        "smart: tokens, rows per round",
    )
    captions = [
        f"Acceptance: {found['acceptance']}.",
        *(f"It does not fit: {note}." for note in found["notes"]),
    ]
    title = f"Simulated: {found['hardware']}, {found['model']} (published speedups in brackets)"
    return Section("simulated", title, head=head, rows=rows, captions=captions)


def _predicted(
    o: Mapping[str, Any],
    profiled: Mapping[str, float],
    published: Mapping[str, Mapping[str, float]],
) -> Sequence[Cell]:
    size = str(o["batch_size"])
    speedup = dict(o["speedup"])
    smart = speedup.pop("smart")
    rule = speedup.pop("paper")
    tree = speedup.pop("eagle2, EAGLE-2's size")
    (fixed,) = speedup.values()

    def beside(value: float, method: str) -> str:
        known = published.get(method, {}).get(size)
        return f"{value:.2f}" + (f" ({known:.2f})" if known else "")

    return (
        size,
        f"{o['plain_tokens_per_s']:.0f}",
        beside(tree, "msd"),
        beside(rule, "smart"),
        f"{fixed:.2f}",
        f"{smart:.2f}",
        *(f"{value:.2f}" for value in profiled.values()),
        f"{o['smart_tokens_per_round']:.1f}, {o['smart_rows_per_round']:.0f}",
    )


OLD_DECODE = "the requests' own rates, added up (files of before 2026-11-29, 05:00)"


def gguf(result: Mapping[str, Any]) -> list[Section]:
    """One GGUF file here and in llama.cpp: forwards, then a table for each number of requests."""
    decode = f"decode: {result.get('decode', OLD_DECODE)}"
    about = build_of(result["llama_cpp"])
    return [_gguf_forwards(result), *(_gguf_run(run, [about, decode]) for run in result["runs"])]


def _gguf_forwards(result: Mapping[str, Any]) -> Section:
    found = result["forwards"]
    sizes: Mapping[str, Any] = next(iter(found.values()), {})
    rows = [(size, *(_range(times[size]) for times in found.values())) for size in sizes]
    title = f"Milliseconds of a forward after {result['forward_context']} tokens (lowest–highest)"
    return Section("forwards", title, head=("rows", *found), rows=rows)


def _gguf_run(run: Mapping[str, Any], captions: Sequence[str]) -> Section:
    by_task: Mapping[str, Mapping[str, float]] = run.get("by_task", {})
    tasks = list(next(iter(by_task.values()), {}))
    rows = [
        (
            each["name"],
            _range(each["overall"]),
            _range(each["decode"]),
            f"{each['per_round']:.2f}",
            f"{100 * each['same']:.0f} %",
            *(f"{by_task[each['name']][task]:.1f}" for task in tasks),
        )
        for each in run["contestants"]
    ]
    head = (
        "",
        "tok/s, prompts included (lowest–highest)",
        "decode",
        "tokens a round",
        "our plain's words",
        *(f"{task}, one request, prompt included" for task in tasks),
    )
    ratios = [
        f"{each['of']} over {each['over']}, {each['key']}: {each['value']:.2f} "
        f"({each['low']:.2f}–{each['high']:.2f})"
        for each in run["ratios"]
        if each["pairs"] > 1
    ]
    flags = [f"llama.cpp {mode}: `{words}`" for mode, words in run["flags"].items()]
    flags += [f"llama.cpp: {not_tried(run)}"] if run["left_out"] else []
    return Section("gguf", title(run), head=head, rows=rows, captions=[*captions, *ratios, *flags])


def _range(values: Sequence[float]) -> str:
    middle, low, high = values
    return f"{middle:.1f} ({low:.1f}–{high:.1f})"
