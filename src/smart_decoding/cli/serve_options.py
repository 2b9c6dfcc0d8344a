"""The options of `smart serve`: from the command line, else a TOML file, else their defaults."""

from __future__ import annotations

import argparse
import json
import os
import tomllib
from pathlib import Path
from typing import Any, NoReturn

from smart_decoding.cli import habits
from smart_decoding.cli.main import Parser
from smart_decoding.cli.model_options import add_drafting
from smart_decoding.engine_args import EngineArgs
from smart_decoding.errors import ConfigError
from smart_decoding.options import add_options, given
from smart_decoding.server.settings import KEY_VARIABLE, ServerSettings


class _FileParser(Parser):
    """A parser of a file's options, whose path is its name."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError."""
        raise ConfigError(f"{self.prog}: {message}")


def add_settings(parser: argparse.ArgumentParser, *, unset: bool) -> None:
    """Add the options that a file may give, too. unset: None stands for 'not given'."""
    group = parser.add_argument_group("model")
    add_options(group, EngineArgs, unset=unset)
    add_drafting(group, unset=unset)
    add_options(parser.add_argument_group("server"), ServerSettings, unset=unset)


def complete(args: argparse.Namespace) -> None:
    """Fill in what the command line left open. Raises ConfigError for a wrong file."""
    for name, value in read_config(args.config).items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def read_config(path: Path | None) -> dict[str, Any]:
    """Return all options as a TOML file gives them, else their defaults. Raises ConfigError for
    unknown names and wrong values."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8")) if path else {}
    except ValueError as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    parser = _FileParser(prog=str(path), add_help=False, allow_abbrev=False)
    add_settings(parser, unset=False)
    habits.take(parser)
    words = [_word(name.replace("_", "-"), value) for name, value in content.items()]
    return vars(parser.parse_args([word for word in words if word]))


def _word(name: str, value: Any) -> str:
    """Return an entry of a TOML file as the command line takes it; nothing for no-x = false."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}" * (not name.startswith("no-"))
    return f"--{name}={value if isinstance(value, str) else json.dumps(value, default=str)}"


def settings_of(args: argparse.Namespace) -> ServerSettings:
    """Return the server's settings. Raises ConfigError for bad ones."""
    values = {"model_name": args.model, **given(args, ServerSettings)}
    key = os.environ.get(KEY_VARIABLE)
    if key and not args.no_api_key:
        values.setdefault("api_keys", (key,))
    return ServerSettings(**values)
