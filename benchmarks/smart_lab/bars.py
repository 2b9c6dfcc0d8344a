"""Bars of tokens per second by CPU and load, as an SVG file that follows the reader's dark mode.

Needed by `results`, which writes docs/images/speeds.svg for docs/results.md.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

# Title of a panel, and the run that it shows.
PANELS = (
    ("AVX-512 (Zen 5)", "zen5/2026-12-02-gguf.json"),
    ("AVX2 alone (the same CPU)", "zen5/2026-12-01-gguf-avx2.json"),
)
# Name in the legend, contestants whose best is shown, colour.
BARS = (
    ("llama.cpp, tuned", "llama.cpp ", "#8c9198"),
    ("SMART without drafts", "auto plain", "#7fb0e6"),
    ("SMART with drafts", "auto smart", "#1f6fd0"),
)
PANEL, HEIGHT, TOP, BOTTOM, BAR, GAP = 430, 280, 64, 40, 34, 22  # pixels
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#1f2328}.t{font-weight:600}.m{text-anchor:middle}"
    "line{stroke:#8c919866}@media(prefers-color-scheme:dark){text{fill:#e6edf3}}"
)


def speeds(path: Path) -> dict[int, list[float]]:
    """Return of a run of `gguf-speed`: requests at once -> tokens per second of each of `BARS`,
    prompts included."""
    found = {}
    for run in json.loads(path.read_text(encoding="utf-8"))["runs"]:
        rates = {each["name"]: each["overall"][0] for each in run["contestants"]}
        found[run["slots"]] = [
            max(rate for name, rate in rates.items() if name.startswith(who)) for _, who, _ in BARS
        ]
    return found


def drawn(folder: Path, panels: Sequence[tuple[str, str]] = PANELS) -> str:
    """Return the picture of runs in a folder."""
    found = [(title, speeds(folder / name)) for title, name in panels]
    most = max(rate for _, of in found for rates in of.values() for rate in rates)
    scale = (HEIGHT - TOP - BOTTOM - 18) / most
    width = PANEL * len(found)
    size = f'width="{width}" height="{HEIGHT}" viewBox="0 0 {width} {HEIGHT}"'
    told = "Tokens per second by CPU and requests at once"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{told}">',
        f"<style>{STYLE}</style>",
    ]
    for number, (name, _, colour) in enumerate(BARS):
        x = 12 + 220 * number
        lines.append(f'<rect x="{x}" y="8" width="13" height="13" rx="2" fill="{colour}"/>')
        lines.append(_text(x + 20, 19, name))
    for number, (title, of) in enumerate(found):
        lines += _panel(PANEL * number, title, of, scale)
    return "\n".join([*lines, "</svg>\n"])


def _panel(left: int, title: str, of: dict[int, list[float]], scale: float) -> list[str]:
    floor = HEIGHT - BOTTOM
    lines = [_text(left + 12, 48, f"{title}: tokens per second", "t")]
    lines.append(f'<line x1="{left + 12}" y1="{floor}" x2="{left + PANEL - 16}" y2="{floor}"/>')
    x = left + 12 + GAP // 2
    for slots, rates in of.items():
        for (_, _, colour), rate in zip(BARS, rates, strict=True):
            high = round(rate * scale)
            box = f'x="{x}" y="{floor - high}" width="{BAR - 2}" height="{high}"'
            lines.append(f'<rect {box} rx="2" fill="{colour}"/>')
            lines.append(_text(x + BAR // 2 - 1, floor - high - 5, f"{rate:.0f}", "m"))
            x += BAR
        lines.append(_text(x - BAR * len(rates) // 2, floor + 18, _load(slots), "m"))
        x += GAP
    return lines


def _load(slots: int) -> str:
    return "1 request" if slots == 1 else f"{slots} at once"


def _text(x: Any, y: Any, text: str, kind: str = "") -> str:
    mark = f' class="{kind}"' if kind else ""
    return f'<text x="{x}" y="{y}"{mark}>{escape(text)}</text>'
