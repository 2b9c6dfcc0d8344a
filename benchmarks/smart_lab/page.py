"""A page about a benchmark: what its sections say. `report.html.jinja` says how they look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import TYPE_CHECKING, Any

from smart_decoding.bench.names import policy_of
from smart_decoding.bench.report import (
    COLUMNS,
    by_task,
    load_table,
    noise,
    over,
    policies,
    warnings,
)
from smart_decoding.bench.results import (
    Results,
    Run,
    headline,
    headline_cell,
    interval,
    mapping,
)
from smart_decoding.bench.sections import (
    FASTER,
    SLOWER,
    UNDECIDED,
    Marked,
    RatioCell,
    Section,
    number,
    text_of,
)
from smart_decoding.bench.summary import POOLED
from smart_lab import tables
from smart_lab.figures import figures
from smart_lab.plots import EXTRA, can_draw, inline_svgs

if TYPE_CHECKING:
    from smart_lab.panels import Figure
    from smart_lab.results import LabResults

WORDS = {FASTER: "faster", SLOWER: "slower", UNDECIDED: "not decided"}
COLOURED = (
    "Blue: faster than plain decoding; red: slower; no colour: the interval includes 1×, or one "
    "block alone was measured and there is none."
)
ROUNDS = (
    "Rows and wasted rows are the whole batch's, tokens one request's. GB/s: all weights and "
    "cached keys and values, read once in the mean time of a verifying forward; GFLOP/s: products "
    "with weights in that time; their limits: what this machine reached in a sum and in a matrix "
    "product of torch, in their best moment. Over floor, on GPUs: over rounds of plain decoding in "
    "which memory is read once at that rate. Peak memory: of the process, over all policies of a "
    "batch size."
)


@dataclass(frozen=True, slots=True)
class Tile:
    """A figure that stands out, with a few words."""

    figure: str
    words: str
    kind: str


def page(results: LabResults) -> str:
    """The whole document."""
    name = str(mapping(results.provenance.get("weights")).get("model", "a model"))
    drawn = figure_sections(figures(results))
    compared = comparisons(results) if results.runs else []
    if results.runs and can_draw():  # the speedups come first
        compared.insert(0, drawn.pop(0))
    return document(
        f"{name}: speculative decoding, measured",
        [
            *compared,
            *tables.compared(results),
            *drawn,
            *load_table(results),
            *tables.replayed(results.replayed),
            *([rounds(results), noise(results)] if results.runs else []),
            origin(results),
        ],
        heading=f"Speculative decoding of {name}, measured",
        setting=setting(results),
        warnings=warnings(results),
        tiles=tiles(results),
    )


def document(title: str, sections: Sequence[Section], **header: Any) -> str:
    """A page of the given sections. header: heading, setting, warnings, tiles, as the template
    takes them."""
    import jinja2

    file = resources.files("smart_lab") / "report.html.jinja"
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    shown = {"heading": title, "setting": "", "warnings": (), "tiles": (), **header}
    template = environment.from_string(file.read_text(encoding="utf-8"))
    return template.render(title=title, sections=sections, **shown)


def figure_sections(found: Sequence[Figure]) -> list[Section]:
    """The figures drawn; without matplotlib one section that says how to get them."""
    if not can_draw():
        told = f"Figures need matplotlib: {EXTRA}; then smart_lab report RESULTS.json --html FILE."
        return [Section("figures", "Figures", told)] if found else []
    return [
        Section(figure.key, figure.title, drawings=inline_svgs(figure), captions=[figure.caption])
        if figure.panels
        else Section(figure.key, figure.title, figure.missing)
        for figure in found
    ]


def comparisons(results: LabResults) -> list[Section]:
    """The speedups: where they are below 1×, beside other policies, by task, at a second
    temperature."""
    heat = number(results.sampled[0], "temperature") if results.sampled else None
    at = f"At temperature {heat:g}" if heat is not None else "At another temperature"
    pooled = [run for run in results.sampled if run["task"] == POOLED]
    sampled = tables.speedups("sampled", at, pooled)
    tasks = replace(by_task(results), captions=[COLOURED])
    return [losses(results), *over(results), tasks, *sampled]


def rounds(results: Results) -> Section:
    """All that is known of each policy at each batch size."""
    table = policies(results, "What a round did", tuple(COLUMNS))
    return replace(table, key="rounds", captions=[ROUNDS])


def setting(results: Results) -> str:
    """One line: where, how and when."""
    first = results.pooled[0] if results.pooled else {}
    hardware = mapping(results.provenance.get("hardware"))
    device = hardware.get("gpu") or hardware.get("cpu") or "unknown processor"
    cores = f", {hardware['cores']} cores" if hardware.get("cores") else ""
    heat = number(first, "temperature")
    known = (
        f"{device}{cores}",
        first.get("dtype"),
        None if heat is None else f"temperature {heat:g}",
        str(results.provenance.get("time", ""))[:10],
    )
    return " · ".join(str(each) for each in known if each)


def tiles(results: LabResults) -> list[Tile]:
    """Best and worst of all, the verdicts of `smart`, and the noise to judge them by."""
    runs = results.decided
    if not runs:
        return []
    best = max(runs, key=_quoted)
    worst = min(runs, key=_quoted)
    different = [run for run in results.contestants if run.get("identical") is False]
    told = f"of {len(results.contestants)} runs gave other tokens than plain decoding"
    return [
        *_smart_tile(runs),
        Tile(f"{_quoted(best):.2f}×", f"best: {_where(results, best)}", verdict(best)),
        Tile(f"{_quoted(worst):.2f}×", f"worst: {_where(results, worst)}", verdict(worst)),
        *_noise_tile(results),
        Tile(str(len(different)), told, SLOWER if different else FASTER),
    ]


def _smart_tile(runs: Sequence[Run]) -> list[Tile]:
    """The range of `smart`, if it ran."""
    ours = sorted((r for r in runs if r["policy"] == "smart"), key=lambda run: run["batch_size"])
    if not ours:
        return []
    speedups = [_quoted(run) for run in ours]
    verdicts = {verdict(run) for run in ours}
    kind = next(kind for kind in (SLOWER, UNDECIDED, FASTER) if kind in verdicts)
    told = f"smart, over batch sizes {', '.join(str(run['batch_size']) for run in ours)}"
    return [Tile(f"{min(speedups):.2f} – {max(speedups):.2f}×", told, kind)]


def _noise_tile(results: Results) -> list[Tile]:
    """The batch size whose noise is furthest from 1."""
    found = [
        (max(1 - bounds[0], bounds[1] - 1), bounds, run["batch_size"])
        for run in results.pooled
        if (bounds := interval(run, "noise")) is not None
    ]
    if not found:
        return []
    _, (low, high), size = max(found)
    told = f"plain decoding against itself, batch {size}: ratios this near to 1 may be noise"
    return [Tile(f"{low:.2f} – {high:.2f}×", told, "")]


def losses(results: LabResults) -> Section:
    """All pooled runs below 1x and single tasks that are slower, the lowest first; where another
    policy beats smart."""
    below = [run for run in results.decided if round(_quoted(run), 2) < 1.0]
    below += [run for run in results.runs if _slow_task(results, run)]
    lines: list[str | Marked] = []
    for run in sorted(below, key=_quoted):
        kind = verdict(run)
        value, _, bounds = text_of(headline_cell(run)).partition(" ")
        told = f"{value}× {bounds or '(one block)'}, {WORDS[kind]}"
        lines.append(Marked(f"{_where(results, run)}: {told}", kind))
    lines += _beaten(results)
    intro = "" if lines else "No policy was below 1× at any batch size over all tasks."
    return Section("losses", "Where it loses", intro=intro, lines=lines)


def verdict(run: Run) -> str:
    """FASTER or SLOWER by the speedup to quote, only where its whole interval says so."""
    cell = headline_cell(run)
    return cell.kind if isinstance(cell, RatioCell) else UNDECIDED


def _quoted(run: Run) -> float:
    """The speedup to quote."""
    return float(run[headline(run)])


def _slow_task(results: Results, run: Run) -> bool:
    """Whether a single task is slower though its policy is not, over all tasks."""
    if run["task"] == POOLED or verdict(run) != SLOWER:
        return False
    pooled = results.find(run["policy"], run["batch_size"])
    return pooled is not None and verdict(pooled) != SLOWER


def _beaten(results: LabResults) -> list[str]:
    """Batch sizes where `smart` is not the fastest of the policies."""
    lines = []
    for size in results.batch_sizes:
        runs = [run for run in results.decided if run["batch_size"] == size]
        ours = next((run for run in runs if policy_of(run["policy"]) == "smart"), None)
        best = max(runs, key=lambda run: run["speedup"], default=None)
        if ours is not None and best is not None and best["speedup"] > ours["speedup"]:
            other = f"{results.names[best['policy']]} has {_quoted(best):.2f}×"
            name = results.names[ours["policy"]]
            lines.append(f"batch {size}: {other}, more than {name}'s {_quoted(ours):.2f}×")
    return lines


def origin(results: LabResults) -> Section:
    """The machine, the command, the versions."""
    known = results.provenance
    hardware = mapping(known.get("hardware"))
    machine = (f"{k} {_told(v)}" for k, v in hardware.items() if v not in (None, "", []))
    facts: dict[str, Any] = {
        "machine": ", ".join(machine),
        "weights": _told(known.get("weights")),
        "draft head": known.get("head"),
        "seed": known.get("seed"),
        "commit": known.get("commit"),
        "time": known.get("time"),
        "versions": _told(known.get("versions")),
        **_measures(results),
    }
    command = str(known.get("command") or "not recorded")
    told = {name: str(value) for name, value in facts.items() if value not in (None, "")}
    return Section("origin", "The machine and the command", command=command, facts=told)


def _measures(results: LabResults) -> dict[str, str]:
    """Memory, and the machine's limits."""
    whole = "of the whole process: all policies, batch sizes and loading"
    told = (
        (results.memory, "peak_process_gib", "peak memory", f"{{:.2f}} GiB resident, {whole}"),
        (
            results.memory,
            "peak_gpu_gib",
            "peak GPU memory",
            "{:.2f} GiB allocated, of the whole process",
        ),
        (results.limits, "gb_per_s", "best of reading memory", "{:.0f} GB/s"),
        (results.limits, "gflop_per_s", "best of matrix products", "{:.0f} GFLOP/s"),
        (results.memory, "weights_gib", "memory of weights", "{:.2f} GiB"),
        (results.memory, "kv_cache_gib", "memory of KV cache", "{:.2f} GiB"),
    )
    return {
        name: form.format(value)
        for source, key, name, form in told
        if (value := number(source, key)) is not None
    }


def _told(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_told(each)}" for name, each in value.items())
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return "" if value is None else str(value)


def _where(results: Results, run: Run) -> str:
    task = "" if run["task"] == POOLED else f", {run['task']} alone"
    return f"{results.names[run['policy']]}, batch {run['batch_size']}{task}"
