"""Options of several commands, as data, and types for argparse."""

from __future__ import annotations

import json
import os
import shutil
import sys
from argparse import (
    Action,
    ArgumentParser,
    ArgumentTypeError,
    BooleanOptionalAction,
    Namespace,
    _ActionsContainer,
)
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smart_decoding.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Option:
    """One option `--name`, which may be given several times if its default is a list.

    help: it names the default itself where that is empty. aliases: other flags, dashes and all."""

    name: str
    kind: Callable[[str], Any]
    default: Any
    help: str
    choices: tuple[str, ...] | None = None
    aliases: tuple[str, ...] = ()

    @property
    def many(self) -> bool:
        """Whether it may be given several times."""
        return isinstance(self.default, list)

    @property
    def dest(self) -> str:
        """The attribute of the parsed arguments."""
        return self.name.replace("-", "_")

    def add_to(self, parser: _ActionsContainer, unset: bool = False) -> None:
        """Add it to a parser; with `unset`, None stands for 'not given', not the default."""
        words = f"{self.help} ({self.default})" if self.default else self.help
        default = None if unset else self.default
        flags = (f"--{self.name}", *self.aliases)
        if self.kind is bool:
            action: Any = BooleanOptionalAction if self.default else "store_true"
            parser.add_argument(*flags, action=action, default=default, help=words)
            return
        metavar = "K=V" if self.kind is key_value else self.name.rpartition("-")[2].upper()
        parser.add_argument(
            *flags,
            type=self.kind,
            default=default,
            choices=self.choices,
            metavar=None if self.choices else metavar,
            action="append" if self.many else "store",
            help=words,
        )


class Gone(Action):
    """A removed option. It ends the program with the text in `const`, which names its successor."""

    def __call__(
        self, parser: ArgumentParser, _: object, __: object, option: str | None = None
    ) -> None:
        """End the program."""
        parser.error(f"{option} {self.const}")


ALLOW_SLOW = Option(
    "allow-slow",
    bool,
    False,
    "run plain torch on a CPU where the CPU kernels cannot run (off: an error)",
)

THREADS = Option(
    "threads",
    int,
    None,
    "threads that compute ($SMART_NUM_THREADS, else one for each core)",
    aliases=("-t",),
)


def add_options(parser: _ActionsContainer, options: Iterable[Option], unset: bool = False) -> None:
    """Add options, as `Option.add_to` does."""
    for option in options:
        option.add_to(parser, unset)


def add_allow_slow(parser: _ActionsContainer) -> None:
    """Add --allow-slow and --threads, of every command that loads a model."""
    add_options(parser, (ALLOW_SLOW, THREADS))


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


def key_value(text: str) -> tuple[str, Any]:
    """Return 'k=v' as (k, v); v is read as JSON (a number, true, a list) or else a string."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise ArgumentTypeError(f"{text!r} is not of the form option=value")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def json_object(text: str) -> dict[str, Any]:
    """Return '{"k": v}' as a dict."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ArgumentTypeError(f'{text!r} is not a JSON object such as {{"method": "ngram"}}')
    return found


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
