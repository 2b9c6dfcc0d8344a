"""What the lower half of the vision tower learns: words for each patch of a picture.

A patch that shows something is labelled with the words for it, every other patch with words for the
whole picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pictures_model.generated.draw import Box, bar_box
from pictures_model.generated.facts import (
    COLOURS,
    COLUMNS,
    COUNT_WORDS,
    ROWS,
    SHAPES,
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


WORDS = (*COLOURS, *SHAPES, *dict.fromkeys((*ROWS, *COLUMNS)), *DIGITS, *ORDER, *COUNT_WORDS[1:])
WORDS = (*WORDS, "bar", "shapes", "digits", "bars")


def patch_labels(picture: Picture, grid: int) -> NDArray[np.float32]:
    """Which words each patch shows, 0 or 1: [grid * grid, words]."""
    index = {word: i for i, word in enumerate(WORDS)}
    labels = np.zeros((grid * grid, len(WORDS)), np.float32)
    found = regions(picture)
    whole = [index[word] for word in overall(picture)]
    for patch in range(grid * grid):
        box = _around(
            ((patch % grid + 0.5) / grid, (patch // grid + 0.5) / grid), 0.5 / grid, 0.5 / grid
        )
        areas = [_overlap(box, region.box) for region in found]
        best = int(np.argmax(areas))
        shown = areas[best] > 0.15 / grid**2
        labels[patch, [index[word] for word in found[best].words] if shown else whole] = 1
    return labels


def _around(centre: tuple[float, float], across: float, down: float) -> Box:
    return centre[0] - across, centre[1] - down, centre[0] + across, centre[1] + down


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
