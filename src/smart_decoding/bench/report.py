"""The tables of a benchmark, for the terminal, and what follows from them in a sentence or two."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from smart_decoding.bench.options import OURS
from smart_decoding.bench.results import Results, Run
from smart_decoding.bench.sections import (
    ASCII,
    UNKNOWN,
    WIDTH,
    Cell,
    Section,
    as_text,
    number,
    ratio_cell,
    said,
)
from smart_decoding.bench.summary import POOLED

PARTIAL = "Partial: the time limit came before all blocks had run."


def everything(result: Mapping[str, Any]) -> str:
    """Return all tables of a result below one another, and the conclusion; tables without rows are
    left out."""
    results = Results.from_dict(result)
    parts = [
        policies(results, "Policies", SPEED),
        policies(results, "Rounds", ROUNDS),
        by_task(results),
    ]
    tables = (as_text(part) for part in parts if part.rows)
    return "\n\n".join([*warnings(results), *tables, *conclusion(results)])


def warnings(results: Results) -> list[str]:
    """Return warnings to print before the tables."""
    found = []
    if reason := results.provenance.get("plain_torch"):
        found.append(f"plain torch, not the CPU kernels: {reason}")
    if any(run.get("partial") for run in results.runs):
        found.append(PARTIAL)
    return found


def conclusion(results: Results) -> list[str]:
    """Return what `smart`, else the first policy, gains at each batch size, and what follows: a
    text, or none where plain decoding ran alone."""
    if not results.policies:
        return []
    policy = results.policies[0]
    runs = [run for run in results.pooled if run["policy"] == policy]
    text = f"{policy} against plain decoding: {'; '.join(map(_gain, runs))}."
    highest = (number(run, "speedup_high") or number(run, "speedup") or 1.0 for run in runs)
    if any(value < 1 for value in highest):
        text += " Where it is slower, --policy off decodes plainly."
    elif policy == OURS:
        text += " smart run, chat and serve use it by default."
    return [textwrap.fill(text, WIDTH, break_on_hyphens=False).translate(ASCII)]


def _gain(run: Run) -> str:
    """Return what a run tells, in words."""
    size = run["batch_size"]
    load = "with one request" if size == 1 else f"with {size} at once"
    ratio = ratio_cell(run)
    if isinstance(ratio, str):
        return f"{load} unknown"
    if ratio.high is not None and (ratio.low or 0.0) <= 1 <= ratio.high:
        return f"{load} no certain difference{ratio.bounds}"
    return f"{load} {ratio.value:.2f} times as fast{ratio.bounds}"


def policies(results: Results, title: str, columns: Sequence[str]) -> Section:
    """Return a row for each policy and batch size, with those of `columns` that some run has."""
    cells = {column: [COLUMNS[column](run) for run in results.pooled] for column in columns}
    cells = {name: of_runs for name, of_runs in cells.items() if set(of_runs) - {UNKNOWN}}
    rows = [
        (run["policy"], str(run["batch_size"]), *(of_runs[i] for of_runs in cells.values()))
        for i, run in enumerate(results.pooled)
    ]
    differing = [
        f"{run['policy']}, batch {run['batch_size']}: "
        f"{said(run, 'differing_prompts', 1, 100, ' %')} of answers differ from plain decoding's"
        for run in results.pooled
        if "same" in columns and run.get("identical") is False
    ]
    return Section(title, head=("policy", "b", *cells), rows=rows, lines=differing)


def by_task(results: Results) -> Section:
    """Return every speedup, and the settings of tuned contestants."""
    tasks = [POOLED, *results.tasks]
    rows = []
    for policy in results.policies:
        for size in results.batch_sizes:
            cells = [ratio_cell(results.find(policy, size, task)) for task in tasks]
            if set(cells) - {UNKNOWN}:
                rows.append((policy, str(size), *cells))
    settings = [
        f"{run['policy']}, batch {run['batch_size']} = {run['setting']}"
        for run in results.pooled
        if run.get("setting")
    ]
    return Section("Speedup by task", head=("policy", "b", *tasks), rows=rows, lines=settings)


def _figure(name: str, digits: int, factor: float = 1.0) -> Callable[[Run], Cell]:
    return lambda run: said(run, name, digits, factor)


COLUMNS: Mapping[str, Callable[[Run], Cell]] = {
    "tok/s": _figure("tokens_per_s", 1),
    "speedup (95 %)": ratio_cell,
    "smart / it (95 %)": lambda run: ratio_cell(run, "smart_over"),
    "by replay": _figure("policy_gain", 2),
    "e2e": _figure("end_to_end_speedup", 2),
    "same": lambda run: "yes" if run.get("identical") else "NO",
    "tok/rnd": _figure("tokens_per_round", 2),
    "rows": _figure("rows_per_round", 1),
    "off %": _figure("off_share", 0, 100),
    "controller %": _figure("controller_share", 1, 100),
    "TPOT ms": _figure("tpot_ms", 1),
    "worst ×": _figure("worst_tpot_ratio", 2),
    "blocks": _figure("blocks", 0),
    "noise (95 %)": lambda run: ratio_cell(run, "noise"),
}
_NAMES = tuple(COLUMNS)
SPEED = _NAMES[: _NAMES.index("tok/rnd")]
ROUNDS = _NAMES[_NAMES.index("tok/rnd") :]
