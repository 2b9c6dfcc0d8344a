"""The tables of a benchmark, for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from smart_decoding.bench.options import BASELINE
from smart_decoding.bench.results import (
    Results,
    Run,
    interval,
    policy_of,
    short_names,
)
from smart_decoding.bench.sections import (
    UNKNOWN,
    Cell,
    Section,
    as_text,
    number,
    ratio_cell,
    said,
    same_tokens,
)
from smart_decoding.bench.summary import POOLED

Column = Callable[[Results, Run], Cell]
REPLAYED = (
    "By replay: the policies alone, on this run's recorded drafts at its measured costs "
    "(python -m smart_lab bench --policy-gain); the difference is implementation and noise."
)
PARTIAL = "Partial: the time limit came before all blocks had run."


def everything(result: Mapping[str, Any]) -> str:
    """All tables of a result below one another; what has neither rows nor lines is left out."""
    results = Results.from_dict(result)
    parts = comparison(results)
    shown = [as_text(part) for part in parts if part.rows or part.lines]
    return "\n\n".join([*warnings(results), *shown])


def comparison(results: Results) -> list[Section]:
    """Policies over all tasks, beside the best of the others, by task; the noise."""
    if not results.runs:
        return []
    return [
        policies(results, "Policies", SPEED),
        policies(results, "Rounds and latencies", ROUNDS),
        *over(results),
        by_task(results),
        noise(results),
    ]


def warnings(results: Results) -> list[str]:
    """What a reader must know first."""
    told = plain_torch(results.provenance)
    partial = any(run.get("partial") for run in results.runs)
    return [*([told] if told else []), *([PARTIAL] if partial else [])]


def plain_torch(provenance: Mapping[str, Any]) -> str:
    """That a CPU's figures are not those of the CPU kernels, and why; empty where they are."""
    reason = provenance.get("plain_torch")
    return f"plain torch, not the CPU kernels: {reason}" if reason else ""


def policies(results: Results, title: str, columns: Sequence[str]) -> Section:
    """A row for each policy and batch size, with the given columns where some run has them."""
    names = {**short_names(run["policy"] for run in results.pooled), **results.names}
    cells = {
        column: [COLUMNS[column](results, run) for run in results.pooled] for column in columns
    }
    cells = {name: of_runs for name, of_runs in cells.items() if set(of_runs) - {UNKNOWN}}
    rows = [
        (names[run["policy"]], str(run["batch_size"]), *(of_runs[i] for of_runs in cells.values()))
        for i, run in enumerate(results.pooled)
    ]
    differing = [
        f"{names[run['policy']]}, batch {run['batch_size']}: "
        f"{said(run, 'differing_prompts', 1, 100, ' %')} of answers and "
        f"{said(run, 'differing_tokens', 1, 100, ' %')} of tokens differ from plain decoding's"
        for run in results.pooled
        if "same" in columns and run.get("identical") is False
    ]
    return Section(title, head=("policy", "b", *cells), rows=rows, lines=differing)


def over(results: Results) -> list[Section]:
    """`smart` beside the strongest setting of each other policy, block by block; and by replay,
    where that was asked for."""
    best = strongest(results.runs)
    replayed = any(number(run, "smart_policy_over") is not None for run in best)
    rows = [
        (
            results.names[run["policy"]],
            str(run["batch_size"]),
            ratio_cell(run, "smart_over"),
            *([said(run, "smart_policy_over", 2)] if replayed else []),
            _worst(results, run, "smart_over"),
        )
        for run in best
    ]
    middle = ["by replay"] if replayed else []
    head = ("smart over the best", "b", "smart / it (95 %)", *middle, "worst task")
    title = "Beside the best of every other policy"
    told = [REPLAYED] if replayed else []
    return [Section(title, head=head, rows=rows, captions=told)] if rows else []


def strongest(runs: Sequence[Run]) -> list[Run]:
    """The fastest setting of each other policy at each batch size, of those that were measured
    beside `smart`."""
    best: dict[tuple[int, str], Run] = {}
    for run in runs:
        speedup = number(run, "speedup")
        if run["task"] != POOLED or speedup is None or number(run, "smart_over") is None:
            continue
        key = run["batch_size"], policy_of(run["policy"])
        if key not in best or speedup > best[key]["speedup"]:
            best[key] = run
    return list(best.values())


