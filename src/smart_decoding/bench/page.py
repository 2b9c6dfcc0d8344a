"""A page about a benchmark: what its sections say. `report.html.jinja` says how they look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from smart_decoding.bench.figures import Figure, figures
from smart_decoding.bench.options import BASELINE, EXTRA
from smart_decoding.bench.plots import can_draw, inline_svgs
from smart_decoding.bench.report import Run, plain_torch, short_names, strongest
from smart_decoding.bench.results import (
    FASTER,
    SLOWER,
    UNDECIDED,
    Results,
    interval,
    mapping,
    number,
    verdict,
)
from smart_decoding.bench.summary import POOLED

WORDS = {FASTER: "faster", SLOWER: "slower", UNDECIDED: "not decided"}
# Column -> (field, factor, digits): what a round did, per policy and batch size.
METRICS = {
    "tokens/s": ("tokens_per_s", 1, 1),
    "end to end ×": ("end_to_end_speedup", 1, 2),
    "tokens/round": ("tokens_per_round", 1, 2),
    "rows/round": ("rows_per_round", 1, 1),
    "wasted rows": ("wasted_rows", 1, 1),
    "levels/round": ("levels_per_round", 1, 2),
    "rounds off %": ("off_share", 100, 0),
    "controller %": ("controller_share", 100, 1),
    "verify ms": ("verify_ms", 1, 1),
    "draft ms": ("draft_ms", 1, 1),
    "GB/s": ("gb_per_s", 1, 1),
    "% of limit": ("gb_share", 100, 0),
    "GFLOP/s": ("gflop_per_s", 1, 0),
    "% of its limit": ("gflop_share", 100, 0),
    "peak GiB": ("peak_gib", 1, 2),
    "TTFT ms": ("ttft_ms", 1, 0),
    "TPOT ms": ("tpot_ms", 1, 1),
    "worst TPOT ×": ("worst_tpot_ratio", 1, 2),
}


@dataclass(frozen=True, slots=True)
class Marked:
    """Text that is coloured by its kind: FASTER, SLOWER or another class of the style sheet."""

    text: str
    kind: str


@dataclass(frozen=True, slots=True)
class Tile:
    """A figure that stands out, with a few words."""

    figure: str
    words: str
    kind: str


@dataclass(frozen=True, slots=True)
class Section:
    """A section of the page, from top to bottom; what is empty is not shown. drawings: SVG
    elements."""

    key: str
    title: str
    missing: str = ""
    intro: str = ""
    command: str = ""
    drawings: Sequence[str] = ()
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str | Marked]] = ()
    lines: Sequence[str | Marked] = ()
    captions: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Further:
    """What the laboratory shows beside: comparisons behind ours, figures behind ours, tables behind
    that of load."""

    comparisons: Sequence[Section] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Section] = ()


def page(results: Results, further: Further | None = None) -> str:
    """The whole document."""
    further = further or Further()
    name = str(mapping(results.provenance.get("weights")).get("model", "a model"))
    warnings = [told] if (told := plain_torch(results.provenance)) else []
    if any(run.get("partial") for run in results.runs):
        warnings.append("Partial: the time limit came before all blocks had run.")
    drawn = figure_sections([*figures(results), *further.figures])
    compared = comparisons(results) if results.runs else []
    if results.runs and can_draw():  # the speedups come first
        compared.insert(0, drawn.pop(0))
    rounds = [metrics(results), noise(results)] if results.runs else []
    return document(
        f"{name}: speculative decoding, measured",
        [
            *compared,
            *further.comparisons,
            *drawn,
            *load_table(results),
            *further.tables,
            *rounds,
            origin(results),
        ],
        heading=f"Speculative decoding of {name}, measured",
        setting=setting(results),
        warnings=warnings,
        tiles=tiles(results),
    )


def document(title: str, sections: Sequence[Section], **header: Any) -> str:
    """A page of the given sections. header: heading, setting, warnings, tiles, as the template
    takes them."""
    import jinja2

    source = (resources.files("smart_decoding.bench") / "report.html.jinja").read_text(
        encoding="utf-8"
    )
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    shown = {"heading": title, "setting": "", "warnings": (), "tiles": (), **header}
    return environment.from_string(source).render(title=title, sections=sections, **shown)


def figure_sections(found: Sequence[Figure]) -> list[Section]:
    """The figures drawn; without matplotlib one section that says how to get them."""
    if not can_draw():
        told = f"Figures need matplotlib: {EXTRA}; then smart report RESULTS.json --html FILE."
        return [Section("figures", "Figures", told)] if found else []
    return [
        Section(figure.key, figure.title, drawings=inline_svgs(figure), captions=[figure.caption])
        if figure.panels
        else Section(figure.key, figure.title, figure.missing)
        for figure in found
    ]


def comparisons(results: Results) -> list[Section]:
    """The speedups: where they are below 1×, beside other policies, by task, at a second
    temperature."""
    heat = number(results.sampled[0], "temperature") if results.sampled else None
    at = f"At temperature {heat:g}" if heat is not None else "At another temperature"
    sampled = speedups("sampled", at, [run for run in results.sampled if run["task"] == POOLED])
    return [losses(results), *_over(results), by_task(results), *sampled]


def setting(results: Results) -> str:
    """One line: where, how and when."""
    first = results.pooled[0] if results.pooled else {}
    hardware = mapping(results.provenance.get("hardware"))
    device = hardware.get("gpu") or hardware.get("cpu") or "unknown processor"
    cores = f", {hardware['cores']} cores" if hardware.get("cores") else ""
    heat = (
        f"temperature {first['temperature']:g}"
        if number(first, "temperature") is not None
        else None
    )
    known = (
        f"{device}{cores}",
        first.get("dtype"),
        heat,
        str(results.provenance.get("time", ""))[:10],
    )
    return " · ".join(str(each) for each in known if each)


def tiles(results: Results) -> list[Tile]:
    """Best and worst of all, the verdicts of each policy, and the noise to judge them by."""
    runs = [run for run in results.contestants if number(run, "speedup") is not None]
    if not runs:
        return []
    best, worst = (pick(runs, key=lambda run: run["speedup"]) for pick in (max, min))
    found = _smart_tile(runs)
    found.append(Tile(f"{best['speedup']:.2f}×", f"best: {_where(results, best)}", verdict(best)))
    found.append(
        Tile(f"{worst['speedup']:.2f}×", f"worst: {_where(results, worst)}", verdict(worst))
    )
    noises = {
        run["batch_size"]: b for run in results.pooled if (b := interval(run, "noise")) is not None
    }
    if noises:
        size, (low, high) = max(
            noises.items(), key=lambda item: max(1 - item[1][0], item[1][1] - 1)
        )
        told = f"plain decoding against itself, batch {size}: ratios this near to 1 may be noise"
        found.append(Tile(f"{low:.2f} – {high:.2f}×", told, ""))
    different = [run for run in results.contestants if run.get("identical") is False]
    told = f"of {len(results.contestants)} runs gave other tokens than plain decoding"
    return [*found, Tile(str(len(different)), told, SLOWER if different else FASTER)]


def _smart_tile(runs: Sequence[Run]) -> list[Tile]:
    """The range of `smart`, if it ran."""
    ours = sorted((r for r in runs if r["policy"] == "smart"), key=lambda run: run["batch_size"])
    if not ours:
        return []
    low, high = (pick(run["speedup"] for run in ours) for pick in (min, max))
    verdicts = {verdict(run) for run in ours}
    all_in_all = SLOWER if SLOWER in verdicts else UNDECIDED if UNDECIDED in verdicts else FASTER
    told = f"smart, over batch sizes {', '.join(str(run['batch_size']) for run in ours)}"
    return [Tile(f"{low:.2f} – {high:.2f}×", told, all_in_all)]


def losses(results: Results) -> Section:
    """All pooled runs below 1x and single tasks that are slower, the lowest first; where another
    policy beats smart."""
    below = [run for run in results.contestants if round(number(run, "speedup") or 1.0, 2) < 1.0]
    below += [run for run in results.runs if _slow_task(results, run)]
    lines: list[str | Marked] = []
    for run in sorted(below, key=lambda run: run["speedup"]):
        kind = verdict(run)
        bounds = interval(run)
        told = f"({bounds[0]:.2f}–{bounds[1]:.2f})" if bounds else "(one block)"
        lines.append(
            Marked(f"{_where(results, run)}: {run['speedup']:.2f}× {told}, {WORDS[kind]}", kind)
        )
    lines += _beaten(results)
    intro = "" if lines else "No policy was below 1× at any batch size over all tasks."
    return Section("losses", "Where it loses", intro=intro, lines=lines)


def _slow_task(results: Results, run: Run) -> bool:
    """Whether a single task is slower though its policy is not, over all tasks."""
    if run["task"] == POOLED or verdict(run) != SLOWER:
        return False
    pooled = results.find(run["policy"], run["batch_size"])
    return pooled is not None and verdict(pooled) != SLOWER


def _beaten(results: Results) -> list[str]:
    """Batch sizes where `smart` is not the fastest of the policies."""
    lines = []
    for size in results.batch_sizes:
        runs = [
            r
            for r in results.contestants
            if r["batch_size"] == size and number(r, "speedup") is not None
        ]
        ours = next((r for r in runs if r["policy"].split("(")[0] == "smart"), None)
        best = max(runs, key=lambda run: run["speedup"], default=None)
        if ours is not None and best is not None and best["speedup"] > ours["speedup"]:
            other = f"{results.names[best['policy']]} has {best['speedup']:.2f}×"
            lines.append(
                f"batch {size}: {other}, more than {results.names[ours['policy']]}'s {ours['speedup']:.2f}×"
            )
    return lines


def _over(results: Results) -> list[Section]:
    """`smart` beside the strongest setting of each other policy, block by block."""
    known = [
        r
        for r in results.runs
        if number(r, "speedup") is not None and number(r, "smart_over") is not None
    ]
    rows = [
        (results.names[run["policy"]], str(run["batch_size"]), ratio_cell(run, "smart_over"))
        for run in strongest(known)
    ]
    head = ("policy", "batch", "smart / it")
    return (
        [Section("over", "Beside the best of every other policy", head=head, rows=rows)]
        if rows
        else []
    )


def by_task(results: Results) -> Section:
    """Every speedup in a table, coloured by its verdict."""
    tasks = [POOLED, *results.tasks]
    rows = []
    for policy, name in results.names.items():
        for size in results.batch_sizes:
            cells = (ratio_cell(results.find(policy, size, task) or {}) for task in tasks)
            rows.append((name, str(size), *cells))
    long = [f"{short} = {full}" for full, short in results.names.items() if short != full]
    told = (
        "Blue: faster than plain decoding; red: slower; no colour: the interval includes 1×, or one block alone was "
        "measured and there is none."
    )
    captions = [told, *(["; ".join(long)] if long else [])]
    return Section(
        "tasks", "Speedup by task", head=("policy", "batch", *tasks), rows=rows, captions=captions
    )


def speedups(key: str, title: str, all_runs: Sequence[Run]) -> list[Section]:
    """A table of runs other than those of the main comparison, if there are any."""
    runs = [run for run in all_runs if run["policy"] != BASELINE]
    names = short_names(runs)
    rows = [
        (
            names[run["policy"]],
            str(run["batch_size"]),
            str(run["task"]),
            ratio_cell(run),
            same_tokens(run),
        )
        for run in runs
    ]
    head = ("policy", "batch", "task", "speedup", "same tokens")
    return [Section(key, title, head=head, rows=rows)] if rows else []


def load_table(results: Results) -> list[Section]:
    """The table of requests that arrive at random."""
    runs: Sequence[Run] = results.load.get("runs", ())
    if not runs:
        return []
    names = {**short_names(runs), BASELINE: "plain decoding"}
    rows = []
    for run in runs:
        times = [
            said(mapping(run.get(kind)), p, digits)
            for kind, digits in (("ttft_ms", 0), ("tpot_ms", 1))
            for p in ("p50", "p95", "p99")
        ]
        rates = (said(run, "requests_per_s", 2), said(run, "tokens_per_s", 0))
        load = f"{100 * run['load']:.0f} %"
        rows.append(
            (
                names[run["policy"]],
                load,
                *rates,
                *times,
                said(run, "tpot_ratio", 2),
                same_tokens(run),
            )
        )
    capacity = [
        said(results.load, f"capacity_{what}_per_s", d)
        for what, d in (("requests", 2), ("tokens", 0))
    ]
    told = (
        f"Milliseconds. Capacity: {capacity[0]} requests/s, {capacity[1]} tokens/s, with "
        f"{results.load.get('slots', '?')} requests at once and a queue that is never empty. TPOT ×: the median "
        "request's time per token over plain decoding's, below 1 is faster."
    )
    percentiles = ("TTFT p50", "p95", "p99", "TPOT p50", "p95", "p99")
    head = ("policy", "load", "requests/s", "tokens/s", *percentiles, "TPOT ×", "same tokens")
    return [Section("load-table", "Under load, in numbers", head=head, rows=rows, captions=[told])]


def metrics(results: Results) -> Section:
    """What a round did: only the columns that some run has."""
    columns = {
        name: how
        for name, how in METRICS.items()
        if any(number(r, how[0]) is not None for r in results.pooled)
    }
    names = {**results.names, BASELINE: "plain decoding"}
    rows = []
    for run in sorted(results.pooled, key=lambda run: run["batch_size"]):
        cells = (said(run, name, digits, factor) for name, factor, digits in columns.values())
        rows.append((names[run["policy"]], str(run["batch_size"]), *cells))
    told = (
        "Rows and wasted rows are the whole batch's, tokens one request's. GB/s: all weights and cached keys and "
        "values, read once in the mean time of a verifying forward; GFLOP/s: products with weights in that time; their "
        "limits: what this machine reached in a sum and in a matrix product of torch, in their best moment. Peak "
        "memory: of the process, over all policies of a batch size."
    )
    return Section(
        "rounds", "What a round did", head=("policy", "batch", *columns), rows=rows, captions=[told]
    )


def noise(results: Results) -> Section:
    """The baseline against itself."""
    lines = []
    for run in results.pooled:
        value, bounds = number(run, "noise"), interval(run, "noise")
        if value is not None:
            told = f"({bounds[0]:.3f} to {bounds[1]:.3f})" if bounds else "(one pair, no interval)"
            odd = bounds is not None and not bounds[0] <= 1 <= bounds[1]
            told += (
                ": the interval excludes 1×, so other speedups at this batch size may be off as much"
                if odd
                else ""
            )
            lines.append(f"batch {run['batch_size']}: {value:.3f}× {told}")
    intro = "Plain decoding timed against itself, as a policy would be; without noise this is 1×."
    missing = "" if lines else "The noise was not measured."
    return Section("noise", "Noise of this machine", missing, intro, lines=lines)


def origin(results: Results) -> Section:
    """The machine, the command, the versions."""
    known, memory = results.provenance, results.memory
    hardware = mapping(known.get("hardware"))
    facts: dict[str, Any] = {
        "machine": ", ".join(
            f"{k} {_told(v)}" for k, v in hardware.items() if v not in (None, "", [])
        ),
        "weights": _told(known.get("weights")),
        "draft head": known.get("head"),
        "seed": known.get("seed"),
        "commit": known.get("commit"),
        "time": known.get("time"),
        "versions": _told(known.get("versions")),
    }
    peak, gpu = number(memory, "peak_process_gib"), number(memory, "peak_gpu_gib")
    if peak is not None:
        facts["peak memory"] = (
            f"{peak:.2f} GiB resident, of the whole process: all policies, batch sizes and loading"
        )
    if gpu is not None:
        facts["peak GPU memory"] = f"{gpu:.2f} GiB allocated, of the whole process"
    for key, name, unit in (
        ("gb_per_s", "reading memory", "GB/s"),
        ("gflop_per_s", "matrix products", "GFLOP/s"),
    ):
        if (rate := number(results.limits, key)) is not None:
            facts[f"best of {name}"] = f"{rate:.0f} {unit}"
    for key, name in (("weights_gib", "weights"), ("kv_cache_gib", "KV cache")):
        if (size := number(memory, key)) is not None:
            facts[f"memory of {name}"] = f"{size:.2f} GiB"
    command = str(known.get("command") or "not recorded")
    told = {name: str(value) for name, value in facts.items() if value not in (None, "")}
    return Section("origin", "The machine and the command", command=command, facts=told)


def ratio_cell(run: Run, name: str = "speedup") -> str | Marked:
    """1.35 (1.30–1.40), coloured by whether the whole interval is on one side of 1."""
    value, bounds = number(run, name), interval(run, name)
    if value is None:
        return "–"
    if bounds is None:
        return f"{value:.2f} (one block)"
    kind = FASTER if bounds[0] > 1 else SLOWER if bounds[1] < 1 else UNDECIDED
    return Marked(f"{value:.2f} ({bounds[0]:.2f}–{bounds[1]:.2f})", kind)


def same_tokens(run: Run) -> str:
    """Whether all answers were those of plain decoding."""
    return "yes" if run.get("identical") else "NO"


def said(
    run: Mapping[str, Any], name: str, digits: int, factor: float = 1.0, unit: str = ""
) -> str:
    """A number of a run as a cell."""
    value = number(run, name)
    return "–" if value is None else f"{factor * value:.{digits}f}{unit}"


def _told(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_told(v)}" for k, v in value.items())
    return (
        " ".join(map(str, value))
        if isinstance(value, list | tuple)
        else str("" if value is None else value)
    )


def _where(results: Results, run: Run) -> str:
    task = "" if run["task"] == POOLED else f", {run['task']} alone"
    return f"{results.names[run['policy']]}, batch {run['batch_size']}{task}"
