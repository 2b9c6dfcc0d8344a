"""What several commands take: --allow-slow, and lists such as 1,2,4 as types for argparse, which
passes errors on."""

from __future__ import annotations

from argparse import ArgumentTypeError, _ActionsContainer

ALLOW_SLOW = "run plain torch on a CPU where the CPU kernels cannot run"


def add_allow_slow(parser: _ActionsContainer) -> None:
    """--allow-slow, of every command that loads a model."""
    parser.add_argument("--allow-slow", action="store_true", help=f"{ALLOW_SLOW} (off: an error)")


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
