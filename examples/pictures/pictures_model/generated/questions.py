"""Questions about a generated picture, the answers that its facts give, and who is right."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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
    Thing,
)
from pictures_model.generated.wordings import TRAIN, worded


@dataclass(frozen=True, slots=True)
class Question:
    """`answer` is what is trained on; an answer is right if it holds all the `keys` as words."""

    kind: str
    prompt: str
    answer: str
    keys: tuple[str, ...]

    def is_right(self, text: str) -> bool:
        return all(
            re.search(rf"(?<!\w){re.escape(key)}(?!\w)", text, re.IGNORECASE) for key in self.keys
        )


def questions(picture: Picture, rng: np.random.Generator, wordings: int = TRAIN) -> list[Question]:
    """One question of every kind that suits the picture, in random order; the wordings are TRAIN or
    HELD_OUT."""
    ask = _Asker(rng, wordings)
    if isinstance(picture, Scene):
        _ask_scene(ask, picture, rng)
    elif isinstance(picture, Number):
        _ask_number(ask, picture)
    else:
        _ask_chart(ask, picture, rng)
    return [ask.found[i] for i in rng.permutation(len(ask.found))]


class _Asker:
    def __init__(self, rng: np.random.Generator, wordings: int) -> None:
        self._rng = rng
        self._wordings = wordings
        self.found: list[Question] = []

    def __call__(self, kind: str, answer: str, keys: Sequence[str], **parts: str) -> None:
        prompt = worded(kind, parts, self._wordings, self._rng)
        self.found.append(Question(kind, prompt, answer, tuple(keys)))


def _ask_scene(ask: _Asker, scene: Scene, rng: np.random.Generator) -> None:
    things = scene.things
    names = Counter(thing.name for thing in things)
    shapes = Counter(thing.shape for thing in things)
    colours = Counter(thing.colour for thing in things)
    of_their_shape = [thing for thing in things if shapes[thing.shape] == 1]
    of_their_colour = [thing for thing in things if colours[thing.colour] == 1]
    unique = [thing for thing in things if names[thing.name] == 1]
    if of_their_shape:
        thing = _pick(rng, of_their_shape)
        ask("colour", f"The {thing.shape} is {thing.colour}.", [thing.colour], shape=thing.shape)
    if of_their_colour:
        thing = _pick(rng, of_their_colour)
        answer = f"The {thing.colour} shape is a {thing.shape}."
        ask("shape", answer, [thing.shape], colour=thing.colour)
    if unique:
        thing = _pick(rng, unique)
        answer = f"The {thing.name} is at the {thing.place}."
        ask("position", answer, [thing.place], thing=thing.name)
    _ask_cell(ask, scene, rng)
    for what in _countable(rng, shapes, colours):
        count = {**shapes, **colours, "shapes": len(things)}.get(what, 0)
        _ask_count(ask, what, count)
    _ask_exists(ask, scene, rng)
    if len(unique) > 1:
        _ask_relation(ask, unique, rng)
    sentence = _count_sentence(len(things), "shape", "The picture shows")
    items = [f"a {thing.name} at the {thing.place}" for thing in things]
    ask("description", f"{sentence} There is {_joined(items)}.", _description_keys(scene))
    lines = [
        f"{i}. {thing.colour.capitalize()} {thing.shape}, {thing.place}"
        for i, thing in enumerate(things, 1)
    ]
    ask("list", "\n".join([sentence, *lines]), [sentence[:-1], *lines])


def _description_keys(scene: Scene) -> list[str]:
    return [
        COUNT_WORDS[len(scene.things)],
        *(f"{thing.name} at the {thing.place}" for thing in scene.things),
    ]


def _ask_cell(ask: _Asker, scene: Scene, rng: np.random.Generator) -> None:
    taken = {thing.cell: thing for thing in scene.things}
    if rng.random() < 0.15:
        cell = int(rng.choice([cell for cell in range(9) if cell not in taken]))
        place = Thing("", "", cell, (0, 0, 0), (0, 0), 0).place
        ask("cell", f"Nothing is at the {place}.", ["nothing"], place=place)
        return
    thing = _pick(rng, list(scene.things))
    ask("cell", f"A {thing.name} is at the {thing.place}.", [thing.name], place=thing.place)


def _countable(rng: np.random.Generator, shapes: Counter[str], colours: Counter[str]) -> list[str]:
    """What to count: mostly what is there, and most often what is there more than once."""
    there = [*shapes, *colours]
    weights = np.array([{**shapes, **colours}[name] for name in there], float)
    if rng.random() < 0.15:
        return [str(rng.choice([*SHAPES, *COLOURS]))]
    return ["shapes"] if rng.random() < 0.3 else [str(rng.choice(there, p=weights / weights.sum()))]


def _ask_count(ask: _Asker, what: str, count: int) -> None:
    noun = what.removesuffix("s") if what in ("shapes", "cross") else what
    noun = "cross" if what == "cross" else f"{what} shape" if what in COLOURS else noun
    answer = _count_sentence(count, noun, "There are" if count != 1 else "There is")
    ask("count", answer, [COUNT_WORDS[count]], things=_plural(noun))


def _ask_exists(ask: _Asker, scene: Scene, rng: np.random.Generator) -> None:
    names = {thing.name for thing in scene.things}
    if rng.random() < 0.5:
        name = str(rng.choice(sorted(names)))
        ask("exists", f"Yes, there is a {name}.", ["yes"], thing=name)
        return
    near = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    if rng.random() < 0.5:  # right colour or right shape
        thing = _pick(rng, list(scene.things))
        near = [name for name in near if thing.colour in name or thing.shape in name]
    name = str(rng.choice([name for name in near if name not in names]))
    ask("exists", f"No, there is no {name}.", ["no"], thing=name)


def _ask_relation(ask: _Asker, unique: list[Thing], rng: np.random.Generator) -> None:
    first, second = rng.choice(len(unique), 2, replace=False).tolist()
    a = unique[first]
    b = unique[second]
    across = b.cell % 3 - a.cell % 3
    down = b.cell // 3 - a.cell // 3
    choices = []
    if across:
        choices += [("left of", "right of", across > 0), ("right of", "left of", across < 0)]
    if down:
        choices += [("above", "below", down > 0), ("below", "above", down < 0)]
    side, other, true = choices[int(rng.integers(len(choices)))]
    word = {"left of": "to the left of", "right of": "to the right of"}.get(side, side)
    lines = (ROWS[a.cell // 3], "row", ROWS[b.cell // 3])
    if "of" in side:
        lines = (COLUMNS[a.cell % 3], "column", COLUMNS[b.cell % 3])
    places = f"The {a.name} is in the {lines[0]} {lines[1]} and the {b.name} in the {lines[2]} one"
    ask(
        "relation",
        f"{places}, so it is {side if true else other} it: {'yes' if true else 'no'}.",
        ["yes" if true else "no"],
        thing=a.name,
        side=word,
        other=b.name,
    )


def _ask_number(ask: _Asker, number: Number) -> None:
    digits = number.digits
    colour = number.colour
    ask("number", f"The number is {digits}.", [digits])
    ask("number colour", f"The number is {colour}.", [colour])
    ask("digits", _count_sentence(len(digits), "digit", "It has"), [COUNT_WORDS[len(digits)]])
    places = [
        f"the {place} digit is {digit}"
        for place, digit in zip(("first", "second", "third"), digits, strict=False)
    ]
    sentence = (
        f"The picture shows the number {digits}, which is drawn in {colour} on a light background."
    )
    counted = _count_sentence(len(digits), "digit", "The number has")
    ask("description", f"{sentence} {counted[:-1]}: {_joined(places)}.", [digits, colour, *places])
    lines = [f"{i}. {colour.capitalize()} {digit}" for i, digit in enumerate(digits, 1)]
    ask(
        "list",
        "\n".join([_count_sentence(len(digits), "digit", "The picture shows"), *lines]),
        lines,
    )


def _ask_chart(ask: _Asker, chart: Chart, rng: np.random.Generator) -> None:
    bars = chart.bars
    tall = chart.tallest.colour
    short = chart.shortest.colour
    ask("tallest", f"The tallest bar is the {tall} one.", [tall])
    ask("shortest", f"The shortest bar is the {short} one.", [short])
    ask("bars", _count_sentence(len(bars), "bar", "There are"), [COUNT_WORDS[len(bars)]])
    bar = bars[int(rng.integers(len(bars)))]
    ask(
        "height",
        f"The {bar.colour} bar has a height of {bar.height}.",
        [str(bar.height)],
        colour=bar.colour,
    )
    first, second = rng.choice(len(bars), 2, replace=False).tolist()
    a = bars[first]
    b = bars[second]
    true = a.height > b.height
    heights = f"The {a.colour} bar has a height of {a.height} and the {b.colour} one of {b.height}"
    ask(
        "taller",
        f"{heights}: {'yes, it is taller' if true else 'no, it is shorter'}.",
        ["yes" if true else "no"],
        colour=a.colour,
        other=b.colour,
    )
    items = [f"a {bar.colour} bar with a height of {bar.height}" for bar in bars]
    counted = _count_sentence(len(bars), "bar", "")[1:]
    sentence = f"The picture shows a chart with {counted} From left to right there is"
    ends = f"The tallest bar is the {tall} one and the shortest bar is the {short} one."
    ask(
        "description",
        f"{sentence} {_joined(items)}. {ends}",
        [COUNT_WORDS[len(bars)], *items, ends[:-1]],
    )
    lines = [f"{i}. {bar.colour.capitalize()} bar, {bar.height}" for i, bar in enumerate(bars, 1)]
    ask("list", "\n".join([_count_sentence(len(bars), "bar", "The picture shows"), *lines]), lines)


def _pick(rng: np.random.Generator, things: list[Thing]) -> Thing:
    return things[int(rng.integers(len(things)))]


def _plural(noun: str) -> str:
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def _count_sentence(count: int, noun: str, start: str) -> str:
    return f"{start} {COUNT_WORDS[count]} {noun if count == 1 else _plural(noun)}."


def _joined(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
