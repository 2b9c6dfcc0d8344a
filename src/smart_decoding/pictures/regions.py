"""What the vision tower learns first: words for each patch of a picture, and facts about the whole.

A patch that shows something is labelled with the words for it, every other patch with words for the whole picture.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from smart_decoding.pictures.draw import Box, bar_box
from smart_decoding.pictures.facts import (
    COLOURS,
    COLUMNS,
    COUNT_WORDS,
    MAX_HEIGHT,
    ROWS,
    SHAPES,
    Chart,
    Number,
    Picture,
    Scene,
)

ORDER = ("first", "second", "third", "fourth", "fifth")
DIGITS = tuple("0123456789")


@dataclass(frozen=True, slots=True)
class Region:
    box: Box
    words: tuple[str, ...]


def regions(picture: Picture) -> list[Region]:
    """The things on a picture: where they lie and the words for them."""
    if isinstance(picture, Scene):
        return [
            Region(
                _around(thing.centre, 1.1 * thing.radius, 1.1 * thing.radius),
                (thing.colour, thing.shape, ROWS[thing.cell // 3], COLUMNS[thing.cell % 3]),
            )
            for thing in picture.things
        ]
    if isinstance(picture, Number):
        half = picture.size / 2
        return [
            Region(_around(centre, 0.62 * half, 0.8 * half), (picture.colour, digit, place))
            for digit, centre, place in zip(picture.digits, picture.centres, ORDER, strict=False)
        ]
    return [
        Region(bar_box(picture, i), (bar.colour, "bar", str(bar.height), ORDER[i]))
        for i, bar in enumerate(picture.bars)
    ]


def overall(picture: Picture) -> tuple[str, ...]:
    """The words for the whole picture."""
    if isinstance(picture, Scene):
        return COUNT_WORDS[len(picture.things)], "shapes"
    if isinstance(picture, Number):
        return COUNT_WORDS[len(picture.digits)], "digits"
    return COUNT_WORDS[len(picture.bars)], "bars"


def facts(picture: Picture) -> list[str]:
    """What is true of the whole picture: counts, the tallest and shortest bar, heights and digits by place."""
    if isinstance(picture, Scene):
        counts = Counter(thing.colour for thing in picture.things) + Counter(thing.shape for thing in picture.things)
        return [f"{name}={count}" for name, count in counts.items()]
    if isinstance(picture, Number):
        return [f"{place}={digit}" for place, digit in zip(ORDER, picture.digits, strict=False)]
    ranked = sorted(picture.bars, key=lambda bar: bar.height)
    heights = [f"{place} bar={bar.height}" for place, bar in zip(ORDER, picture.bars, strict=False)]
    return [f"tallest={ranked[-1].colour}", f"shortest={ranked[0].colour}", *heights]


WORDS = (*COLOURS, *SHAPES, *dict.fromkeys((*ROWS, *COLUMNS)), *DIGITS, *ORDER, *COUNT_WORDS[1:])
WORDS = (*WORDS, "bar", "shapes", "digits", "bars")


@cache
def fact_names() -> dict[str, int]:
    """Every fact that can be true, with its index."""
    names = [f"{name}={count}" for name in (*COLOURS, *SHAPES) for count in range(1, len(COUNT_WORDS))]
    names += [f"{place}={digit}" for place in ORDER[:3] for digit in DIGITS]
    names += [f"{which}={colour}" for which in ("tallest", "shortest") for colour in COLOURS]
    names += [f"{place} bar={height}" for place in ORDER for height in range(1, MAX_HEIGHT + 1)]
    return {name: i for i, name in enumerate(names)}


def patch_labels(picture: Picture, grid: int) -> NDArray[np.float32]:
    """Which words each patch shows, 0 or 1: [grid * grid, words]."""
    index = {word: i for i, word in enumerate(WORDS)}
    labels = np.zeros((grid * grid, len(WORDS)), np.float32)
    found = regions(picture)
    whole = [index[word] for word in overall(picture)]
    for patch in range(grid * grid):
        box = _around(((patch % grid + 0.5) / grid, (patch // grid + 0.5) / grid), 0.5 / grid, 0.5 / grid)
        areas = [_overlap(box, region.box) for region in found]
        best = int(np.argmax(areas))
        shown = areas[best] > 0.15 / grid**2
        labels[patch, [index[word] for word in found[best].words] if shown else whole] = 1
    return labels


def fact_labels(picture: Picture) -> NDArray[np.float32]:
    """Which facts are true, 0 or 1: [facts]."""
    labels = np.zeros(len(fact_names()), np.float32)
    labels[[fact_names()[fact] for fact in facts(picture)]] = 1
    return labels


def _around(centre: tuple[float, float], across: float, down: float) -> Box:
    return centre[0] - across, centre[1] - down, centre[0] + across, centre[1] + down


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


__all__ = ["WORDS", "Chart", "fact_labels", "fact_names", "facts", "overall", "patch_labels", "regions"]
