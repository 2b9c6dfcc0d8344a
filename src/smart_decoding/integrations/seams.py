"""Names in another engine that a part relies on, compared with the installed version.

They are compared at every start, so that no version is refused by its number.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import reduce
from importlib import import_module
from typing import Any

# Of a function, without `self`; None: no function, or one with any parameters.
Parameters = tuple[str, ...] | None
_FIRST = ("self", "cls")
# module -> name (Class.member) -> parameters.
Names = Mapping[str, Mapping[str, Parameters]]


def lacking(names: Names, newer: Sequence[str] | None = None) -> list[str]:
    """Return the names that the installed engine lacks or changed, as 'module.name'.

    Functions that are called may have further parameters with defaults. newer: of functions that
    ours replace, the only further parameters that ours take, too."""
    return [
        f"{module}.{name}"
        for module, members in names.items()
        for name, parameters in members.items()
        if not _fits(module, name, parameters, newer)
    ]


def _fits(module: str, name: str, parameters: Parameters, newer: Sequence[str] | None) -> bool:
    *owners, member = name.split(".")
    try:
        owner: Any = reduce(getattr, owners, import_module(module))
        if member in getattr(owner, "__dataclass_fields__", ()):
            return True
        found = getattr(owner, member)
    except (ImportError, AttributeError):
        return False
    if parameters is None or not callable(found):  # a property is read
        return True

    present = [p for p in inspect.signature(found).parameters.values() if p.name not in _FIRST]
    if tuple(parameter.name for parameter in present[: len(parameters)]) != parameters:
        return False
    further = present[len(parameters) :]
    if newer is not None:
        return {parameter.name for parameter in further} <= set(newer)
    return all(
        parameter.default is not parameter.empty or parameter.kind is parameter.VAR_KEYWORD
        for parameter in further
    )