def by_task(results: Results) -> Section:
    """Every speedup, and what short names and tuned contestants stand for."""
    tasks = [POOLED, *results.tasks]
    rows = []
    for policy, name in results.names.items():
        for size in results.batch_sizes:
            cells = [ratio_cell(results.find(policy, size, task)) for task in tasks]
            if set(cells) - {UNKNOWN}:
                rows.append((name, str(size), *cells))
    legend = [f"{short} = {full}" for full, short in results.names.items() if short != full]
    legend += [
        f"{run['policy']}, batch {run['batch_size']} = {run['setting']}"
        for run in results.pooled
        if run.get("setting")
    ]
    head = ("policy", "b", *tasks)
    return Section("Speedup by task", head=head, rows=rows, lines=legend)


def noise(results: Results) -> Section:
    """The baseline against itself, and how much of its answers were loops."""
    lines = []
    for run in results.pooled:
        value = number(run, "noise")
        if value is None:
            continue
        bounds = interval(run, "noise")
        told = f"({bounds[0]:.3f} to {bounds[1]:.3f})" if bounds else "(one pair, no interval)"
        if bounds is not None and not bounds[0] <= 1 <= bounds[1]:
            told += (
                ": the interval excludes 1×, so other speedups at this batch size may be off as "
                "much"
            )
        if number(run, "looping_answers") is not None:
            told += (
                f"; {said(run, 'looping_answers', 1, 100)} % of its answers ended in a loop, "
                f"{said(run, 'looping_tokens', 1, 100)} % of its tokens were cut"
            )
        lines.append(f"batch {run['batch_size']}: {value:.3f}× {told}")
    lines += [_apart(results, copy) for copy in results.copies if copy["task"] == POOLED]
    return Section("Noise of this machine", lines=lines)


def _apart(results: Results, copy: Run) -> str:
    first = results.find(copy["copy_of"], copy["batch_size"])
    told = f"{copy['policy']} verifies the same trees as {copy['copy_of']}"
    pair = said(copy, "speedup", 3), said(first or {}, "speedup", 3)
    return f"batch {copy['batch_size']}: {told}; they are one contestant: {pair[0]}× and {pair[1]}×"


def _worst(results: Results, run: Run, name: str = "speedup") -> Cell:
    """The task with the least ratio."""
    size = run["batch_size"]
    runs = (results.find(run["policy"], size, task) for task in results.tasks)
    found = [(value, each) for each in runs if each and (value := number(each, name)) is not None]
    if not found or run["policy"] == BASELINE:
        return UNKNOWN
    value, worst = min(found, key=lambda pair: pair[0])
    return f"{value:.2f} {worst['task']}"


def _figure(name: str, digits: int, factor: float = 1.0) -> Column:
    return lambda results, run: said(run, name, digits, factor)


COLUMNS: Mapping[str, Column] = {
    "tok/s": _figure("tokens_per_s", 1),
    "speedup (95 %)": lambda results, run: ratio_cell(run),
    "by replay": _figure("policy_gain", 2),
    "e2e": _figure("end_to_end_speedup", 2),
    "worst task": _worst,
    "tok/rnd": _figure("tokens_per_round", 2),
    "rows": _figure("rows_per_round", 1),
    "wasted": _figure("wasted_rows", 1),
    "same": lambda results, run: same_tokens(run),
    "levels": _figure("levels_per_round", 2),
    "off %": _figure("off_share", 0, 100),
    "controller %": _figure("controller_share", 1, 100),
    "blocks": _figure("blocks", 0),
    "TTFT ms": _figure("ttft_ms", 0),
    "vision ms": lambda results, run: said(run, "vision_ms", 0) if run.get("vision_ms") else "–",
    "TTFT ×": _figure("ttft_ratio", 2),
    "TPOT ms": _figure("tpot_ms", 1),
    "worst ×": _figure("worst_tpot_ratio", 2),
    "rounds": _figure("rounds", 0),
    "chains %": _figure("chain_share", 0, 100),
    "trees %": _figure("tree_share", 0, 100),
    "verify ms": _figure("verify_ms", 1),
    "draft ms": _figure("draft_ms", 1),
}
_NAMES = tuple(COLUMNS)
SPEED = _NAMES[: _NAMES.index("levels")]
ROUNDS = _NAMES[_NAMES.index("levels") : _NAMES.index("rounds")]
