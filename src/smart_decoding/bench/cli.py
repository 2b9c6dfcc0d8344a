"""`smart bench` on the command line."""

from __future__ import annotations

import argparse
from pathlib import Path

from smart_decoding.bench import report
from smart_decoding.bench.options import BenchOptions
from smart_decoding.bench.provenance import write_json
from smart_decoding.bench.report_cli import add_output_arguments, write_outputs
from smart_decoding.bench.results import Results
from smart_decoding.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `smart bench`, with BenchOptions' defaults."""
    default = BenchOptions()
    add = parser.add_argument
    add("--model", default=default.model, help="built-in name, hub id, folder or GGUF file (default: %(default)s)")
    add("--policies", type=_words, default=default.policies, metavar="A,B", help="'off', the baseline, always runs")
    add("--policy-options", action="append", default=[], metavar="POLICY:K=V,...",
        help="one setting of a policy; repeat it to compare several settings")  # fmt: skip
    add("--tune-likelihood", type=int, default=default.tune_likelihood, metavar="N",
        help="also run the N best settings of likelihood, found by replay on other prompts")  # fmt: skip
    add("--method", help="drafter (default: the model's own)")
    add("--batch-sizes", type=_numbers, default=default.batch_sizes, metavar="1,4")
    add("--tasks", type=_words, default=default.tasks, metavar="code,maths,general")
    add("--limit", type=int, default=default.limit, help="prompts per task (default: %(default)s)")
    add("--skip", type=int, default=default.skip, metavar="N", help="pass over the first N prompts of each task")
    add("--record", type=Path, metavar="FILE",
        help="record the prompts' drafts there, for smart simulate, instead of measuring")  # fmt: skip
    add("--max-tokens", type=int, default=default.max_tokens, help="tokens per answer (default: %(default)s)")
    add("--dtype", default=default.dtype, help="bf16 or fp32 (default: %(default)s)")
    add("--device", default=default.device, help="cpu, cuda or auto (default: %(default)s)")
    add("--temperature", type=float, default=default.temperature)
    add("--seed", type=int, default=default.seed)
    add("--time-limit", type=float, metavar="SECONDS", help="report what was measured by then, marked as partial")
    add("--json", type=Path, metavar="FILE", help="write the results there, whole or not at all")
    add_output_arguments(parser)
    add("--markdown", action="store_true", help="print the table in Markdown")


def main(args: argparse.Namespace) -> int:
    """Runs the benchmark and prints its tables. Raises SmartError for what a user can mend."""
    names = BenchOptions.__dataclass_fields__
    options = BenchOptions(**{name: getattr(args, name) for name in names})
    if options.record is not None:
        return _record(options, options.record)
    from smart_decoding.bench.runner import run  # torch is slow to import: bad options are refused first

    result = run(options)
    if options.json is not None:
        write_json(options.json, result)
    runs = result["runs"]
    print(report.markdown(runs) if args.markdown else report.terminal(runs))
    print(f"\nspeedup by task\n{report.by_task(runs)}")
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


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in _words(text))
    except ValueError as error:
        raise ConfigError(f"{text!r} is not a list of whole numbers such as 1,4") from error
