"""`smart bench` on the command line."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from smart_decoding.bench import report
from smart_decoding.bench.arguments import add_allow_slow, shares, whole_numbers, words
from smart_decoding.bench.options import BenchOptions
from smart_decoding.bench.presets import PRESETS
from smart_decoding.bench.provenance import write_json
from smart_decoding.bench.results import Results
from smart_decoding.cli.report import add_output_arguments, write_outputs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `smart bench`. What is not given stays unset: a preset's value counts then, or BenchOptions'."""
    parser.argument_default = argparse.SUPPRESS
    default = BenchOptions()
    preset = parser.add_mutually_exclusive_group()
    preset.add_argument("--quick", dest="preset", action="store_const", const="quick", help="within three minutes")
    preset.add_argument("--full", dest="preset", action="store_const", const="full", help="everything, within an hour")
    _what_runs(parser, default)
    _what_is_measured(parser, default)
    add = parser.add_argument
    add("--time-limit", type=float, metavar="SECONDS", help="report what was measured by then, marked as partial")
    add("--resume", type=Path, metavar="FILE", help="keep what is measured there, and go on from it after a cut")
    add("--json", type=Path, metavar="FILE", help="write the results there, whole or not at all")
    add_output_arguments(parser)
    add("--markdown", action="store_true", help="print the table in Markdown")


def _what_runs(parser: argparse.ArgumentParser, default: BenchOptions) -> None:
    group = parser.add_argument_group("what runs")
    add = group.add_argument
    add("--model", help=f"built-in name, hub id, folder or GGUF file (default: {default.model})")
    add("--policies", type=words, metavar="A,B", help="'off', the baseline, always runs")
    add("--policy-options", action="append", metavar="POLICY:K=V,...",
        help="one setting of a policy; may be repeated. method= and model= give it a drafter of its own")  # fmt: skip
    add("--tune-likelihood", type=int, metavar="N",
        help="also run the N best settings of likelihood, found by replay on other prompts")  # fmt: skip
    add("--tune-paper", action="store_true", help="also run the best setting of smart_paper, found in the same way")
    add(
        "--variants",
        type=words,
        metavar="A,B",
        help="measure smart with one ingredient exchanged, in a part of its own",
    )
    add("--suites", type=words, metavar="A,B", help="also measure these tasks (long, edit) at batch 1, by themselves")
    add("--questions", action="store_true", help="also answer by replay: hindsight, ablations, sweeps")
    add("--method", help="drafter (default: the model's own)")
    add("--draft", metavar="MODEL", help="what the method drafts with: a head's folder, or for draft_model any "
        "smaller model of the same vocabulary")  # fmt: skip
    add("--method-option", dest="method_options", action="append", metavar="K=V", help="an option of the drafter")
    add("--dtype", help=f"bf16 or fp32 (default: {default.dtype})")
    add("--device", help=f"cpu, cuda or auto (default: {default.device})")
    add_allow_slow(group)


def _what_is_measured(parser: argparse.ArgumentParser, default: BenchOptions) -> None:
    add = parser.add_argument_group("what is measured").add_argument
    add("--batch-sizes", type=whole_numbers, metavar="1,4")
    add("--tasks", type=words, metavar="A,B", help="code, maths, general (these by default), long, edit")
    add("--limit", type=int, help=f"prompts per task (default: {default.limit})")
    add("--least-blocks", type=int, metavar="N", help="measure at least so many blocks of each task, used again "
        "where a batch needs more than there are (default: 1)")  # fmt: skip
    add("--skip", type=int, metavar="N", help="pass over the first N prompts of each task")
    add("--max-tokens", type=int, help=f"tokens per answer (default: {default.max_tokens})")
    add("--temperature", type=float, help="0, the default, is greedy")
    add("--sampled", type=float, metavar="T", help="measure once more at this temperature, at fewer batch sizes")
    add("--seed", type=int)
    add("--load", type=shares, metavar="0.3,0.6,0.9", help="requests that arrive at random, at these shares of the "
        "measured capacity; alone it replaces the comparison in blocks")  # fmt: skip
    add("--peers", type=words, nargs="?", const=("all",), metavar="A,B", help="other engines on the same prompts "
        "(default: all), in environments made for them; alone it replaces the comparison in blocks")  # fmt: skip
    add("--peer-env", action="append", metavar="NAME=FOLDER", help="an environment to use for a peer as it is")
    add("--record", type=Path, metavar="FILE",
        help="record the prompts' drafts there, for smart simulate, instead of measuring")  # fmt: skip
    add("--random-weights", metavar="CONFIG", help="time a model of these dimensions (llama-3.1-8b, ..., or a "
        "config.json) with random weights: all compute is real, acceptance comes from --replay")  # fmt: skip
    add("--replay", type=Path, metavar="TRACE", help="the recording whose acceptance --random-weights takes")
    add("--blocks", action="store_true", help="compare policies in blocks beside --load or --peers")


def options_of(args: argparse.Namespace) -> BenchOptions:
    """What was asked for, over the preset, over the defaults."""
    given: dict[str, Any] = {name: value for name, value in vars(args).items() if name in _FIELDS}
    if "method_options" in given:
        given["method_options"] = _named(given["method_options"])
    return BenchOptions(**{**PRESETS.get(getattr(args, "preset", ""), {}), **given})


def main(args: argparse.Namespace) -> int:
    """Runs the benchmark and prints its tables. Raises SmartError for what a user can mend."""
    options = options_of(args)
    from smart_decoding.models.kernel_check import require_kernels  # torch is slow to import: options come first
    from smart_decoding.models.target import device_of

    require_kernels(device_of(options.device), options.allow_slow)
    if options.record is not None:
        return _record(options, options.record)
    if options.replay is not None:
        from smart_decoding.bench.replayed_run import run
    else:
        from smart_decoding.bench.runner import run
    result = run(options)
    if options.json is not None:
        write_json(options.json, result)
    print(report.everything(result, getattr(args, "markdown", False)))
    if options.html is not None or options.plots is not None:
        write_outputs(Results.from_dict(result), options.html, options.plots)
    return 0


def _record(options: BenchOptions, path: Path) -> int:
    from smart_decoding.bench.recorder import record_trace
    from smart_decoding.bench.trace import write_trace

    trace = record_trace(options)
    write_trace(path, trace)
    recording = trace.recording
    print(
        f"{len(recording.answers)} answers, {recording.positions} positions, {len(recording.token)} drafted tokens: "
        f"{path} ({path.stat().st_size / 1e6:.1f} MB)"
    )
    return 0


_FIELDS = tuple(BenchOptions.__dataclass_fields__)


def _named(texts: list[str]) -> dict[str, Any]:
    """K=V several times, as a dict; values as in --policy-options."""
    from smart_decoding.bench.options import parse_setting

    named: dict[str, Any] = {}
    for text in texts:
        named |= parse_setting(f":{text}").options
    return named
