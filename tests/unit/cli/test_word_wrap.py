"""Lines are broken between words, wherever the text's pieces end."""

from __future__ import annotations

import itertools
import textwrap
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smart_decoding.cli.word_wrap import WordWrap

THAI = "ที่นี่นั้นที่ abcd"  # ten columns: vowels and tones stand above letters
FAMILY = "a \U0001f469\u200d\U0001f469\u200d\U0001f467 bcdef"  # one emoji, two columns


def wrapped(text: str, width: int, *cuts: int) -> str:
    wrap = WordWrap(lambda: width)
    edges = [0, *sorted(cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    return "".join(map(wrap.feed, [*pieces, "\n"])).removesuffix("\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the sky is blue", "the sky is\nblue"),
        ("the sky is\nblue", "the sky is\nblue"),
        ("the sky isn't blue", "the sky\nisn't blue"),
        ("exactly 10 then", "exactly 10\nthen"),
        ("  indented words", "  indented\nwords"),
        ("a abcdefghijklmnop b", "a\nabcdefghijklmnop b"),  # the terminal breaks it
        ("abcdefghijk klmn", "abcdefghijk klmn"),
        ("blanks    at the end  \n", "blanks\nat the end\n"),
        ("日本語日本語", "日本語日本\n語"),
        ("e\u0301" * 9 + " ab", "e\u0301" * 9 + "\nab"),
        (THAI, THAI),
        (FAMILY, FAMILY),
        ("```\na long line of code\n```\nand a text", "```\na long line of code\n```\nand a text"),
        ("```\na b\n```\nand some text", "```\na b\n```\nand some\ntext"),
        ("~~~\na long line of code\n~~~\nand a text", "~~~\na long line of code\n~~~\nand a text"),
        ("```a``` sets\nand some text", "```a```\nsets\nand some\ntext"),
        ("````\n```\na long line\n~~~\na long line", "````\n```\na long line\n~~~\na long line"),
    ],
)
def test_lines_break_between_words(text: str, expected: str) -> None:
    assert wrapped(text, 10) == expected
    assert wrapped(text, 10, *range(len(text))) == expected
    assert wrapped(text, 99).split("\n") == [line.rstrip() for line in text.split("\n")]


words = st.text(st.characters(categories=["Ll", "Nd"], max_codepoint=500), min_size=1, max_size=9)


@given(st.lists(words, min_size=1), st.lists(st.integers(0, 99), max_size=5))
def test_short_words_are_broken_as_textwrap_does(texts: list[str], cuts: list[int]) -> None:
    text = " ".join(texts)
    assert all(unicodedata.east_asian_width(c) not in "WF" for c in text)
    cuts = [cut for cut in cuts if cut < len(text)]
    lines = textwrap.wrap(text, 12, break_long_words=False, break_on_hyphens=False)
    assert wrapped(text, 12, *cuts).split("\n") == lines


@given(st.text(), st.integers(1, 40))
def test_nothing_but_blanks_and_line_ends_changes(text: str, width: int) -> None:
    assert "".join(wrapped(text, width).split()) == "".join(text.split())


def test_a_window_may_change_its_size() -> None:
    width = 10
    wrap = WordWrap(lambda: width)
    first = wrap.feed("some words to\n")
    width = 4
    assert first + wrap.feed("some words\n") == "some words\nto\nsome\nwords\n"
