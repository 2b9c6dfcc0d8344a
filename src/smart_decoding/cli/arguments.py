"""Helpers of several commands, and types for argparse."""

from __future__ import annotations

import os
import shutil
import sys
from argparse import ArgumentTypeError, Namespace, _ActionsContainer
from pathlib import Path

from smart_decoding.errors import ConfigError


def add_threads(parser: _ActionsContainer) -> None:
    """Add --threads, of every command that loads a model."""
    words = "threads that compute ($SMART_NUM_THREADS, else one for each core)"
    parser.add_argument("--threads", type=int, help=words)


def chosen_model(args: Namespace) -> str | None:
    """Return the argument MODEL or the option --model; None for neither. Raises ConfigError for
    both."""
    if args.name and args.model:
        raise ConfigError(f"two models are given, {args.name} and {args.model}: leave out one")
    return args.model or args.name or None


def refuse_windows(command: str) -> None:
    """Raise ConfigError on Windows, for a command that starts processes as Linux and macOS do."""
    if sys.platform == "win32":
        from smart_decoding.kernels.library import INSTEAD  # no other system needs it

        raise ConfigError(f"{command} does not run on {INSTEAD['win32']}")


def program_here(name: str) -> str:
    """Return how a program of this Python's environment is called: by its name where that leads to
    it, else by its path, from the current folder if it lies in it."""
    place = Path(sys.executable).with_name(name)
    found = shutil.which(name)
    if not place.exists() or (found and Path(found).samefile(place)):
        return name
    here = Path.cwd()
    return str(place.relative_to(here) if place.is_relative_to(here) else place)


def use_threads(count: int | None) -> None:
    """Set the number of threads before the kernels are loaded; None leaves the default. Raises
    ConfigError for less than one."""
    if count is not None:
        if count < 1:
            raise ConfigError(f"--threads {count} is not allowed: it must be at least 1")
        os.environ["SMART_NUM_THREADS"] = str(count)


def words(text: str) -> tuple[str, ...]:
    """Return 'a,b' as words."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def whole_numbers(text: str) -> tuple[int, ...]:
    """Return '1,4' as numbers; at least one, and none below 1."""
    try:
        numbers = tuple(int(word) for word in words(text))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise ArgumentTypeError(f"{text!r} is not a list of positive whole numbers such as 1,4")
    return numbers
