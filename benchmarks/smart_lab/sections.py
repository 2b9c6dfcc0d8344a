"""Sections of a report, built once: aligned text on a terminal, Markdown on a page.

Needed by `bench`, `results` and `report`.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from smart_decoding.bench.report import WIDTH, aligned

ASCII = str.maketrans("–×", "-x")


@dataclass(frozen=True, slots=True)
class RatioCell:
    """A speedup with its interval: both bounds, only the lower one of a single block, or none."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def text(self) -> str:
        """1.35 (1.30–1.40)"""
        return f"{self.value:.2f}{self.bounds}"

    @property
    def bounds(self) -> str:
        """(1.30–1.40), or "(one block)", or nothing without bounds."""
        if self.low is None:
            return ""
        return " (one block)" if self.high is None else f" ({self.low:.2f}–{self.high:.2f})"


Cell = str | RatioCell
UNKNOWN = "–"


@dataclass(frozen=True, slots=True)
class Section:
    """One part of a report, from top to bottom; empty fields are not shown.

    head, rows: a table; lines: a list; captions: how to read it."""

    title: str
    head: Sequence[str] = ()
    rows: Sequence[Sequence[Cell]] = ()
    lines: Sequence[str] = ()
    captions: Sequence[str] = ()


def as_text(section: Section) -> str:
    """Return title, table, list and captions for a terminal."""
    parts = [section.title] if section.title else []
    if section.rows:
        parts += aligned([section.head, *([text_of(cell) for cell in row] for row in section.rows)])
    for text in (*section.lines, *section.captions):
        parts.append(textwrap.fill(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False))
    return "\n".join(parts).translate(ASCII)


def text_of(cell: Cell) -> str:
    """Return a cell as text."""
    return cell if isinstance(cell, str) else cell.text


def ratio_cell(run: Mapping[str, Any] | None, name: str = "speedup") -> Cell:
    """Return a ratio of a run, with its interval."""
    value = None if run is None else number(run, name)
    if run is None or value is None:
        return UNKNOWN
    return RatioCell(value, number(run, f"{name}_low"), number(run, f"{name}_high"))


def said(
    run: Mapping[str, Any], name: str, digits: int, factor: float = 1.0, unit: str = ""
) -> str:
    """Return a number of a run as a cell."""
    value = number(run, name)
    return UNKNOWN if value is None else f"{factor * value:.{digits}f}{unit}"


def number(run: Mapping[str, Any], name: str) -> float | None:
    """Return a finite number of a run, or None."""
    value = run.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None
