"""Options of a dataclass on a command line."""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import Any

import pytest

from smart_decoding.errors import ConfigError
from smart_decoding.options import add_options, given, named_options, option


@named_options
@dataclass(frozen=True)
class Meal:
    """What to eat."""

    name: str = option(MISSING, "of the dish", usual="soup", name="dish")
    guests: int = option(2, "who eat", flags=("-g",))
    price: float | None = option(None, "at most", usual="any")
    kind: str = option("hot", "how it comes", choices=("hot", "cold"))
    salt: bool = option(True, "salted")
    no_meat: bool = option(False, "vegetables alone")
    spices: Mapping[str, Any] | None = option(None, "spoons of each")
    drinks: tuple[str, ...] = option((), "a drink")
    more: Mapping[str, Any] | int | None = option(None, "in JSON")
    hidden: int = option(0, SUPPRESS)
    inner: int = 1


def parsed(*words: str, unset: bool = False) -> dict[str, Any]:
    parser = ArgumentParser()
    add_options(parser, Meal, unset=unset)
    args = parser.parse_args(words)
    return given(args, Meal)


def test_what_is_not_given_is_the_default_or_nothing() -> None:
    assert Meal("soup", **parsed()) == Meal("soup")
    assert parsed(unset=True) == {}


def test_each_type_is_read() -> None:
    words = "--dish tea -g 3 --price 1.5 --kind cold --no-salt --no-meat --spices salt=1"
    more = "--spices", '{"a": [2], "b": "x"}', "--drinks", "tea", "--drinks", '["milk", "rum"]'
    assert Meal(**parsed(*words.split(), *more, "--more", "3", "--hidden", "5")) == Meal(
        name="tea",
        guests=3,
        price=1.5,
        kind="cold",
        salt=False,
        no_meat=True,
        spices={"salt": 1, "a": [2], "b": "x"},
        drinks=("tea", "milk", "rum"),
        more=3,
        hidden=5,
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--guests x", "invalid int value"),
        ("--kind raw", "invalid choice"),
        ("--spices salt", "'salt' is not of the form option=value"),
        ("--spices {salt}", "is not JSON"),
        ("--more x", "is not JSON"),
    ],
)
def test_wrong_values_are_refused(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parsed(*words.split())
    assert message in capsys.readouterr().err


def test_a_name_is_given_once() -> None:
    with pytest.raises(ConfigError, match="option 'salt' is given more than once"):
        parsed("--spices", "salt=1", "--spices", "salt=2")


def test_help_and_docstring_tell_each_default() -> None:
    parser = ArgumentParser()
    add_options(parser, Meal, usual={"guests": "all"})
    text = " ".join(parser.format_help().split())
    for words in (
        "of the dish (soup)",
        "who eat (all)",
        "at most (any)",
        "how it comes (hot)",
        "salted (on)",
        "vegetables alone (off)",
        "spoons of each; may be repeated (none)",
        "a drink; may be repeated (none)",
    ):
        assert words in text
    assert "hidden" not in text
    assert "inner" not in text
    assert "guests: who eat (2)." in str(Meal.__doc__)
    assert "hidden" not in str(Meal.__doc__)
