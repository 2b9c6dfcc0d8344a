"""Lists on a command line, such as 1,2,4: types for argparse, whose errors it passes on as they are."""

from __future__ import annotations

from argparse import ArgumentTypeError


def words(text: str) -> tuple[str, ...]:
    """'a,b' as words."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def whole_numbers(text: str) -> tuple[int, ...]:
    """'1,4' as numbers; at least one, and none below 1."""
    try:
        numbers = tuple(int(word) for word in words(text))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise ArgumentTypeError(f"{text!r} is not a list of positive whole numbers such as 1,4")
    return numbers


def shares(text: str) -> tuple[float, ...]:
    """'0.3,0.6' as numbers."""
    try:
        return tuple(float(word) for word in words(text))
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is not a list of shares such as 0.3,0.6,0.9") from error
