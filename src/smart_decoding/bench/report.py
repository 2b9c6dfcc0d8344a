"""The table of a benchmark, for the terminal, and its verdict in a sentence or two."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from smart_decoding.bench.options import BASELINE, OURS

if TYPE_CHECKING:
    from smart_decoding.bench.results import Results, Row
    from smart_decoding.measuring.statistics import Ratio

WIDTH = 100  # of a terminal
UNKNOWN = "-"
PARTIAL = "Partial: the time limit came before all blocks had run."


def everything(results: Results) -> str:
    """Return warnings, the table, and what follows from it."""
    rows = results.rows
    parts = ["\n".join([*table(rows), *differing(rows)]), *verdict(rows)]
    if any(row.partial for row in rows):
        parts.insert(0, PARTIAL)
    if results.plain_torch:
        parts.insert(0, f"plain torch, not the CPU kernels: {results.plain_torch}")
    return "\n\n".join(parts)


def table(rows: Sequence[Row]) -> list[str]:
    """Return a line for each policy and batch size; `smart / it` only where something is beside
    `smart`."""
    compared = any(row.smart_over for row in rows)
    head = ["policy", "b", "tok/s", "speedup (95 %)", "same", "tok/rnd", "blocks"]
    if compared:
        head.append("smart / it (95 %)")
    cells = [
        [
            row.policy,
            str(row.batch_size),
            UNKNOWN if math.isnan(row.tokens_per_s) else f"{row.tokens_per_s:.1f}",
            said(row.speedup),
            "NO" if row.differing else "yes",
            f"{row.tokens_per_round:.2f}",
            str(row.blocks),
            *([said(row.smart_over) if row.smart_over else UNKNOWN] if compared else []),
        ]
        for row in rows
    ]
    return aligned([head, *cells])


def differing(rows: Sequence[Row]) -> list[str]:
    """Return a line for each policy whose answers are not plain decoding's."""
    return [
        f"{row.policy}, batch {row.batch_size}: {100 * row.differing:.1f} % of answers differ from "
        "plain decoding's"
        for row in rows
        if row.differing
    ]


def verdict(rows: Sequence[Row]) -> list[str]:
    """Return what `smart`, else the first policy, gains at each batch size, and what follows: a
    text, or none where plain decoding ran alone."""
    policies = [row.policy for row in rows if row.policy != BASELINE]
    if not policies:
        return []
    policy = OURS if OURS in policies else policies[0]
    own = [row for row in rows if row.policy == policy]
    text = f"{policy} against plain decoding: {'; '.join(map(_gain, own))}."
    if any(_highest(row.speedup) < 1 for row in own):
        text += " Where it is slower, --policy off decodes plainly."
    elif policy == OURS:
        text += " smart run, chat and serve use it by default."
    return [textwrap.fill(text, WIDTH, break_on_hyphens=False)]


def _highest(ratio: Ratio) -> float:
    """Return the upper bound; of a single block the value."""
    return ratio.high if math.isfinite(ratio.high) else ratio.value


def _gain(row: Row) -> str:
    load = "with one request" if row.batch_size == 1 else f"with {row.batch_size} at once"
    ratio = row.speedup
    if not ratio.pairs:
        return f"{load} unknown"
    if math.isfinite(ratio.high) and ratio.low <= 1 <= ratio.high:
        return f"{load} no certain difference{bounds(ratio)}"
    return f"{load} {ratio.value:.2f} times as fast{bounds(ratio)}"


def said(ratio: Ratio) -> str:
    """1.35 (1.30-1.40)"""
    return f"{ratio.value:.2f}{bounds(ratio)}" if ratio.pairs else UNKNOWN


def bounds(ratio: Ratio) -> str:
    """(1.30-1.40), or "(one block)"."""
    return " (one block)" if math.isinf(ratio.high) else f" ({ratio.low:.2f}-{ratio.high:.2f})"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns two spaces apart, the first to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return lines
