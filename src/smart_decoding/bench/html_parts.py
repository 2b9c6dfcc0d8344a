"""Sections of the page about its further parts: a second temperature, load, and other engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from smart_decoding.bench.options import BASELINE
from smart_decoding.bench.report import Run, short_names
from smart_decoding.bench.results import FASTER, SLOWER, Results, interval, number, verdict
from smart_decoding.bench.summary import POOLED


def sampled_section(results: Results) -> str:
    """Speedups at the second temperature."""
    heat = number(results.sampled[0], "temperature") if results.sampled else None
    title = f"At temperature {heat:g}" if heat is not None else "At another temperature"
    return _speedups("sampled", title, [run for run in results.sampled if run["task"] == POOLED])


def suites_section(results: Results) -> str:
    """Long contexts and edits, task by task."""
    return _speedups("suites", "Long contexts and edits", [run for run in results.suites if run["task"] != POOLED])


def _speedups(key: str, title: str, all_runs: Sequence[Run]) -> str:
    runs = [run for run in all_runs if run["policy"] != BASELINE]
    if not runs:
        return ""
    names = short_names(runs)
    rows = [(names[run["policy"]], str(run["batch_size"]), str(run["task"]), _ratio(run),
             "yes" if run.get("identical") else "NO") for run in runs]  # fmt: skip
    return _section(key, title, ("policy", "batch", "task", "speedup", "same tokens"), rows,
                    [(3, [verdict(run) for run in runs])])  # fmt: skip


def variants_section(results: Results) -> str:
    """`smart` with one ingredient exchanged, live."""
    runs = [run for run in results.variants if run["task"] == POOLED and run["policy"] != BASELINE]
    if not runs:
        return ""
    names = short_names(runs)
    rows = [(names[run["policy"]], str(run["batch_size"]), _ratio(run), _shown(run, "levels_per_round", 2),
             _shown(run, "rows_per_round", 1)) for run in runs]  # fmt: skip
    told = (
        "Measured live, not by replay. all_levels: never stops before eight levels; cheap_costs: starts from a "
        "profile in which rows cost a fifth and levels a quarter of what they do; kept: and never corrects it."
    )
    return _section("variants", "Ablations confirmed live", ("policy", "batch", "speedup", "levels", "rows"), rows,
                    [(2, [verdict(run) for run in runs])], told)  # fmt: skip


def replayed_section(results: Results) -> str:
    """The replay's numbers, and the published rule's sweep."""
    if not results.replayed:
        return ""
    sizes = sorted(results.replayed, key=int)
    rows = []
    for part in ("gap", "ablations"):
        names = [name for name, value in results.replayed[sizes[0]][part].items() if isinstance(value, float)]
        for name in names if part == "gap" else names[1:]:
            rows.append((name, *(_shown(results.replayed[size][part], name, 2) for size in sizes)))
    best = [f"batch {size}: {results.replayed[size]['gap'].get('best fixed is', '?')}" for size in sizes]
    paper = [f"batch {size}: {_paper(results.replayed[size].get('paper'))}" for size in sizes]
    told = (
        f"Best fixed setting: {'; '.join(best)}. smart_paper's best of 60, its default's neighbour, its worst: "
        f"{'; '.join(paper)}."
    )
    return _section("replayed", "By replay, in numbers", ("speedup at batch", *sizes), rows, caption=told)


def _paper(rows: Any) -> str:
    try:
        best, near, worst = rows
        return (f"{best['speedup']:.2f} (alpha {best['alpha']:g}, budget {best['budget']}, {best['family']} costs), "
                f"{near['speedup']:.2f}, {worst['speedup']:.2f}")  # fmt: skip
    except (TypeError, ValueError, KeyError):
        return "unknown"


def load_section(results: Results) -> str:
    """The table of requests that arrive at random."""
    runs: Sequence[Run] = results.load.get("runs", ())
    if not runs:
        return ""
    head = ("policy", "load", "requests/s", "tokens/s", "TTFT p50", "p95", "p99", "TPOT p50", "p95", "p99", "TPOT ×",
            "same tokens")  # fmt: skip
    names = short_names(runs)
    rows = [
        ("plain decoding" if run["policy"] == BASELINE else names[run["policy"]], f"{100 * run['load']:.0f} %",
         _shown(run, "requests_per_s", 2), _shown(run, "tokens_per_s", 0), *_times(run, "ttft_ms", 0),
         *_times(run, "tpot_ms", 1), _shown(run, "tpot_ratio", 2), "yes" if run.get("identical") else "NO")
        for run in runs
    ]  # fmt: skip
    capacity = [_shown(results.load, f"capacity_{what}_per_s", d) for what, d in (("requests", 2), ("tokens", 0))]
    told = (
        f"Milliseconds. Capacity: {capacity[0]} requests/s, {capacity[1]} tokens/s, with "
        f"{results.load.get('slots', '?')} requests at once and a queue that is never empty. TPOT ×: the median "
        "request's time per token over plain decoding's, below 1 is faster."
    )
    return _section("load-table", "Under load, in numbers", head, rows, caption=told)


def peer_section(results: Results) -> str:
    """Other engines; where one is faster the cell is red, and a line says so."""
    if not results.peers:
        return ""
    head = ("engine", "version", "precision", "batch", "tokens/s", "ours, plain", "ours, smart", "ours plain / it",
            "ours smart / it", "same tokens")  # fmt: skip
    runs = [(peer, run) for peer in results.peers for run in _runs(peer)]
    rows = [
        (str(peer["name"]), str(peer.get("version", "?")), str(peer.get("precision", "?")), str(run.get("batch_size")),
         _shown(run, "tokens_per_s", 0), _shown(run, "plain_tokens_per_s", 0), _shown(run, "smart_tokens_per_s", 0),
         _ratio(run, "plain_speedup"), _ratio(run), _shown(run, "same", 0, 100, " %"))
        for peer, run in runs
    ]  # fmt: skip
    colours = [(7, [verdict_of(run, "plain_speedup") for _, run in runs]), (8, [verdict(run) for _, run in runs])]
    lines = [f"{peer['name']} is faster than ours at batch {run.get('batch_size')}: {_ratio(run)}"
             for peer, run in runs if (number(run, "speedup") or 1.0) < 1]  # fmt: skip
    lines += [f"{peer['name']}: {peer[what]}" for peer in results.peers for what in ("note", "error") if peer.get(what)]
    told = (
        "Decoding alone, answers of a fixed length, engines in turn on the same prompts. Above 1: ours is faster. "
        "Same tokens: the share of its answers before the first token that differs from ours (other kernels round "
        "otherwise, other precisions more so)."
    )
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return _section("peers", "Beside other engines", head, rows, colours, told, f"<ul>{items}</ul>" if items else "")


def verdict_of(run: Run, name: str) -> str:
    """FASTER or SLOWER where a ratio's whole interval says so, else nothing."""
    bounds = interval(run, name)
    return "" if bounds is None else FASTER if bounds[0] > 1 else SLOWER if bounds[1] < 1 else ""


