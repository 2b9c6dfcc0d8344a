"""A picture in 36 words, nine groups of four: what the vision tower learns to say, one word per
patch position.

The words are said in the language model's own embeddings, so that a picture reads like text from
the start. A shape's and a colour's word is said together with, more quietly, the word for how many
of them there are.
"""

from __future__ import annotations

from collections import Counter
from typing import TypeAlias

from pictures_model.generated.facts import (
    COLOURS,
    COLUMNS,
    COUNT_WORDS,
    ROWS,
    SHAPES,
    Chart,
    Number,
    Picture,
    Scene,
)
from pictures_model.generated.regions import DIGITS, ORDER

GROUPS = 9
GROUP = 4  # words
QUIET = 0.5  # weight of the count that is said together with a word

Said: TypeAlias = tuple[str, str | None]  # a word, and the one said quietly with it

VOCABULARY = tuple(
    dict.fromkeys(
        (
            *COLOURS,
            *SHAPES,
            *ROWS,
            *COLUMNS,
            *DIGITS,
            *ORDER,
            *COUNT_WORDS[1:],
            "nothing",
            "shapes",
            "digit",
            "digits",
            "number",
            "bar",
            "bars",
            "chart",
            "tallest",
            "shortest",
        )
    )
)


def caption(picture: Picture) -> list[Said]:
    """The words of a picture, GROUPS * GROUP of them, group after group."""
    if isinstance(picture, Scene):
        groups = _scene(picture)
    elif isinstance(picture, Number):
        groups = _number(picture)
    else:
        groups = _chart(picture)
    return [said for group in groups for said in group]


def _scene(scene: Scene) -> list[list[Said]]:
    """A group per cell: colour, shape, row and column; empty ones say how many shapes there are."""
    taken = {thing.cell: thing for thing in scene.things}
    colours = Counter(thing.colour for thing in scene.things)
    shapes = Counter(thing.shape for thing in scene.things)
    total = COUNT_WORDS[len(scene.things)]
    groups = []
    for cell in range(GROUPS):
        what: list[Said] = [("nothing", None), ("shapes", total)]
        if cell in taken:
            colour = taken[cell].colour
            shape = taken[cell].shape
            what = [(colour, COUNT_WORDS[colours[colour]]), (shape, COUNT_WORDS[shapes[shape]])]
        groups.append([*what, (ROWS[cell // 3], None), (COLUMNS[cell % 3], None)])
    return groups


def _number(number: Number) -> list[list[Said]]:
    """A group per digit: colour, digit, its place; the others say how many there are."""
    total = COUNT_WORDS[len(number.digits)]
    digits = [
        _plain(number.colour, digit, ORDER[i], "digit") for i, digit in enumerate(number.digits)
    ]
    return digits + [_plain("nothing", total, "digits", "number")] * (GROUPS - len(digits))


def _chart(chart: Chart) -> list[list[Said]]:
    """A group per bar: colour, height, place; the last two are the tallest and the shortest bar."""
    total = COUNT_WORDS[len(chart.bars)]
    bars = [
        _plain(bar.colour, "bar", str(bar.height), ORDER[i]) for i, bar in enumerate(chart.bars)
    ]
    empty = [_plain("nothing", total, "bars", "chart")] * (GROUPS - 2 - len(bars))
    ends = [
        _plain(bar.colour, which, "bar", str(bar.height))
        for bar, which in ((chart.tallest, "tallest"), (chart.shortest, "shortest"))
    ]
    return bars + empty + ends


def _plain(*words: str) -> list[Said]:
    return [(word, None) for word in words]
