"""Draws a panel as inline SVG: colours are the page's CSS variables, so that it follows light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

from smart_decoding.bench.figures import NEUTRAL, Panel, Point, Series

COLOURS = 8  # of policies; then they repeat, with dashes
LETTER = 6.6  # width of a letter in pixels, about


@dataclass(frozen=True, slots=True)
class Axis:
    """From values to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (
            (math.log2(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return self.start + (self.end - self.start) * (at - low) / (high - low)


def draw(panel: Panel, width: int, height: int, tags: bool = False) -> str:
    """The panel in `width` x `height` pixels; `tags` names the lines at their ends."""
    right = 10 + max((LETTER * len(s.tag) for s in panel.series), default=0) if tags else 14
    x_ticks, y_ticks = ticks(panel)
    x = Axis(*_padded_x(panel), 52, width - right, panel.x_log)
    y = Axis(*_span_y(panel, y_ticks), height - 42, 28)
    parts = [*_grid(panel, x, y, x_ticks, y_ticks), *_reference(panel, x, y)]
    parts += [_band(series, x, y) for series in panel.series]
    parts += [part for series in panel.series for part in _marks(series, x, y)]
    parts += _tags(panel.series, x, y) if tags else []
    parts.append(_text(x((x.low * x.high) ** 0.5 if x.log else (x.low + x.high) / 2), height - 6, panel.x_label, "mid"))
    parts.append(_text(2, 12, panel.y_label, "label"))
    name = escape(f"{panel.title} {panel.y_label} against {panel.x_label}".strip())
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{name}">{"".join(parts)}</svg>'


def ticks(panel: Panel) -> tuple[list[float], list[float]]:
    """Where the axes are marked."""
    low, high = _x_range(panel)
    if panel.x_ticks:
        x = list(panel.x_ticks)
    elif panel.x_log:
        x = [2.0**e for e in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
    else:
        x = round_numbers(low, high)
    return x, round_numbers(*_y_range(panel))


def round_numbers(low: float, high: float, about: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that cover [low, high]."""
    rough = max(high - low, 1e-9) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def colour(series: Series) -> str:
    """The CSS variable of a series."""
    return "var(--muted)" if series.colour == NEUTRAL else f"var(--c{series.colour % COLOURS})"


def marker(series: Series, x: float, y: float, radius: float, note: str = "") -> str:
    """A circle, square, diamond or triangle, by the policy: colour alone does not tell them apart."""
    style = f'style="fill:{colour(series)}" class="mark"'
    title = f"<title>{escape(note)}</title>" if note else ""
    r = radius
    shapes: Sequence[Callable[[], str]] = (
        lambda: f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}" {style}>{title}</circle>',
        lambda: _polygon([(-r, -r), (r, -r), (r, r), (-r, r)], x, y, 0.88, style, title),
        lambda: _polygon([(0, -r), (r, 0), (0, r), (-r, 0)], x, y, 1.3, style, title),
        lambda: _polygon([(0, -r), (r, r * 0.8), (-r, r * 0.8)], x, y, 1.2, style, title),
    )
    return shapes[max(series.colour, 0) % len(shapes)]()


def _polygon(corners: Iterable[tuple[float, float]], x: float, y: float, size: float, style: str, title: str) -> str:
    points = " ".join(f"{x + size * dx:.1f},{y + size * dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{points}" {style}>{title}</polygon>'


def _grid(panel: Panel, x: Axis, y: Axis, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> list[str]:
    parts = []
    for value in y_ticks:
        parts.append(_line(x.start, y(value), x.end, y(value), "grid"))
        parts.append(_text(x.start - 8, y(value) + 4, f"{value:g}", "end"))
    return parts + [_text(x(value), y.start + 18, f"{value:g}", "mid") for value in x_ticks if x.low <= value <= x.high]


def _reference(panel: Panel, x: Axis, y: Axis) -> list[str]:
    if panel.diagonal:
        low, high = max(x.low, y.low), min(x.high, y.high)
        return [_line(x(low), y(low), x(high), y(high), "level")]
    if panel.level is None:
        return []
    value, name = panel.level
    at, parts = y(value), []
    below = y.start - at > 40  # room for the name under the line, where fewer lines pass
    if y.low < value:
        parts.append(f'<rect x="{x.start:.1f}" y="{at:.1f}" width="{x.end - x.start:.1f}" '
                     f'height="{y.start - at:.1f}" class="below"/>')  # fmt: skip
    return [
        *parts,
        _line(x.start, at, x.end, at, "level"),
        _text(x.start + 6, y.start - 8 if below else at - 6, name, "label"),
    ]


def _band(series: Series, x: Axis, y: Axis) -> str:
    """The band of the interval over stretches of points that have one; whiskers where a point stands alone."""
    parts = []
    for run in _stretches(series.points if series.line else ()):
        if len(run) == 1:
            ((p, bounds),) = run
            parts.append(f'<line x1="{x(p.x):.1f}" x2="{x(p.x):.1f}" y1="{y(bounds[0]):.1f}" y2="{y(bounds[1]):.1f}" '
                         f'style="stroke:{colour(series)}" class="whisker"/>')  # fmt: skip
        else:
            edge = [(x(p.x), y(b[1])) for p, b in run] + [(x(p.x), y(b[0])) for p, b in reversed(run)]
            points = " ".join(f"{a:.1f},{b:.1f}" for a, b in edge)
            parts.append(f'<polygon points="{points}" style="fill:{colour(series)}" class="band"/>')
    return "".join(parts)


def _stretches(points: Sequence[Point]) -> list[list[tuple[Point, tuple[float, float]]]]:
    runs: list[list[tuple[Point, tuple[float, float]]]] = [[]]
    for point in points:
        if point.y_range is None:
            runs.append([])
        else:
            runs[-1].append((point, point.y_range))
    return [run for run in runs if run]


def _marks(series: Series, x: Axis, y: Axis) -> list[str]:
    parts = []
    if series.line and len(series.points) > 1:
        points = " ".join(f"{x(p.x):.1f},{y(p.y):.1f}" for p in series.points)
        dashes = ' stroke-dasharray="7 4"' if series.colour >= COLOURS else ""
        parts.append(f'<polyline points="{points}" style="stroke:{colour(series)}" class="line"{dashes}/>')
    for p in series.points if series.markers else ():
        if p.x_range is not None:
            parts.append(f'<line x1="{x(p.x_range[0]):.1f}" x2="{x(p.x_range[1]):.1f}" y1="{y(p.y):.1f}" '
                         f'y2="{y(p.y):.1f}" style="stroke:{colour(series)}" class="whisker"/>')  # fmt: skip
        parts.append(marker(series, x(p.x), y(p.y), 2 + 3 * math.sqrt(max(p.weight, 0.0)), p.note))
        if p.label:
            parts.append(_text(x(p.x), y(p.y) - 10, p.label, "mid"))
    return parts


def _tags(series: Sequence[Series], x: Axis, y: Axis) -> list[str]:
    """Names beside the last points, moved apart where they would overlap."""
    wanted = sorted(((y(s.points[-1].y), s) for s in series if s.tag), key=lambda pair: pair[0])
    parts, last = [], -math.inf
    for at, one in wanted:
        last = max(at, last + 15)
        left = x(one.points[-1].x) + 10
        parts.append(f'<text x="{left:.1f}" y="{last + 4:.1f}" style="fill:{colour(one)}" class="tag">'
                     f"{escape(one.tag)}</text>")  # fmt: skip
    return parts


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(text)}</text>'


def _x_range(panel: Panel) -> tuple[float, float]:
    values = [p.x for s in panel.series for p in s.points] + list(panel.x_ticks)
    values += [v for s in panel.series for p in s.points for v in p.x_range or ()]
    return min(values), max(values)


def _padded_x(panel: Panel) -> tuple[float, float]:
    low, high = _x_range(panel)
    if panel.x_log:
        margin = (high / low) ** 0.05 if high > low else 2.0
        return low / margin, high * margin
    margin = 0.04 * (high - low) or 1.0
    return low - margin, high + margin


def _y_range(panel: Panel) -> tuple[float, float]:
    values = [v for s in panel.series for p in s.points for v in (p.y, *(p.y_range or ()))]
    values += [0.0] if panel.from_zero else []
    values += [panel.level[0]] if panel.level else []
    values += [1.0] if panel.diagonal else []
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _span_y(panel: Panel, marked: Sequence[float]) -> tuple[float, float]:
    low, high = _y_range(panel)
    return min(low, marked[0]), max(high, marked[-1])