def _section(
    key: str,
    title: str,
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    colours: Sequence[tuple[int, Sequence[str]]] = (),
    caption: str = "",
    more: str = "",
) -> str:
    """A table. colours: (column, class of each row's cell)."""
    classes = {(row, column): kind for column, kinds in colours for row, kind in enumerate(kinds)}
    body = []
    for i, (first, *others) in enumerate(rows):
        cells = (f'<td class="{classes.get((i, j), "")}">{escape(cell)}</td>' for j, cell in enumerate(others, 1))
        body.append(f"<tr><th>{escape(first)}</th>{''.join(cells)}</tr>")
    heads = "".join(f"<th>{escape(name)}</th>" for name in head)
    table = f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    told = f'<p class="caption">{escape(caption)}</p>' if caption else ""
    return f'<section id="{key}"><h2>{escape(title)}</h2>{table}{more}{told}</section>'


def _runs(peer: Mapping[str, Any]) -> list[Run]:
    runs = peer.get("runs")
    return [run for run in runs if isinstance(run, Mapping)] if isinstance(runs, Sequence) else []


def _ratio(run: Run, name: str = "speedup") -> str:
    value, bounds = number(run, name), interval(run, name)
    if value is None:
        return "–"
    return f"{value:.2f} ({bounds[0]:.2f}–{bounds[1]:.2f})" if bounds else f"{value:.2f}"


def _times(run: Run, kind: str, digits: int) -> list[str]:
    times = run.get(kind)
    return [_shown(times, p, digits) if isinstance(times, Mapping) else "–" for p in ("p50", "p95", "p99")]


def _shown(run: Mapping[str, Any], name: str, digits: int, factor: float = 1.0, unit: str = "") -> str:
    value = number(run, name)
    return "–" if value is None else f"{factor * value:.{digits}f}{unit}"
