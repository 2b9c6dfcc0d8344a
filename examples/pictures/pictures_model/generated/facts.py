"""What is on a generated picture, drawn at random: shapes on a grid, a number, or a bar chart.

Lengths are shares of the picture's side, so that one picture can be drawn at any size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

Colour: TypeAlias = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (220, 30, 35),
    "green": (25, 150, 50),
    "blue": (35, 75, 215),
    "yellow": (245, 215, 25),
    "orange": (245, 135, 20),
    "purple": (125, 40, 165),
    "pink": (250, 145, 190),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "ring")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "middle", "right")
COUNT_WORDS = ("no", "one", "two", "three", "four", "five", "six")
MAX_HEIGHT = 9  # of a bar, in units of the chart's axis


@dataclass(frozen=True, slots=True)
class Thing:
    """A shape in one of the nine cells (0: top left, 8: bottom right)."""

    colour: str
    shape: str
    cell: int
    rgb: Colour
    centre: tuple[float, float]
    radius: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def place(self) -> str:
        row = ROWS[self.cell // 3]
        column = COLUMNS[self.cell % 3]
        return "centre" if row == column == "middle" else f"{row} {column}"


@dataclass(frozen=True, slots=True)
class Scene:
    """One to six shapes, in reading order."""

    things: tuple[Thing, ...]
    background: Colour


@dataclass(frozen=True, slots=True)
class Number:
    """One to three digits in a row; `centres` and `size` say where and how large."""

    digits: str
    colour: str
    rgb: Colour
    background: Colour
    centres: tuple[tuple[float, float], ...]
    size: float


@dataclass(frozen=True, slots=True)
class Bar:
    colour: str
    height: int
    rgb: Colour


@dataclass(frozen=True, slots=True)
class Chart:
    """Two to five bars of different colours and heights, from left to right."""

    bars: tuple[Bar, ...]
    background: Colour
    fill: float  # share of its slot that a bar takes

    @property
    def tallest(self) -> Bar:
        return max(self.bars, key=lambda bar: bar.height)

    @property
    def shortest(self) -> Bar:
        return min(self.bars, key=lambda bar: bar.height)


Picture: TypeAlias = Scene | Number | Chart


def random_picture(rng: np.random.Generator, kind: str | None = None) -> Picture:
    """A scene (half of all), a number or a chart."""
    kind = kind or str(rng.choice(["scene", "number", "chart"], p=[0.5, 0.2, 0.3]))
    if kind == "scene":
        return random_scene(rng)
    return random_number(rng) if kind == "number" else random_chart(rng)


def random_scene(rng: np.random.Generator, count: int | None = None) -> Scene:
    """A third of the scenes repeat few colours and shapes, so that there is something to count."""
    count = count or int(rng.integers(1, 7))
    few = rng.random() < 0.35
    colours = rng.choice(list(COLOURS), 2 if few else len(COLOURS), replace=False)
    shapes = rng.choice(SHAPES, 2 if few else len(SHAPES), replace=False)
    things = []
    for cell in sorted(rng.choice(9, count, replace=False).tolist()):
        colour = str(rng.choice(colours))
        shape = str(rng.choice(shapes))
        x = float((cell % 3 + 0.5) / 3 + rng.uniform(-0.03, 0.03))
        y = float((cell // 3 + 0.5) / 3 + rng.uniform(-0.03, 0.03))
        rgb = _shade(rng, colour)
        things.append(Thing(colour, shape, cell, rgb, (x, y), rng.uniform(0.09, 0.13)))
    return Scene(tuple(things), _paper(rng))


def random_number(rng: np.random.Generator) -> Number:
    length = int(rng.integers(1, 4))
    digits = "".join(str(digit) for digit in rng.integers(0, 10, length))
    digits = digits if digits[0] != "0" or length == 1 else str(rng.integers(1, 10)) + digits[1:]
    colour = str(rng.choice(list(COLOURS)))
    size = float(rng.uniform(0.42, 0.56))
    left = 0.5 - 0.31 * (length - 1) / 2 + rng.uniform(-0.02, 0.02)
    middle = rng.uniform(0.4, 0.6)
    centres = tuple(
        (float(left + 0.31 * i), float(middle + rng.uniform(-0.03, 0.03))) for i in range(length)
    )
    return Number(digits, colour, _shade(rng, colour), _paper(rng), centres, size)


def random_chart(rng: np.random.Generator, count: int | None = None) -> Chart:
    count = count or int(rng.integers(2, 6))
    colours = rng.choice(list(COLOURS), count, replace=False)
    heights = rng.choice(MAX_HEIGHT, count, replace=False) + 1
    bars = [Bar(str(c), int(h), _shade(rng, str(c))) for c, h in zip(colours, heights, strict=True)]
    return Chart(tuple(bars), _paper(rng), float(rng.uniform(0.55, 0.8)))


def _shade(rng: np.random.Generator, colour: str) -> Colour:
    r, g, b = (np.array(COLOURS[colour]) + rng.integers(-14, 15, 3)).clip(0, 255).tolist()
    return r, g, b


def _paper(rng: np.random.Generator) -> Colour:
    r, g, b = rng.integers(238, 256, 3).tolist()
    return r, g, b
