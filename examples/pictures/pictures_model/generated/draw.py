"""Draws a generated picture with PIL: a pure function of its facts and the size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from pictures_model.generated.facts import COLOURS, MAX_HEIGHT, Bar, Chart, Number, Picture, Scene
from smart_decoding.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

Box: TypeAlias = tuple[float, float, float, float]

CHART_LEFT = 0.1
CHART_RIGHT = 0.96
CHART_TOP = 0.06
CHART_BASE = 0.92
_OVERSAMPLING = 2
_AXIS = (60, 60, 60)
_GRID = (205, 205, 205)


def draw(picture: Picture, size: int = 96) -> Image.Image:
    """The picture in RGB, `size` pixels wide and high."""
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise ConfigError(
            "pictures need Pillow: in the clone, pip install -e '.[vision]'"
        ) from error
    side = size * _OVERSAMPLING
    image = Image.new("RGB", (side, side), picture.background)
    canvas = ImageDraw.Draw(image)
    if isinstance(picture, Scene):
        _draw_scene(canvas, picture, side)
    elif isinstance(picture, Number):
        _draw_number(canvas, picture, side)
    else:
        _draw_chart(canvas, picture, side)
    return image.reduce(_OVERSAMPLING)


def bar_box(chart: Chart, index: int) -> Box:
    """Where a bar lies: left, top, right, bottom."""
    slot = (CHART_RIGHT - CHART_LEFT) / len(chart.bars)
    middle = CHART_LEFT + slot * (index + 0.5)
    half = min(slot, 0.3) * chart.fill / 2
    return middle - half, _level(chart.bars[index].height), middle + half, CHART_BASE


def _level(height: int) -> float:
    return CHART_BASE - (CHART_BASE - CHART_TOP) * height / MAX_HEIGHT


def _draw_chart(canvas: ImageDraw.ImageDraw, chart: Chart, side: int) -> None:
    line = max(1, side // 96)
    for height in range(1, MAX_HEIGHT + 1):
        y = round(_level(height) * side)
        canvas.line((CHART_LEFT * side, y, CHART_RIGHT * side, y), _GRID, line)
    for index, bar in enumerate(chart.bars):
        canvas.rectangle([round(part * side) for part in bar_box(chart, index)], fill=bar.rgb)
    corner = (round(CHART_LEFT * side), round(CHART_BASE * side))
    canvas.line((corner[0], CHART_TOP * side, *corner), _AXIS, line)
    canvas.line((*corner, CHART_RIGHT * side, corner[1]), _AXIS, line)


def _draw_number(canvas: ImageDraw.ImageDraw, number: Number, side: int) -> None:
    from PIL import ImageFont

    font = ImageFont.load_default(number.size * side)
    for digit, (x, y) in zip(number.digits, number.centres, strict=True):
        canvas.text((x * side, y * side), digit, number.rgb, font, anchor="mm")


def _draw_scene(canvas: ImageDraw.ImageDraw, scene: Scene, side: int) -> None:
    for thing in scene.things:
        x, y = (part * side for part in thing.centre)
        _SHAPES[thing.shape](canvas, x, y, thing.radius * side, thing.rgb)


def _circle(
    canvas: ImageDraw.ImageDraw, x: float, y: float, r: float, rgb: tuple[int, int, int]
) -> None:
    canvas.ellipse((x - r, y - r, x + r, y + r), fill=rgb)


def _ring(
    canvas: ImageDraw.ImageDraw, x: float, y: float, r: float, rgb: tuple[int, int, int]
) -> None:
    canvas.ellipse((x - r, y - r, x + r, y + r), outline=rgb, width=round(0.38 * r))


def _cross(
    canvas: ImageDraw.ImageDraw, x: float, y: float, r: float, rgb: tuple[int, int, int]
) -> None:
    arm = 0.33 * r
    canvas.rectangle((x - r, y - arm, x + r, y + arm), fill=rgb)
    canvas.rectangle((x - arm, y - r, x + arm, y + r), fill=rgb)


def _polygon(*corners: tuple[float, float]) -> Callable[..., None]:
    """A shape with corners given in radii from the centre."""

    def fill(
        canvas: ImageDraw.ImageDraw, x: float, y: float, r: float, rgb: tuple[int, int, int]
    ) -> None:
        canvas.polygon([(x + r * dx, y + r * dy) for dx, dy in corners], fill=rgb)

    return fill


def _star_corners() -> list[tuple[float, float]]:
    radii = (1.15, 0.45)
    angles = [math.pi * i / 5 for i in range(10)]
    return [(radii[i % 2] * math.sin(a), -radii[i % 2] * math.cos(a)) for i, a in enumerate(angles)]


_SHAPES: dict[str, Callable[..., None]] = {
    "circle": _circle,
    "ring": _ring,
    "cross": _cross,
    "square": _polygon((-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)),
    "triangle": _polygon((0, -1), (1, 0.85), (-1, 0.85)),
    "diamond": _polygon((0, -1.15), (0.8, 0), (0, 1.15), (-0.8, 0)),
    "star": _polygon(*_star_corners()),
}


def example_chart() -> Chart:
    """The chart of the README's command."""
    colours = {"blue": 4, "red": 8, "green": 6, "orange": 3}
    bars = tuple(Bar(name, height, COLOURS[name]) for name, height in colours.items())
    return Chart(bars, (255, 255, 255), 0.7)
