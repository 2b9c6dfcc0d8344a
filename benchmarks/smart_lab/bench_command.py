"""`python -m smart_lab bench`: `smart bench`, and what needs the laboratory.

Needed by docs/lab.md and by the commands in benchmarks/results/*/README.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from smart_decoding.bench.report import PARTIAL
from smart_decoding.cli import bench
from smart_decoding.files import write_json
from smart_lab.options import LabOptions
from smart_lab.sections import as_text
from smart_lab.tables import by_batch, by_task, over, tuned


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `smart bench`, and ours."""
    bench.add_arguments(parser)
    add = parser.add_argument
    add("--seed", type=int, help=f"of the first prompt's draws (default: {LabOptions().seed})")
    add("--json", type=Path, metavar="FILE", help="write the results there")
    add = parser.add_argument_group("the laboratory: contestants").add_argument
    rivals = "also run the N best settings of eagle2, found by replay on other prompts"
    add("--tune-eagle2", type=int, metavar="N", help=rivals)
    same = "also run the best setting of paper, found in the same way"
    add("--tune-paper", action="store_true", help=same)
    lengths = "also run pooled_chain and throughput_chain, each at its best length"
    add("--tune-chains", action="store_true", help=lengths)
    text = "also replay all contestants at equal costs, where nothing but the policy differs"
    add("--policy-gain", action="store_true", help=text)
    again = "keep what is measured there, and go on from it after a cut"
    add("--resume", type=Path, metavar="FILE", help=again)
    add = parser.add_argument_group("the laboratory: recordings").add_argument
    recorded = "record the prompts' drafts there, for replay and simulation, instead of measuring"
    add("--record", type=Path, metavar="FILE", help=recorded)
    add("--skip", type=int, metavar="N", help="record without the first N prompts of each task")


def main(args: argparse.Namespace) -> int:
    """Run the benchmark and print its tables. Raises SmartError for errors that a user can fix."""
    options = cast("LabOptions", bench.options_of(args, LabOptions))
    from smart_decoding.models.cpu.kernel_check import (
        require_kernels,  # torch is slow to import: options come first
    )
    from smart_decoding.models.target import device_of

    require_kernels(device_of(options.device), options.allow_slow)
    if options.record is not None:
        return _record(options, options.record)
    from smart_lab.bench import run

    result = run(options)
    if options.json is not None:
        write_json(options.json, result)
    print(everything(result))
    return 0


def everything(result: Mapping[str, Any]) -> str:
    """Return warnings and all tables of a result below one another; tables without rows are left
    out."""
    runs, reason = result["runs"], result["provenance"]["plain_torch"]
    parts = [f"plain torch, not the CPU kernels: {reason}"] if reason else []
    parts += [PARTIAL] if any(run["partial"] for run in runs) else []
    tables = (by_batch(runs), by_task(runs), tuned(runs), over(runs))
    return "\n\n".join([*parts, *(as_text(table) for table in tables if table.rows)])


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
