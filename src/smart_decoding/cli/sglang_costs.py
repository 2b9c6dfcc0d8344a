"""`smart sglang-costs`: costs for SGLang's policy, from results of `sglang.bench_serving`."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smart_decoding.errors import ConfigError
from smart_decoding.files import whole
from smart_decoding.integrations.sglang.costs import TierCosts

# Of a line of bench_serving's --output-file.
FIELDS = ("concurrency", "output_throughput", "accept_length")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the measurements and the output."""
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="STEPS=FILE",
        help="bench_serving's --output-file of a server with so many steps (0: no speculation), "
        "a line for each load",
    )
    parser.add_argument(
        "--nodes",
        default="",
        metavar="STEPS=NODES,...",
        help="for trees: each server's --speculative-num-draft-tokens less 1 (none: chains)",
    )
    parser.add_argument("--output", type=Path, default=Path("costs.json"), help="(costs.json)")


def main(args: argparse.Namespace) -> None:
    """Print and write the table; refuse one that the policy would refuse."""
    seconds: dict[int, dict[int, float]] = {}
    for steps, path in (pair(run, "STEPS=FILE") for run in args.runs):
        for batch, round_ in rounds(Path(path), steps).items():
            seconds.setdefault(batch, {})[steps] = round_
    table: dict[str, Any] = {"seconds": dict(sorted(seconds.items()))}
    if args.nodes:
        pairs = [pair(text, "STEPS=NODES") for text in args.nodes.split(",")]
        table["nodes"] = {steps: count(nodes) for steps, nodes in pairs}
        lacking = {k for row in seconds.values() for k in row} - {0, *table["nodes"]}
        if lacking:
            steps_lacking = ", ".join(map(str, sorted(lacking)))
            raise ConfigError(f"--nodes says nothing of {steps_lacking} steps")
    with whole(args.output) as part:
        part.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        TierCosts.load(part)
    for batch, row in table["seconds"].items():
        shown = ", ".join(f"{k} steps {1e3 * row[k]:.2f} ms" for k in sorted(row))
        print(f"batch {batch}: {shown}")


def pair(text: str, form: str) -> tuple[int, str]:
    """Return KEY, a number, and VALUE of a text KEY=VALUE."""
    key, equals, value = text.partition("=")
    if not equals or not value:
        raise ConfigError(f"{text!r} is not of the form {form}")
    return count(key), value


def count(text: str) -> int:
    """Return a number of steps or nodes."""
    if not text.strip().isdecimal():
        raise ConfigError(f"{text!r} is no number of steps or nodes")
    return int(text)


def rounds(path: Path, steps: int) -> dict[int, float]:
    """Return batch size -> seconds of a round, from the lines of one file; a later line wins."""
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            batch, seconds = round_of(line, f"{path}:{number}", steps)
            found[batch] = seconds
    if not found:
        raise ConfigError(f"{path} has no measurement")
    return found


def round_of(line: str, place: str, steps: int) -> tuple[int, float]:
    """Return mean requests under way, rounded, and seconds of a round, of one load."""
    try:
        measured: Mapping[str, Any] = json.loads(line)
        concurrency = float(measured["concurrency"])
        throughput = float(measured["output_throughput"])
        length = float(measured["accept_length"] or 1.0) if steps else 1.0
    except (ValueError, KeyError, TypeError) as error:
        fields = ", ".join(FIELDS)
        raise ConfigError(
            f"{place} is no line of sglang.bench_serving with {fields}: {error}"
        ) from error
    positive = all(math.isfinite(x) and x > 0 for x in (concurrency, throughput, length))
    if not positive or concurrency <= 0.5:
        raise ConfigError(f"{place}: {', '.join(FIELDS)} must be positive")
    if steps and length <= 1.0:
        raise ConfigError(f"{place}: no draft was accepted, as if the server did not speculate")
    return round(concurrency), concurrency * length / throughput
