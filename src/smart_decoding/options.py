"""Options as fields of dataclasses: name, type, default and help in one place.

`option` declares one, `add_options` gives them to argparse, `named_options` checks their names."""

from __future__ import annotations

import json
from argparse import (
    SUPPRESS,
    Action,
    ArgumentTypeError,
    BooleanOptionalAction,
    Namespace,
    _ActionsContainer,
)
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, field, fields
from functools import wraps
from typing import Any, TypeVar

from smart_decoding.errors import ConfigError

_Options = TypeVar("_Options", bound=type[Any])


def option(
    default: Any,
    words: str,
    *,
    usual: str = "",
    choices: tuple[str, ...] = (),
    name: str = "",
    **more: Any,
) -> Any:
    """Return a field of a dataclass that a command line can offer. words: its help.

    usual: what the default means, where its value does not tell. name: the command line's, where
    it differs from the field's. more: metadata of the dataclass's own, and `flags`: other names."""
    about = {"help": words, "usual": usual, "choices": choices, "name": name, **more}
    return field(default=default, metadata=about)


def named_options(kind: _Options) -> _Options:
    """Make a dataclass raise ConfigError, with the nearest name, for an argument that it lacks, and
    list its options in its docstring."""
    made = kind.__init__
    known = [each.name for each in fields(kind) if each.init]
    names = frozenset(known)

    @wraps(made)
    def checked(self: Any, *values: Any, **options: Any) -> None:
        if not options.keys() <= names:
            raise ConfigError(_unknown(next(name for name in options if name not in names), known))
        made(self, *values, **options)

    kind.__init__ = checked
    shown = [each for each in offered(kind) if each.metadata["help"] != SUPPRESS]
    kind.__doc__ = "\n    ".join([f"{kind.__doc__}\n", *(f"{e.name}: {_help(e)}." for e in shown)])
    return kind


def _unknown(name: str, known: list[str]) -> str:
    from difflib import get_close_matches  # imported late: only this error needs it

    close = get_close_matches(name, known, 1)
    hint = f"did you mean {close[0]!r}?" if close else f"use {', '.join(known)}"
    return f"unknown option {name!r}: {hint}"


def offered(kind: type[Any], names: Collection[str] = ()) -> list[Field[Any]]:
    """Return the fields that a command line can offer: those named, in their order, or all."""
    found = {each.name: each for each in fields(kind) if "help" in each.metadata}
    return [found[name] for name in names or found]


def given(args: Namespace, kind: type[Any], names: Collection[str] = ()) -> dict[str, Any]:
    """Return the parsed values of options of a dataclass, without those that are None."""
    values = {each.name: getattr(args, each.name) for each in offered(kind, names)}
    known = {name: value for name, value in values.items() if value is not None}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in known.items()}


def add_options(
    parser: _ActionsContainer,
    kind: type[Any],
    names: Collection[str] = (),
    *,
    unset: bool = False,
    usual: Mapping[str, str] = {},
) -> None:
    """Give a parser options of a dataclass: those named, or all that it offers.

    unset: None stands for 'not given', not the default. usual: what their defaults mean here."""
    for each in offered(kind, names):
        about = each.metadata
        flag = f"--{about['name'] or each.name.replace('_', '-')}"
        parse = parser_of(each)
        more = "; may be repeated" if parse in _REPEATED else ""
        words = _help(each, more, usual.get(each.name, ""))
        how: dict[str, Any] = {"dest": each.name, "help": words}
        if kinds(each)[0] != "bool":
            metavar = None if about["choices"] else flag.rpartition("-")[2].upper()
            how |= {"type": parse, "choices": about["choices"] or None, "metavar": metavar}
            how |= _REPEATED.get(parse, {})
        elif flag.startswith("--no-"):
            how["action"] = "store_true"
        else:
            how["action"] = BooleanOptionalAction
        action = parser.add_argument(flag, *about.get("flags", ()), default=None, **how)
        if not unset and each.default not in (MISSING, ()):
            action.default = each.default  # set late: BooleanOptionalAction adds it to the help


def _help(each: Field[Any], more: str = "", usual: str = "") -> str:
    """Return an option's help with its default behind it."""
    words: str = each.metadata["help"]
    usual = usual or each.metadata["usual"]
    default = each.default
    if not usual:
        usual = "none" if default in (None, ()) else str(default)
        if isinstance(default, bool):
            usual = "on" if default else "off"
    return words if words == SUPPRESS else f"{words}{more} ({usual})"


def kinds(each: Field[Any]) -> list[str]:
    """Return the names of a field's types."""
    return [kind.partition("[")[0] for kind in str(each.type).split(" | ")]


def parser_of(each: Field[Any]) -> Callable[[str], Any]:
    """Return the function that makes a field's value of a text."""
    first, *others = kinds(each)
    if first == "Mapping" and set(others) - {"None"}:
        return json_value
    return _PARSERS.get(first, str)


def json_value(text: str) -> Any:
    """Return a value in JSON."""
    try:
        return json.loads(text)
    except ValueError:
        raise ArgumentTypeError(f'{text!r} is not JSON such as {{"method": "ngram"}}') from None


def mapping(text: str) -> dict[str, Any]:
    """Return 'k=v' or '{"k": v}' as a dict; v is read as JSON (a number, true, a list) or else a
    string."""
    if text.startswith("{"):
        return dict(json_value(text))
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise ArgumentTypeError(f"{text!r} is not of the form option=value")
    try:
        return {key: json.loads(value)}
    except ValueError:
        return {key: value}


def several(text: str) -> list[str]:
    """Return one value, or those of a JSON list, as vLLM's scripts give them."""
    try:
        found = json.loads(text)
    except ValueError:
        return [text]
    return [str(each) for each in found] if isinstance(found, list) else [text]


class Merged(Action):
    """An option that may be repeated: its mappings become one."""

    def __call__(self, _: object, namespace: Namespace, values: Any, __: object = None) -> None:
        """Add a mapping. Raises ConfigError for a name that is given twice."""
        before = getattr(namespace, self.dest, None) or {}
        if twice := sorted(before.keys() & values.keys()):
            raise ConfigError(f"option {twice[0]!r} is given more than once")
        setattr(namespace, self.dest, {**before, **values})


_PARSERS: Mapping[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "Mapping": mapping,
    "tuple": several,
}
_REPEATED: Mapping[Callable[[str], Any], dict[str, Any]] = {
    mapping: {"action": Merged, "metavar": "K=V"},
    several: {"action": "extend"},
}
