"""`smart serve`: an OpenAI-compatible server."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smart_decoding.cli import habits
from smart_decoding.cli.arguments import (
    add_options,
    chosen_model,
    program_here,
    refuse_windows,
    use_threads,
)
from smart_decoding.cli.model_options import llm_options
from smart_decoding.cli.serve_options import (
    KEY_VARIABLE,
    OPTIONS,
    merge,
    read_config,
)
from smart_decoding.engine_args import EngineArgs
from smart_decoding.errors import ConfigError
from smart_decoding.models.checkpoints.registry import DEFAULT_MODEL

if TYPE_CHECKING:
    from smart_decoding.server.settings import ServerSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `smart serve`. None stands for 'not given', so that a file can say it."""
    parser.add_argument(
        "name",
        nargs="?",
        metavar="MODEL",
        help=f"name, hub id, folder or GGUF file ({DEFAULT_MODEL})",
    )
    parser.add_argument("-m", "--model", "-hf", help="as MODEL")
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="TOML file of these options, such as port = 8080; the command line wins (none)",
    )
    parser.add_argument(
        "--no-api-key",
        action="store_true",
        default=None,
        help="serve without a key beyond loopback too, under any host name (off)",
    )
    for title, options in OPTIONS.items():
        add_options(parser.add_argument_group(title), options, unset=True)
    EngineArgs.add_neutral_cli_args(parser)
    habits.take_without_effect(parser)


def main(args: argparse.Namespace) -> int:
    """Check everything that can be checked without the model, then serve."""
    refuse_windows("smart serve")
    args.model = chosen_model(args)
    merge(args, read_config(args.config) if args.config else {})
    use_threads(args.threads)  # the file may say it, too
    options = llm_options(args, (*OPTIONS["model"], *OPTIONS["pictures"]))
    options["mm_processor_kwargs"] = dict(args.mm_processor_option)
    options.update(EngineArgs.neutral_cli_args(args))
    try:
        from smart_decoding.server.launch import serve
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"smart serve needs {error.name}: in the clone, {program_here('pip')} install -e "
            "'.[serve]'"
        ) from error
    settings = _settings(args)
    # Check the options, as the model is loaded later. dtype was checked, and may warn only once.
    EngineArgs(model=args.model, **{**options, "dtype": "bfloat16"})
    from smart_decoding.llm import LLM
    from smart_decoding.models.cpu.kernel_check import require_kernels
    from smart_decoding.models.target import device_of

    # Checked here already: the server loads the model later, on another thread.
    require_kernels(device_of(args.device), args.allow_slow)

    return serve(lambda: LLM(args.model, **options), settings)


def _listed(text: str) -> list[Any]:
    """Return the values of an option that may be a JSON list, as vLLM's scripts give it."""
    try:
        found = json.loads(text)
    except ValueError:
        return [text]
    return found if isinstance(found, list) else [text]


def _settings(args: argparse.Namespace) -> ServerSettings:
    from smart_decoding.server.settings import ServerSettings

    from_environment = None if args.no_api_key else os.environ.get(KEY_VARIABLE)
    keys = args.api_key or ([from_environment] if from_environment else [])
    values = {
        field.name: getattr(args, field.name)
        for field in fields(ServerSettings)
        if field.name not in ("model_name", "api_keys")
    }
    values["allowed_origins"] = tuple(
        each for text in args.allowed_origins for each in _listed(text)
    )
    values["no_api_key"] = bool(args.no_api_key)
    return ServerSettings(args.served_model_name or args.model, api_keys=tuple(keys), **values)
