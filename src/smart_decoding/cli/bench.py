"""`smart bench` on the command line."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from smart_decoding.bench.options import QUICK, BenchOptions
from smart_decoding.cli.arguments import add_threads, whole_numbers, words
from smart_decoding.cli.model_options import DraftOptions
from smart_decoding.cli.prompts import read_prompts
from smart_decoding.cli.run import show_steps
from smart_decoding.engine_args import EngineArgs
from smart_decoding.measuring.tasks import TASKS
from smart_decoding.options import add_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `smart bench`.

    Options that are not given stay unset: then the value of `--quick` counts, or BenchOptions'.
    """
    parser.argument_default = argparse.SUPPRESS
    default = BenchOptions()
    quick = ", ".join(f"{name.replace('_', '-')} {_shown(value)}" for name, value in QUICK.items())
    help_ = f"within three minutes: unless they are given, {quick}"
    parser.add_argument("--quick", action="store_true", help=help_)
    _what_runs(parser, default)
    _what_is_measured(parser, default)
    add = parser.add_argument
    add(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="end then, and report a partial result (none)",
    )


def _what_runs(parser: argparse.ArgumentParser, default: BenchOptions) -> None:
    group = parser.add_argument_group("what runs")
    add = group.add_argument
    models = "built-in name, hub id, folder or GGUF file"
    add("-m", "--model", help=f"{models} (default: {default.model})")
    policies = f"'off', the baseline, always runs (default: {_shown(default.policies)})"
    add("--policies", type=words, metavar="A,B", help=policies)
    yours = "a policy of your own, in addition: a class in a file (docs/your-policy.md)"
    add("--policy", action="append", metavar="FILE.py:CLASS", help=yours)
    add(
        "--policy-options",
        action="append",
        metavar="POLICY:K=V,...",
        help="one setting of a policy; may be repeated. method= and model= give it a drafter of "
        "its own",
    )
    add_options(group, DraftOptions, ("method", "draft", "method_option"), unset=True)
    loading = ("chat_template", "trust_pickle", "dtype", "quantization", "activations", "device")
    add_options(group, EngineArgs, (*loading, "allow_slow"), unset=True)
    add_threads(group)


def _what_is_measured(parser: argparse.ArgumentParser, default: BenchOptions) -> None:
    add = parser.add_argument_group("what is measured").add_argument
    sizes = f"requests at once (default: {_shown(default.batch_sizes)})"
    add("--batch-sizes", type=whole_numbers, metavar="1,4", help=sizes)
    add("--tasks", type=words, metavar="A,B", help="code, maths, general (all by default)")
    file = "your own prompts in place of tasks: one a line, as text or JSON with 'prompt'"
    add("--prompts", type=Path, metavar="FILE", help=file)
    add("--limit", type=int, help=f"prompts per task (default: {default.limit})")
    add("--max-tokens", type=int, help=f"tokens per answer (default: {default.max_tokens})")
    add("--temperature", type=float, help=f"0 is greedy (default: {default.temperature:g})")


def _shown(value: Any) -> str:
    """Return a value as the command line takes it."""
    return f"{value:g}" if isinstance(value, float | int) else ",".join(map(str, value))


def options_of(args: argparse.Namespace, kind: type[BenchOptions] = BenchOptions) -> BenchOptions:
    """Return the user's options, else those of `--quick`, else the defaults."""
    names = {field.name for field in fields(kind)}
    values = {name: value for name, value in vars(args).items() if name in names}
    values = {name: value for name, value in values.items() if value is not None}
    if args.method_option:
        values["method_options"] = args.method_option
    quick = QUICK if "quick" in args else {}
    values = {**quick, **values}
    if "policy" in values:
        from smart_decoding.core.policies import add_policy  # imported late: numpy is slow

        named = values.get("policies", kind().policies)
        values["policies"] = tuple(dict.fromkeys([*named, *map(add_policy, values["policy"])]))
    if "prompts" in values:
        texts = read_prompts(values["prompts"])
        TASKS["prompts"] = lambda: texts
        values["tasks"] = tuple(dict.fromkeys([*values.get("tasks", ()), "prompts"]))
    return kind(**values)


def main(args: argparse.Namespace) -> int:
    """Run the benchmark and print its table. Raises SmartError for errors that a user can fix."""
    show_steps()
    options = options_of(args)
    # torch is slow to import: options come first.
    from smart_decoding.models.cpu.kernel_check import require_kernels
    from smart_decoding.models.target import device_of

    require_kernels(device_of(options.device), options.allow_slow)
    from smart_decoding.bench import report
    from smart_decoding.bench.runner import run

    print(report.everything(run(options)))
    return 0
