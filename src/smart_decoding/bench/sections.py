"""Sections of a report, built once: shown as aligned text on a terminal, and otherwise by the
laboratory's pages."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

FASTER, SLOWER, UNDECIDED = "faster", "slower", "undecided"
WIDTH = 100  # of a terminal
ASCII = str.maketrans("–×", "-x")


@dataclass(frozen=True, slots=True)
class Marked:
    """Text that is coloured by its kind: FASTER, SLOWER or another class of the style sheet."""

    text: str
    kind: str


@dataclass(frozen=True, slots=True)
class RatioCell:
    """A speedup with its interval: both bounds, the lower alone of one block, or none."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def kind(self) -> str:
        """FASTER or SLOWER only where the whole interval says so."""
        if self.low is None or self.high is None:
            return UNDECIDED
        return FASTER if self.low > 1 else SLOWER if self.high < 1 else UNDECIDED

    @property
    def text(self) -> str:
        """1.35 (1.30–1.40)"""
        return f"{self.value:.2f}{self.bounds}"

    @property
    def bounds(self) -> str:
        """(1.30–1.40), or what stands in its place."""
        if self.low is None:
            return ""
        return " (one block)" if self.high is None else f" ({self.low:.2f}–{self.high:.2f})"


Cell = str | Marked | RatioCell
UNKNOWN = "–"


@dataclass(frozen=True, slots=True)
class Section:
    """One part of a report, from top to bottom; what is empty is not shown.

    missing: why there is nothing; drawings: SVG elements; head, rows: a table; lines: a list;
    captions: how to read it; facts: names with what is known."""

    key: str
    title: str
    missing: str = ""
    intro: str = ""
    command: str = ""
    drawings: Sequence[str] = ()
    head: Sequence[str] = ()
    rows: Sequence[Sequence[Cell]] = ()
    lines: Sequence[str | Marked] = ()
    captions: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)


def as_text(section: Section) -> str:
    """For a terminal: title, table, list and captions."""
    parts = [section.title] if section.title else []
    if section.rows:
        parts += aligned([section.head, *([text_of(cell) for cell in row] for row in section.rows)])
    for text in (*map(text_of, section.lines), *section.captions):
        parts.append(textwrap.fill(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False))
    return "\n".join(parts).translate(ASCII)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns two spaces apart, the first to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return lines


def text_of(cell: Cell) -> str:
    """Without its colour."""
    return cell if isinstance(cell, str) else cell.text


def ratio_cell(run: Mapping[str, Any] | None, name: str = "speedup") -> Cell:
    """A ratio of a run, with its interval."""
    value = None if run is None else number(run, name)
    if run is None or value is None:
        return UNKNOWN
    return RatioCell(value, number(run, f"{name}_low"), number(run, f"{name}_high"))


def said(
    run: Mapping[str, Any], name: str, digits: int, factor: float = 1.0, unit: str = ""
) -> str:
    """A number of a run as a cell."""
    value = number(run, name)
    return UNKNOWN if value is None else f"{factor * value:.{digits}f}{unit}"


def same_tokens(run: Mapping[str, Any]) -> str:
    """Whether all answers were those of plain decoding."""
    return "yes" if run.get("identical") else "NO"


def number(run: Mapping[str, Any], name: str) -> float | None:
    """A finite number of a run, or None."""
    value = run.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None
