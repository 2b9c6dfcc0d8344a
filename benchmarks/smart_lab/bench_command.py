"""`python -m smart_lab bench`: `smart bench` and what needs the laboratory."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import cast

from smart_decoding.bench.provenance import write_json
from smart_decoding.cli.arguments import words
from smart_decoding.cli.bench import add_common_arguments, options_of
from smart_lab.options import LAB_PRESETS, LabOptions
from smart_lab.report import everything
from smart_lab.report_command import add_output_arguments, write_outputs
from smart_lab.results import LabResults


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `smart bench`, and ours."""
    preset = add_common_arguments(parser)
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="FILE",
        help="keep what is measured there, and go on from it after a cut",
    )
    add_output_arguments(parser)
    preset.add_argument(
        "--full",
        dest="preset",
        action="store_const",
        const="full",
        help="everything, within an hour",
    )
    _further_parts(parser)
    _instead_of_measuring(parser)


def _further_parts(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the laboratory: contestants and parts").add_argument
    tuned = "also run the N best settings of eagle2, found by replay on other prompts"
    add("--tune-eagle2", type=int, metavar="N", help=tuned)
    add(
        "--tune-paper",
        action="store_true",
        help="also run the best setting of paper, found in the same way",
    )
    lengths = "also run pooled_chain and throughput_chain, each at its best length"
    add("--tune-chains", action="store_true", help=lengths)
    alone = "also replay all contestants at equal costs, where nothing but the policy differs"
    add("--policy-gain", action="store_true", help=alone)
    exchanged = "measure smart with one ingredient exchanged, in a part of its own"
    add("--variants", type=words, metavar="A,B", help=exchanged)
    twice = "measure once more at this temperature, at batch 1 and 8"
    add("--sampled", type=float, metavar="T", help=twice)
    add(
        "--suites",
        type=words,
        metavar="A,B",
        help="also measure these tasks (long, edit) at batch 1, by themselves",
    )
    add("--questions", action="store_true", help="also answer by replay: oracle, ablations, sweeps")


def _instead_of_measuring(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the laboratory: recordings").add_argument
    recorded = "record the prompts' drafts there, for replay and simulation, instead of measuring"
    add("--record", type=Path, metavar="FILE", help=recorded)
    timed = (
        "time a model of these dimensions (llama-3.1-8b, ..., or a config.json) with random "
        "weights: all compute is real, acceptance comes from --replay"
    )
    add("--random-weights", metavar="CONFIG", help=timed)
    add(
        "--replay",
        type=Path,
        metavar="TRACE",
        help="the recording whose acceptance --random-weights takes",
    )


def main(args: argparse.Namespace) -> int:
    """Runs the benchmark and prints its tables. Raises SmartError for what a user can mend."""
    options = cast(LabOptions, options_of(args, LabOptions, LAB_PRESETS))
    from smart_decoding.models.kernel_check import (
        require_kernels,  # torch is slow to import: options come first
    )
    from smart_decoding.models.target import device_of

    require_kernels(device_of(options.device), options.allow_slow)
    if options.record is not None:
        return _record(options, options.record)
    if options.replay is not None:
        from smart_lab.replayed_run import run
    else:
        from smart_lab.bench import run
    result = run(options)
    if options.json is not None:
        write_json(options.json, result)
    print(everything(result))
    if options.html is not None or options.plots is not None:
        write_outputs(LabResults.from_dict(result), options.html, options.plots)
    return 0


def _record(options: LabOptions, path: Path) -> int:
    from smart_lab.recorder import record_trace
    from smart_lab.trace import write_trace

    trace = record_trace(options)
    write_trace(path, trace)
    recording = trace.recording
    print(
        f"{len(recording.answers)} answers, {recording.positions} positions, "
        f"{len(recording.token)} drafted tokens: {path} ({path.stat().st_size / 1e6:.1f} MB)"
    )
    return 0
