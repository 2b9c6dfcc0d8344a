"""`smart vllm-config`: measures your vLLM with and without speculation, and writes its option."""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from smart_decoding.bench.provenance import write_json
from smart_decoding.cli.arguments import json_object, whole_numbers
from smart_decoding.cli.prompts import read_prompts
from smart_decoding.errors import ConfigError
from smart_decoding.integrations.vllm import schedule
from smart_decoding.integrations.vllm.measure import Measured, resolved
from smart_decoding.integrations.vllm.schedule import SCHEDULE, Timing

NGRAM = '{"method": "ngram", "prompt_lookup_max": 3, "prompt_lookup_min": 2}'
# Options that are measured here.
CHOSEN = ("num_speculative_tokens", SCHEDULE)
# Drafters that crash vLLM if another length than the longest is scheduled.
ONE_LENGTH = ("suffix", "medusa", "ngram_gpu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the measurement and its output."""
    add = parser.add_argument
    add("model", help="as vLLM takes it: a hub id or a folder")
    add(
        "--speculative-config",
        type=json_object,
        default=json.loads(NGRAM),
        metavar="JSON",
        help=f"vLLM's, without lengths ({NGRAM})",
    )
    add(
        "--engine-args",
        type=json_object,
        default={},
        metavar="JSON",
        help='other arguments of vllm.LLM, such as {"tensor_parallel_size": 2} (none)',
    )
    _add_measurements(parser)
    add(
        "--context",
        type=int,
        metavar="TOKENS",
        help="mean context of your requests while they are answered, for the profile of vLLM's "
        "adaptive verification (prompt and half the answer of what is measured)",
    )
    add(
        "--check",
        action="store_true",
        help="then measure vLLM with the schedule against plain vLLM",
    )
    output = Path("vllm-speculative.json")
    add("--output", type=Path, default=output, help=f"({output})")


def _add_measurements(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--lengths", type=whole_numbers, default=(1, 2, 4), help="draft lengths to try (1,2,4)")
    add(
        "--batch-sizes",
        type=whole_numbers,
        default=(1, 2, 4, 8, 16),
        help="to measure (1,2,4,8,16)",
    )
    add("--prompts", type=Path, help="a prompt a line, text or JSON with 'prompt' (60 of ours)")
    add("--max-tokens", type=int, default=128, help="of each answer (128)")
    add("--blocks", type=int, default=4, help="measurements of each batch size and length (4)")
    add(
        "--together",
        action="store_true",
        help="load all engines at once and let them take turns: steadier, if they fit",
    )


def main(args: argparse.Namespace) -> int:
    """Measure, print the schedule with its reasons, write it and all measurements."""
    _check_arguments(args)
    ours = Path(str(resources.files("smart_decoding.bench"))) / "prompts_general.jsonl"
    prompts = read_prompts(args.prompts or ours)
    if max(args.batch_sizes) > len(prompts):
        raise ConfigError(
            f"{len(prompts)} prompts are too few for a batch of {max(args.batch_sizes)}"
        )
    if find_spec("vllm") is None:
        raise ConfigError(
            "vLLM is not installed here: install smart-decoding in vLLM's environment "
            "(docs/vllm.md)"
        )
    settings, warnings = warn(args)
    measured, version = measure(args, prompts)
    choices = [schedule.choose(batch, timings) for batch, timings in sorted(measured.items())]
    lines = schedule.schedule(choices)
    for line in lines:
        print(f"batch {line.first} to {line.last}: {line.length or 'no'} tokens  <- {line.reason}")
    adaptive = schedule.adaptive(settings, args.context or schedule.mean_context(measured))
    print(adaptive)
    reasons = {
        "vllm": version,
        "model": args.model,
        "engine_args": args.engine_args,
        "warnings": warnings,
        "adaptive_verification": adaptive,
        **schedule.report(lines, choices, measured),
    }
    path = args.output.with_suffix(".reasons.json")
    write_json(path, reasons)
    config = schedule.speculative_config(args.speculative_config, lines)
    if config is None:
        print("Speculation did not pay at any batch size: start vLLM without --speculative-config.")
        return 0
    write_json(args.output, config)
    print(f'Written: {args.output}. Start vLLM with --speculative-config "$(cat {args.output})"')
    if args.check:
        write_json(path, {**reasons, "checked": check(args, prompts, config)})
    return 0


def _check_arguments(args: argparse.Namespace) -> None:
    chosen = sorted(set(CHOSEN) & set(args.speculative_config))
    if chosen:
        raise ConfigError(
            f"--speculative-config is to be given without {' and '.join(chosen)}: "
            "that is measured here"
        )
    method = args.speculative_config.get("method")
    if method in ONE_LENGTH:
        raise ConfigError(f"vLLM's {method} drafting takes no schedule of several lengths")
    if args.blocks < 1 or args.max_tokens < 2:
        raise ConfigError("--blocks must be at least 1 and --max-tokens at least 2")
    if args.context is not None and args.context < 1:
        raise ConfigError("--context must be at least 1")


def warn(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Warn, before anything is measured, where a schedule would be ignored or cost graphs.

    Returns vLLM's settings under a schedule (measure.resolved), and the warnings."""
    lines = [schedule.Line(1, 1, max(args.lengths), ""), schedule.Line(2, 2, 0, "")]
    config = schedule.speculative_config(args.speculative_config, lines)
    arguments = {"model": args.model, **args.engine_args, "speculative_config": config}
    settings = resolved(arguments)
    found = schedule.warnings(settings)
    for text in found:
        print(f"warning: {text}", file=sys.stderr)
    return settings, found


def measure(
    args: argparse.Namespace, prompts: Sequence[str]
) -> tuple[dict[int, dict[int, Timing]], str]:
    """Return {batch size: {length: timing}} and vLLM's version; length 0 is plain vLLM."""
    lengths = [0, *sorted(set(args.lengths))]
    configs = {
        k: {**args.speculative_config, "num_speculative_tokens": k} if k else None for k in lengths
    }
    measured: dict[int, dict[int, Timing]] = defaultdict(dict)
    version = ""
    for group in [lengths] if args.together else [[length] for length in lengths]:
        found, version = run({k: configs[k] for k in group}, args, prompts)
        for batch, timings in found.items():
            measured[batch] |= timings
    return measured, version


def check(
    args: argparse.Namespace, prompts: Sequence[str], config: Mapping[str, Any]
) -> dict[int, list[float]]:
    """Print and return, by batch size, the speedup over plain vLLM and its standard error.

    A drafter costs vLLM time in every step, even where the schedule drafts nothing.
    """
    found, _ = run({0: None, int(config["num_speculative_tokens"]): config}, args, prompts)
    speedups = {batch: schedule.speedup(*timings.values()) for batch, timings in found.items()}
    for batch, (ratio, error) in speedups.items():
        print(f"batch {batch}, with the schedule: {ratio:.2f} ± {error:.2f} × plain")
    return {batch: list(speedup) for batch, speedup in speedups.items()}


def run(
    configs: Mapping[int, Mapping[str, Any] | None],
    args: argparse.Namespace,
    prompts: Sequence[str],
) -> tuple[dict[int, dict[int, Timing]], str]:
    """Return {batch size: {length: timing}} and vLLM's version, of engines with these configs.

    Loaded at once, they take turns.
    """
    answers: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    version = ""
    with ExitStack() as stack:
        arguments = {"model": args.model, **args.engine_args}
        engines = {
            k: stack.enter_context(Measured({**arguments, "speculative_config": c}))
            for k, c in configs.items()
        }
        for length, engine in engines.items():
            version = engine.ready()
            engine.run(prompts[:1], 8)  # the first run compiles
            print(f"measuring {f'up to {length} tokens' if length else 'plain'}", flush=True)
        for batch, chosen in blocks(args, prompts):
            for length, engine in engines.items():
                answers[batch, length].append(engine.run(chosen, args.max_tokens))
    batches = sorted(set(args.batch_sizes))
    timings = {batch: {k: _timing(batch, answers[batch, k]) for k in configs} for batch in batches}
    return timings, version


def blocks(args: argparse.Namespace, prompts: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield (batch size, prompts), the same for every length."""
    chooser = random.Random(0)
    for _ in range(args.blocks):
        for batch in sorted(set(args.batch_sizes)):
            yield batch, chooser.sample(list(prompts), batch)


def _timing(batch: int, answers: Sequence[Mapping[str, Any]]) -> Timing:
    seconds = [answer["seconds"] for answer in answers]
    drafted = sum(answer["drafted"] for answer in answers)
    accepted = sum(answer["accepted"] for answer in answers)
    contexts = [answer["prompt_tokens"] + answer["tokens"] / 2 for answer in answers]
    context = sum(contexts) / (batch * len(answers))
    return Timing(seconds, answers[0]["tokens"], drafted, accepted, context)
