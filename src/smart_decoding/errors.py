"""Every error a user can cause: one small tree, one clear line each.

The command line prints the line and exits with 2.
"""

from __future__ import annotations

from dataclasses import fields
from functools import wraps
from typing import Any, TypeVar

_Options = TypeVar("_Options", bound=type[Any])


class SmartError(Exception):
    """Base of all errors that smart_decoding raises on purpose; the message is one line that says
    what to do."""


class ConfigError(SmartError, ValueError):
    """An option, parameter or request that cannot be honoured."""


class ModelError(SmartError):
    """A model, head or tokenizer that is missing, corrupt, unsupported or does not fit."""


class DownloadError(ModelError):
    """A file that could not be fetched, or arrived with the wrong checksum."""


class CapacityError(SmartError):
    """A request that can never fit (context or KV memory), or no memory or disk left."""


class EngineStoppedError(SmartError):
    """A request to an engine that was shut down, or that has failed for good."""


def require_finite(finite: object) -> None:
    """Raise ModelError unless `finite` is true: whether all maxima of a model's rows are."""
    if not finite:
        raise ModelError(
            "the model's logits are NaN or infinite: check the weights, or use dtype float32"
        )


def named_options(kind: _Options) -> _Options:
    """Make a dataclass raise ConfigError, with the nearest name, for an argument that it lacks."""
    made = kind.__init__
    known = [each.name for each in fields(kind) if each.init]
    names = frozenset(known)

    @wraps(made)
    def checked(self: Any, *values: Any, **options: Any) -> None:
        if not options.keys() <= names:
            raise ConfigError(_unknown(next(name for name in options if name not in names), known))
        made(self, *values, **options)

    kind.__init__ = checked
    return kind


def _unknown(name: str, known: list[str]) -> str:
    from difflib import get_close_matches  # imported late: only this error needs it

    close = get_close_matches(name, known, 1)
    hint = f"did you mean {close[0]!r}?" if close else f"use {', '.join(known)}"
    return f"unknown option {name!r}: {hint}"
