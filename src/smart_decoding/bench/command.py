"""The command line that asks for a run, as results and pages show it: names of files only, no
folders of a machine."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smart_decoding.bench.options import BenchOptions

FILES = ("draft", "random_weights")  # of options that are texts, those that may name a folder
REPEATED = {"policy_options": "policy-options", "method_options": "method-option"}


def command_of(options: BenchOptions) -> str:
    """The command line that asks for this run."""
    return shlex.join(["smart", "bench", "--model", options.model, *words_of(options, ("model",))])


def words_of(options: BenchOptions, without: Collection[str]) -> list[str]:
    """The options as words of a command line, but for those `without`. What is empty, false or 0,
    as it is by default, is left out."""
    words: list[str] = []
    for name in (field.name for field in fields(options) if field.name not in without):
        value = getattr(options, name)
        if name in REPEATED:
            each = [f"{k}={v}" for k, v in value.items()] if isinstance(value, Mapping) else value
            words += [word for one in each for word in (f"--{REPEATED[name]}", one)]
        elif value:
            words.append(f"--{name.replace('_', '-')}")
            words += [] if value is True else [_told(Path(value) if name in FILES else value)]
    return words


def _told(value: Any) -> str:
    if isinstance(value, Path):
        return value.name
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if isinstance(value, str | int) else ",".join(map(_told, value))
