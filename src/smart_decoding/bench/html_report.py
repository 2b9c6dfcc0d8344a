"""One self-contained page about a benchmark: no scripts, nothing from outside, light and dark, readable on a phone.

It is also well-formed XML, so that a test can take it apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from smart_decoding.bench import svg
from smart_decoding.bench.figures import Figure, Series, figures
from smart_decoding.bench.html_parts import (
    load_section,
    peer_section,
    replayed_section,
    sampled_section,
    suites_section,
    variants_section,
)
from smart_decoding.bench.options import BASELINE
from smart_decoding.bench.report import Run, plain_torch, strongest
from smart_decoding.bench.results import FASTER, SLOWER, UNDECIDED, Results, interval, number, verdict
from smart_decoding.bench.style import CSS
from smart_decoding.bench.summary import POOLED

WORDS = {FASTER: "faster", SLOWER: "slower", UNDECIDED: "not decided"}
# Column -> (field, factor, digits): what a round did, per policy and batch size.
METRICS = {
    "tokens/s": ("tokens_per_s", 1, 1), "end to end ×": ("end_to_end_speedup", 1, 2),
    "tokens/round": ("tokens_per_round", 1, 2), "rows/round": ("rows_per_round", 1, 1),
    "wasted rows": ("wasted_rows", 1, 1), "levels/round": ("levels_per_round", 1, 2),
    "rounds off %": ("off_share", 100, 0), "controller %": ("controller_share", 100, 1),
    "verify ms": ("verify_ms", 1, 1), "draft ms": ("draft_ms", 1, 1), "GB/s": ("gb_per_s", 1, 1),
    "% of limit": ("gb_share", 100, 0), "GFLOP/s": ("gflop_per_s", 1, 0), "% of its limit": ("gflop_share", 100, 0),
    "peak GiB": ("peak_gib", 1, 2), "TTFT ms": ("ttft_ms", 1, 0), "TPOT ms": ("tpot_ms", 1, 1),
    "worst TPOT ×": ("worst_tpot_ratio", 1, 2),
}  # fmt: skip


def page(results: Results) -> str:
    """The whole document."""
    model = results.provenance.get("weights", {})
    name = str(model.get("model", "a model")) if isinstance(model, Mapping) else "a model"
    drawn = {figure.key: section(figure) for figure in figures(results)}
    parts = [f"<header><h1>Speculative decoding of {escape(name)}, measured</h1>{_setting(results)}</header>"]
    if results.runs:
        parts += [_tiles(results), drawn.pop("speedup"), _losses(results), _over(results), _by_task(results),
                  sampled_section(results)]  # fmt: skip
    parts += [
        suites_section(results),
        variants_section(results),
        peer_section(results),
        *drawn.values(),
        load_section(results),
    ]
    parts.append(replayed_section(results))
    parts += [_metrics(results), _noise(results)] if results.runs else []
    parts.append(_origin(results))
    return document(f"{name}: speculative decoding, measured", parts)


def document(title: str, parts: Sequence[str]) -> str:
    """A whole page of the given parts."""
    head = ('<meta charset="utf-8" /><meta name="viewport" content="width=device-width, initial-scale=1" />'
            '<meta name="color-scheme" content="light dark" />')  # fmt: skip
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}<title>{escape(title)}</title>'
        f"<style>{CSS}</style></head>\n<body><main>\n{chr(10).join(filter(None, parts))}\n</main></body></html>\n"
    )


def _setting(results: Results) -> str:
    """One line: where, how and when."""
    first, hardware = results.pooled[0] if results.pooled else {}, _mapping(results.provenance.get("hardware"))
    device = hardware.get("gpu") or hardware.get("cpu") or "unknown processor"
    cores = f", {hardware['cores']} cores" if hardware.get("cores") else ""
    known = (first.get("dtype"), f"temperature {first['temperature']:g}" if number(first, "temperature") is not None
             else None, str(results.provenance.get("time", ""))[:10])  # fmt: skip
    line = f'<p class="sub">{escape(f"{device}{cores}")} · {escape(" · ".join(str(k) for k in known if k))}</p>'
    partial = any(run.get("partial") for run in results.runs)
    slow = plain_torch(results.provenance)
    line += f'<p class="warn">{escape(slow)}</p>' if slow else ""
    return line + ('<p class="warn">Partial: the time limit came before all blocks had run.</p>' if partial else "")


def _tiles(results: Results) -> str:
    """Best and worst of all, the verdicts of each policy, and the noise to judge them by."""
    runs = [run for run in results.contestants if number(run, "speedup") is not None]
    if not runs:
        return ""
    best, worst = (pick(runs, key=lambda run: run["speedup"]) for pick in (max, min))
    tiles = _smart_tile(runs)
    tiles.append(_tile(f"{best['speedup']:.2f}×", f"best: {_where(results, best)}", verdict(best)))
    tiles.append(_tile(f"{worst['speedup']:.2f}×", f"worst: {_where(results, worst)}", verdict(worst)))
    noises = {run["batch_size"]: b for run in results.pooled if (b := interval(run, "noise")) is not None}
    if noises:
        size, (low, high) = max(noises.items(), key=lambda item: max(1 - item[1][0], item[1][1] - 1))
        told = f"plain decoding against itself, batch {size}: ratios this near to 1 may be noise"
        tiles.append(_tile(f"{low:.2f} – {high:.2f}×", told, ""))
    different = [run for run in results.contestants if run.get("identical") is False]
    told = f"of {len(results.contestants)} runs gave other tokens than plain decoding"
    tiles.append(_tile(str(len(different)), told, SLOWER if different else FASTER))
    return f'<section class="tiles">{"".join(tiles)}</section>'


def _smart_tile(runs: Sequence[Run]) -> list[str]:
    """The range of `smart`, if it ran."""
    ours = sorted((r for r in runs if r["policy"] == "smart"), key=lambda run: run["batch_size"])
    if not ours:
        return []
    low, high = (pick(run["speedup"] for run in ours) for pick in (min, max))
    verdicts = {verdict(run) for run in ours}
    all_in_all = SLOWER if SLOWER in verdicts else UNDECIDED if UNDECIDED in verdicts else FASTER
    told = f"smart, over batch sizes {', '.join(str(run['batch_size']) for run in ours)}"
    return [_tile(f"{low:.2f} – {high:.2f}×", told, all_in_all)]


def _tile(figure: str, words: str, kind: str) -> str:
    return f'<div class="tile {kind}"><b>{escape(figure)}</b><span>{escape(words)}</span></div>'


def section(figure: Figure) -> str:
    title = f"<h2>{escape(figure.title)}</h2>"
    if not figure.panels:
        return f'<section id="{figure.key}">{title}<p class="missing">{escape(figure.missing)}</p></section>'
    single = len(figure.panels) == 1 and not figure.panels[0].diagonal
    if single:  # drawn twice, since letters of a wide picture are too small on a phone
        (panel,) = figure.panels
        drawn = (f'<div class="wide">{svg.draw(panel, 860, 420, tags=True)}</div>'
                 f'<div class="narrow">{svg.draw(panel, 400, 320)}</div>')  # fmt: skip
        legend = _legend(panel.series)
    else:
        drawn = "".join(
            f'<div class="panel"><h3>{escape(panel.title)}</h3>{svg.draw(panel, 400, 300)}'
            f"{_legend(panel.series) if figure.apart else ''}</div>"
            for panel in figure.panels
        )
        drawn = f'<div class="panels">{drawn}</div>'
        legend = "" if figure.apart else _legend([s for panel in figure.panels for s in panel.series])
    return f'<section id="{figure.key}">{title}{legend}{drawn}<p class="caption">{escape(figure.caption)}</p></section>'


def _legend(series: Sequence[Series]) -> str:
    items = {}
    for one in series:
        mark = svg.marker(one, 8, 8, 5) if one.markers else (
            f'<line x1="0" y1="8" x2="16" y2="8" style="stroke:{svg.colour(one)}" class="line"/>')  # fmt: skip
        items[one.name] = f'<li><svg viewBox="0 0 16 16" aria-hidden="true">{mark}</svg>{escape(one.name)}</li>'
    return f'<ul class="legend">{"".join(items.values())}</ul>'


def _losses(results: Results) -> str:
    """All pooled runs below 1x and single tasks that are slower, the lowest first; where another policy beats smart."""
    below = [run for run in results.contestants if round(number(run, "speedup") or 1.0, 2) < 1.0]
    below += [run for run in results.runs if _slow_task(results, run)]
    lines = []
    for run in sorted(below, key=lambda run: run["speedup"]):
        told = f"<b>{run['speedup']:.2f}×</b> {_range(run)}, {WORDS[verdict(run)]}"
        lines.append(f'<li class="{verdict(run)}">{escape(_where(results, run))}: {told}</li>')
    lines += [f'<li class="beaten">{escape(line)}</li>' for line in _beaten(results)]
    told = f"<ul>{''.join(lines)}</ul>" if lines else "<p>No policy was below 1× at any batch size over all tasks.</p>"
    return f'<section id="losses"><h2>Where it loses</h2>{told}</section>'


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
        runs = [r for r in results.contestants if r["batch_size"] == size and number(r, "speedup") is not None]
        ours = next((r for r in runs if r["policy"].split("(")[0] == "smart"), None)
        best = max(runs, key=lambda run: run["speedup"], default=None)
        if ours is not None and best is not None and best["speedup"] > ours["speedup"]:
            lines.append(f"batch {size}: {results.names[best['policy']]} has {best['speedup']:.2f}×, "
                         f"more than {results.names[ours['policy']]}'s {ours['speedup']:.2f}×")  # fmt: skip
    return lines


def _over(results: Results) -> str:
    """`smart` beside the strongest setting of each other policy, block by block."""
    rows = []
    known = [r for r in results.runs if number(r, "speedup") is not None and number(r, "smart_over") is not None]
    for run in strongest(known):
        bounds = interval(run, "smart_over")
        kind = "" if bounds is None else FASTER if bounds[0] > 1 else SLOWER if bounds[1] < 1 else UNDECIDED
        told = f"({bounds[0]:.2f}–{bounds[1]:.2f})" if bounds else "(one block)"
        rows.append(f"<tr><th>{escape(results.names[run['policy']])}</th><td>{run['batch_size']}</td>"
                    f'<td class="{kind}"><b>{run["smart_over"]:.2f}</b> <small>{told}</small></td></tr>')  # fmt: skip
    heads = "<thead><tr><th>policy</th><th>batch</th><th>smart / it</th></tr></thead>"
    table = f'<div class="scroll"><table>{heads}<tbody>{"".join(rows)}</tbody></table></div>'
    title = "<h2>Beside the best of every other policy</h2>"
    return f'<section id="over">{title}{table}</section>' if rows else ""


def _by_task(results: Results) -> str:
    """Every speedup in a table, coloured by its verdict."""
    tasks = [POOLED, *results.tasks]
    rows = []
    for policy, name in results.names.items():
        for size in results.batch_sizes:
            cells = "".join(_cell(results.find(policy, size, task)) for task in tasks)
            rows.append(f"<tr><th>{escape(name)}</th><td>{size}</td>{cells}</tr>")
    heads = "".join(f"<th>{escape(task)}</th>" for task in ("policy", "batch", *tasks))
    long = [f"{short} = {full}" for full, short in results.names.items() if short != full]
    legend = f'<p class="caption">{escape("; ".join(long))}</p>' if long else ""
    told = (
        "Blue: faster than plain decoding; red: slower; no colour: the interval includes 1×, or one block alone was "
        "measured and there is none."
    )
    table = f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    return f'<section id="tasks"><h2>Speedup by task</h2>{table}<p class="caption">{told}</p>{legend}</section>'


def _cell(run: Run | None) -> str:
    if run is None or number(run, "speedup") is None:
        return "<td>–</td>"
    return f'<td class="{verdict(run)}"><b>{run["speedup"]:.2f}</b> <small>{_range(run)}</small></td>'


def _metrics(results: Results) -> str:
    """What a round did: only the columns that some run has."""
    shown = {name: how for name, how in METRICS.items() if any(number(r, how[0]) is not None for r in results.pooled)}
    rows = []
    for run in sorted(results.pooled, key=lambda run: run["batch_size"]):
        cells = "".join(f"<td>{_scaled(run, *how)}</td>" for how in shown.values())
        name = "plain decoding" if run["policy"] == BASELINE else results.names[run["policy"]]
        rows.append(f"<tr><th>{escape(name)}</th><td>{run['batch_size']}</td>{cells}</tr>")
    heads = "".join(f"<th>{escape(name)}</th>" for name in ("policy", "batch", *shown))
    told = (
        "Rows and wasted rows are the whole batch's, tokens one request's. GB/s: all weights and cached keys and "
        "values, read once in the mean time of a verifying forward; GFLOP/s: products with weights in that time; their "
        "limits: what this machine reached in a sum and in a matrix product of torch, in their best moment. Peak "
        "memory: of the process, over all policies of a batch size."
    )
    return (f'<section id="rounds"><h2>What a round did</h2><div class="scroll"><table><thead><tr>{heads}</tr></thead>'
            f'<tbody>{"".join(rows)}</tbody></table></div><p class="caption">{told}</p></section>')  # fmt: skip


def _noise(results: Results) -> str:
    """The baseline against itself."""
    lines = []
    for run in results.pooled:
        value, bounds = number(run, "noise"), interval(run, "noise")
        if value is not None:
            said = f"({bounds[0]:.3f} to {bounds[1]:.3f})" if bounds else "(one pair, no interval)"
            odd = bounds is not None and not bounds[0] <= 1 <= bounds[1]
            said += ": the interval excludes 1×, so other speedups at this batch size may be off as much" if odd else ""
            lines.append(f"<li>batch {run['batch_size']}: {value:.3f}× {said}</li>")
    told = f"<ul>{''.join(lines)}</ul>" if lines else '<p class="missing">The noise was not measured.</p>'
    return ('<section id="noise"><h2>Noise of this machine</h2><p>Plain decoding timed against itself, as a policy '
            f"would be; without noise this is 1×.</p>{told}</section>")  # fmt: skip


def _origin(results: Results) -> str:
    """The machine, the command, the versions."""
    origin, memory = results.provenance, results.memory
    command = str(origin.get("command") or "not recorded")
    hardware = _mapping(origin.get("hardware"))
    facts: dict[str, Any] = {
        "machine": ", ".join(f"{k} {_told(v)}" for k, v in hardware.items() if v not in (None, "", [])),
        "weights": _told(origin.get("weights")), "draft head": origin.get("head"), "seed": origin.get("seed"),
        "commit": origin.get("commit"), "time": origin.get("time"), "versions": _told(origin.get("versions")),
    }  # fmt: skip
    peak, gpu = number(memory, "peak_process_gib"), number(memory, "peak_gpu_gib")
    if peak is not None:
        facts["peak memory"] = f"{peak:.2f} GiB resident, of the whole process: all policies, batch sizes and loading"
    if gpu is not None:
        facts["peak GPU memory"] = f"{gpu:.2f} GiB allocated, of the whole process"
    for key, name in (("gb_per_s", "reading memory"), ("gflop_per_s", "matrix products")):
        if (rate := number(results.limits, key)) is not None:
            facts[f"best of {name}"] = f"{rate:.0f} {'GB/s' if key == 'gb_per_s' else 'GFLOP/s'}"
    for key, name in (("weights_gib", "weights"), ("kv_cache_gib", "KV cache")):
        if (size := number(memory, key)) is not None:
            facts[f"memory of {name}"] = f"{size:.2f} GiB"
    items = "".join(f"<dt>{k}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items() if v not in (None, ""))
    return (f'<section id="origin"><h2>The machine and the command</h2><pre>{escape(command)}</pre>'
            f"<dl>{items}</dl></section>")  # fmt: skip


def _told(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_told(v)}" for k, v in value.items())
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str("" if value is None else value)


def _where(results: Results, run: Run) -> str:
    task = "" if run["task"] == POOLED else f", {run['task']} alone"
    return f"{results.names[run['policy']]}, batch {run['batch_size']}{task}"


def _range(run: Run) -> str:
    bounds = interval(run)
    return f"({bounds[0]:.2f}–{bounds[1]:.2f})" if bounds else "(one block)"


def _scaled(run: Run, name: str, factor: float, digits: int) -> str:
    value = number(run, name)
    return "–" if value is None else f"{factor * value:.{digits}f}"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
