"""The terminal's tables of what only the laboratory measures, after those of `smart bench`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from smart_decoding.bench import report
from smart_decoding.bench.report import Run, aligned, ratio, runs_table, shown


def everything(result: Mapping[str, Any], in_markdown: bool = False) -> str:
    """All tables of a result, each part under its name."""
    parts = []
    if result.get("acceptance"):
        model = result["provenance"]["weights"]["model"]
        parts.append(
            f"{str(result['acceptance']).upper()}: compute is real, tokens are a recording's ({model})"
        )
    parts.append(report.everything(result, in_markdown))
    parts.append(runs_table(result.get("variant_runs"), "one ingredient exchanged\n", in_markdown))
    parts.append(runs_table(result.get("suite_runs"), "long contexts and edits\n", in_markdown))
    parts += [replay_table(result["replayed"])] if result.get("replayed") else []
    parts += [peer_table(result["peers"])] if result.get("peers") else []
    return "\n\n".join(filter(None, parts))


def replay_table(replayed: Mapping[str, Any]) -> str:
    """Speedups by replay at every batch size."""
    sizes = list(replayed)
    rows: list[Sequence[str]] = [("by replay, not live", *sizes)]
    for part in ("gap", "ablations"):
        names = [
            name for name, value in replayed[sizes[0]][part].items() if isinstance(value, float)
        ]
        rows += [
            (name, *(shown(replayed[size][part][name], 2) for size in sizes)) for name in names
        ]
    return "\n".join(aligned(rows))


def peer_table(peers: Sequence[Run]) -> str:
    """Other engines beside ours, both in turn on the same prompts; who failed, and why."""
    head = (
        "engine",
        "precision",
        "b",
        "tok/s",
        "ours plain",
        "ours smart",
        "smart / peer (95 %)",
        "same",
    )
    rows: list[Sequence[str]] = [head]
    lines = []
    for peer in peers:
        for run in peer.get("runs", ()):
            rates = [shown(run[f"{who}tokens_per_s"], 1) for who in ("", "plain_", "smart_")]
            rows.append(
                (
                    f"{peer['name']} {peer['version']}",
                    peer["precision"],
                    str(run["batch_size"]),
                    *rates,
                    ratio(run),
                    f"{100 * run['same']:.0f} %",
                )
            )
            if run["speedup"] is not None and run["speedup"] < 1:
                lines.append(f"{peer['name']} is FASTER than smart at batch {run['batch_size']}")
        if peer.get("error"):
            lines.append(f"{peer['name']}: {peer['error']}")
    told = "peers: decode-only tokens/s, answers of a fixed length; 'same': of the peer's tokens, those that ours has too"
    return "\n".join([told, *aligned(rows), *lines])
