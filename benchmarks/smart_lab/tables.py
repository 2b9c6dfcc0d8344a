"""Tables of what only the laboratory measures, for its page, its terminal and the pages of
benchmarks/results.

Needed by `results`, for every page of benchmarks/results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from smart_decoding.bench.options import BASELINE
from smart_lab.gguf.report import (
    build_of,
    drafts_of,
    in_words,
    memory_and_prompt,
    not_tried,
    rivals_of,
    servers_of,
    title,
)
from smart_lab.sections import (
    UNKNOWN,
    Cell,
    Section,
    ratio_cell,
    said,
)
from smart_lab.summary import POOLED

if TYPE_CHECKING:
    from smart_lab.results import Run

DID = ("`smart`: end to end", "tokens, rows per round", "rounds off", "controller", "worst request")


def by_batch(runs: Sequence[Run]) -> Section:
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
    return Section("", head=head, rows=rows)


def _did(run: Run | None) -> Sequence[Cell]:
    """Return what `smart` did, as in DID."""
    if run is None:
        return [UNKNOWN] * len(DID)
    return (
        ratio_cell(run, "end_to_end_speedup"),
        f"{said(run, 'tokens_per_round', 2)}, {said(run, 'rows_per_round', 0)}",
        said(run, "off_share", 0, 100, " %"),
        said(run, "controller_share", 1, 100, " %"),
        said(run, "worst_tpot_ratio", 2, unit=" ×"),
    )


def by_task(runs: Sequence[Run]) -> Section:
    """Return every speedup by task."""
    found = {(run["policy"], run["batch_size"], run["task"]): run for run in runs}
    tasks = list(dict.fromkeys(run["task"] for run in runs))
    rows = [
        (policy, str(size), *(ratio_cell(found.get((policy, size, task))) for task in tasks))
        for policy, size in dict.fromkeys((run["policy"], run["batch_size"]) for run in runs)
        if policy != BASELINE
    ]
    return Section("Speedup by task", head=("policy", "batch", *tasks), rows=rows)


def tuned(runs: Sequence[Run]) -> Section:
    """Return which settings the tuned contestants had."""
    rows = [
        (str(run["batch_size"]), run["policy"], run["setting"], ratio_cell(run))
        for run in runs
        if run["task"] == POOLED and run.get("setting")
    ]
    head = ("batch", "contestant", "setting", "speedup")
    return Section("Tuned settings", head=head, rows=rows)


def over(runs: Sequence[Run]) -> Section:
    """Return `smart` over each other contestant, block by block, and by replay where measured."""
    rows = [
        (
            run["policy"],
            str(run["batch_size"]),
            ratio_cell(run, "smart_over"),
            said(run, "smart_policy_over", 2),
        )
        for run in runs
        if run["task"] == POOLED and run.get("smart_over") is not None
    ]
    head = ("contestant", "batch", "`smart` over it", "by replay")
    return Section("Beside every other contestant", head=head, rows=rows)


def robust(rows: Sequence[Run]) -> Section:
    """Bad heads, prompts, neighbours and profiles."""
    tasks = list(dict.fromkeys(task for row in rows for task in row.get("tasks", ())))
    cells = [
        (
            row["case"],
            row.get("arrivals", "queue"),
            str(row["batch_size"]),
            ratio_cell(row),
            ratio_cell(row, "end_to_end"),
            *(ratio_cell(row.get("tasks", {}).get(task), "end_to_end") for task in tasks),
            said(row, "noise", 2),
            said(row, "off_share", 0, 100, " %"),
            _noticed(row),
        )
        for row in rows
    ]
    ends = ("noise", "rounds off", "noticed after")
    head = ("case", "arrivals", "batch", "speedup", "end to end", *tasks, *ends)
    return Section("", head=head, rows=cells)


def busy(found: Mapping[str, Run]) -> Section:
    """Return tokens per second of each entry point, alone and beside busy processes."""
    rows = [
        (name, f"{row['quiet']:.1f}", f"{row['busy']:.1f}", f"{row['ratio']:.2f}")
        for name, row in found.items()
    ]
    head = ("entry point", "alone, tok/s", "beside a busy process for every two CPUs", "ratio")
    return Section("", head=head, rows=rows)


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
    return Section(run["name"], head=head, rows=rows)


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
    return Section(title, head=head, rows=rows)


def _triple(values: Sequence[float | None]) -> Cell:
    value, low, high = values
    return ratio_cell({"speedup": value, "speedup_low": low, "speedup_high": high})


OLD_DECODE = "the requests' own rates, added up (files of before 2026-11-29, 05:00)"


def gguf(result: Mapping[str, Any]) -> list[Section]:
    """Return one GGUF file here and in llama.cpp: forwards, then a table for each number of
    requests."""
    result = in_words(result)
    decode = f"decode: {result.get('decode', OLD_DECODE)}"
    captions = [build_of(result["llama_cpp"]), *rivals_of(result), decode]
    return [_gguf_forwards(result), *(_gguf_run(run, captions) for run in result["runs"])]


def _gguf_forwards(result: Mapping[str, Any]) -> Section:
    found = result["forwards"]
    sizes: Mapping[str, Any] = next(iter(found.values()), {})
    rows = [(size, *(_range(times[size]) for times in found.values())) for size in sizes]
    title = f"Milliseconds of a forward after {result['forward_context']} tokens (lowest–highest)"
    captions = [*memory_and_prompt(result)]
    return Section(title, head=("rows", *found), rows=rows, captions=captions)


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
        "same as SMART's plain decoding",
        *(f"{task}, one request, prompt included" for task in tasks),
    )
    ratios = [
        f"{each['of']} over {each['over']}, {each['key']}: {each['value']:.2f} "
        f"({each['low']:.2f}–{each['high']:.2f})"
        for each in run["ratios"]
        if each["pairs"] > 1
    ]
    flags = []
    for name, tuned in servers_of(run):
        flags += [f"{name} {mode}: `{words}`" for mode, words in tuned["flags"].items()]
        flags += [f"{name}: {not_tried(tuned)}"] if tuned["left_out"] else []
    flags += drafts_of(run)
    return Section(title(run), head=head, rows=rows, captions=[*captions, *ratios, *flags])


def _range(values: Sequence[float]) -> str:
    middle, low, high = values
    return f"{middle:.1f} ({low:.1f}–{high:.1f})"
