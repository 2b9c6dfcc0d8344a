"""`smart serve`: an OpenAI-compatible server."""

from __future__ import annotations

import argparse
from pathlib import Path

from smart_decoding.cli import habits
from smart_decoding.cli.arguments import chosen_model, program_here, refuse_windows, use_threads
from smart_decoding.cli.model_options import llm_options
from smart_decoding.cli.serve_options import add_settings, complete, settings_of
from smart_decoding.engine_args import EngineArgs
from smart_decoding.errors import ConfigError
from smart_decoding.models.checkpoints.registry import DEFAULT_MODEL


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `smart serve`. None stands for 'not given', so that a file can say it."""
    parser.add_argument(
        "name",
        nargs="?",
        metavar="MODEL",
        help=f"name, hub id, folder or GGUF file ({DEFAULT_MODEL})",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="TOML file of these options, such as port = 8080; the command line wins (none)",
    )
    add_settings(parser, unset=True)
    habits.take_without_effect(parser)


def main(args: argparse.Namespace) -> int:
    """Check everything that can be checked without the model, then serve."""
    refuse_windows("smart serve")
    args.model = chosen_model(args)
    complete(args)
    use_threads(args.threads)  # the file may say it, too
    options = llm_options(args, ())
    try:
        from smart_decoding.server.launch import serve
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"smart serve needs {error.name}: in the clone, {program_here('pip')} install -e "
            "'.[serve]'"
        ) from error
    settings = settings_of(args)
    # Check the options, as the model is loaded later. dtype was checked, and may warn only once.
    EngineArgs(**{**options, "dtype": "bfloat16"})
    from smart_decoding.llm import LLM
    from smart_decoding.models.cpu.kernel_check import require_kernels
    from smart_decoding.models.target import device_of

    # Checked here already: the server loads the model later, on another thread.
    require_kernels(device_of(args.device), args.allow_slow)

    return serve(lambda: LLM(**options), settings)
