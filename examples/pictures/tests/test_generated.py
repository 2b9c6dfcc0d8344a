"""Generated pictures: the same from the same seed, drawn as their facts say, and asked about
truthfully."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest

from pictures_model.generated.captions import VOCABULARY, caption
from pictures_model.generated.draw import bar_box, draw, example_chart
from pictures_model.generated.facts import (
    COLOURS,
    COUNT_WORDS,
    SHAPES,
    Chart,
    Number,
    Picture,
    Scene,
    random_chart,
    random_number,
    random_picture,
    random_scene,
)
from pictures_model.generated.questions import Question, questions
from pictures_model.generated.regions import WORDS, patch_labels
from pictures_model.generated.wordings import HELD_OUT, KINDS, LONG_KINDS, TRAIN, WORDINGS


def some(count: int, kind: str | None = None, seed: int = 0) -> list[Picture]:
    rng = np.random.default_rng(seed)
    return [random_picture(rng, kind) for _ in range(count)]


def asked(picture: Picture, wordings: int = TRAIN) -> dict[str, Question]:
    return {
        question.kind: question
        for question in questions(picture, np.random.default_rng(0), wordings)
    }


def pixel(picture: Picture, x: float, y: float, size: int = 96) -> tuple[int, ...]:
    return draw(picture, size).getpixel((round(x * size), round(y * size)))  # type: ignore[return-value]


def near(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return max(abs(p - q) for p, q in zip(a, b, strict=True)) < 25


def test_a_seed_gives_the_same_picture_and_questions_and_another_seed_others() -> None:
    assert some(20) == some(20) != some(20, seed=1)
    picture = some(1)[0]
    assert draw(picture).tobytes() == draw(picture).tobytes() != draw(some(1, seed=1)[0]).tobytes()
    assert asked(picture) == asked(picture)


def test_a_picture_can_be_drawn_at_any_size() -> None:
    for size in (32, 96, 384):
        image = draw(example_chart(), size)
        assert (image.size, image.mode) == ((size, size), "RGB")


def test_shapes_lie_where_the_facts_say_in_their_colours() -> None:
    for scene in some(40, "scene"):
        assert isinstance(scene, Scene)
        for thing in scene.things:
            middle = pixel(scene, *thing.centre)
            assert near(middle, thing.rgb) != (thing.shape == "ring"), thing
            if thing.shape == "ring":
                assert near(
                    pixel(scene, thing.centre[0] - 0.81 * thing.radius, thing.centre[1]), thing.rgb
                )


def test_bars_end_at_their_heights() -> None:
    for chart in some(40, "chart"):
        assert isinstance(chart, Chart)
        for i, bar in enumerate(chart.bars):
            left, top, right, _ = bar_box(chart, i)
            assert near(pixel(chart, (left + right) / 2, top + 0.03), bar.rgb)
            assert not near(pixel(chart, (left + right) / 2, top - 0.035), bar.rgb)


def test_another_digit_is_another_picture() -> None:
    number = random_number(np.random.default_rng(0))
    drawn = {
        draw(
            Number(
                digit, number.colour, number.rgb, number.background, number.centres[:1], number.size
            )
        ).tobytes()
        for digit in "0123456789"
    }
    assert len(drawn) == 10


def test_every_answer_is_right_and_an_answer_about_another_picture_is_mostly_not() -> None:
    others = [asked(picture) for picture in some(60, seed=5)]
    right = wrong = 0
    for picture in some(60):
        for kind, question in asked(picture).items():
            assert question.is_right(question.answer), question
            assert question.is_right(question.answer.upper())
            assert not question.is_right("")
            for other in others:
                if kind in other:
                    right += question.is_right(other[kind].answer)
                    wrong += 1
    assert right / wrong < 0.3


def test_counts_are_those_of_the_picture() -> None:
    plurals = {"crosses" if shape == "cross" else f"{shape}s": shape for shape in SHAPES}
    plurals |= {f"{colour} shapes": colour for colour in COLOURS}
    for scene in some(200, "scene"):
        assert isinstance(scene, Scene)
        question = asked(scene)["count"]
        wanted = next(
            (word for plural, word in plurals.items() if plural in question.prompt), "any"
        )
        count = sum(wanted in ("any", thing.colour, thing.shape) for thing in scene.things)
        assert question.keys == (COUNT_WORDS[count],), (question, scene)


def test_what_is_the_tallest_bar() -> None:
    found = asked(example_chart(), HELD_OUT)
    assert found["tallest"].answer == "The tallest bar is the red one."
    assert found["shortest"].keys == ("orange",)
    assert found["bars"].keys == ("four",)


def test_an_answer_must_hold_whole_words() -> None:
    question = Question("number", "What number is this?", "The number is 47.", ("47",))
    assert question.is_right("It is 47!")
    assert not question.is_right("The number is 472.")


def test_no_wording_for_measurements_is_trained_on() -> None:
    for trained, held_out in WORDINGS.values():
        assert trained
        assert held_out
        assert not {*trained} & {*held_out}
    seen = {question.kind for picture in some(60) for question in asked(picture).values()}
    assert seen == {*KINDS}


def test_long_answers_are_long_on_pictures_that_hold_enough() -> None:
    rng = np.random.default_rng(0)
    for picture in (random_scene(rng, 5), random_chart(rng, 4)):
        words = asked(picture)[LONG_KINDS[0]].answer.split()
        assert len(words) >= 35


def test_a_caption_has_36_known_words_and_tells_pictures_apart() -> None:
    pictures = some(300)
    captions = [tuple(caption(picture)) for picture in pictures]
    assert {len(said) for said in captions} == {36}
    said = set(chain.from_iterable(chain.from_iterable(captions))) - {None}
    assert said <= {*VOCABULARY}
    facts_of = dict(zip(captions, pictures, strict=True))
    for kind in (Number, Chart):
        same = [p for p in pictures if isinstance(p, kind) and facts_of[tuple(caption(p))] != p]
        assert all(
            asked(p)["description"].answer
            == asked(facts_of[tuple(caption(p))])["description"].answer
            for p in same
        )


def test_patches_are_labelled_with_what_they_show() -> None:
    for scene in some(50, "scene"):
        assert isinstance(scene, Scene)
        labels = patch_labels(scene, 6)
        for thing in scene.things:
            patch = int(thing.centre[1] * 6 - 0.25) * 6 + int(thing.centre[0] * 6 - 0.25)
            shown = {WORDS[i] for i in labels[patch].nonzero()[0]}
            assert {thing.colour, thing.shape} <= shown


@pytest.mark.parametrize("colour", COLOURS)
def test_colours_differ_by_more_than_their_shades(colour: str) -> None:
    for other in set(COLOURS) - {colour}:
        assert max(abs(a - b) for a, b in zip(COLOURS[colour], COLOURS[other], strict=True)) > 40
