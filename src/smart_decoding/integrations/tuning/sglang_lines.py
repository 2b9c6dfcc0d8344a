"""Costs of rounds from lines that `sglang.bench_serving` wrote, on another machine or day."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smart_decoding.errors import ConfigError

# Of a line of bench_serving's --output-file.
FIELDS = ("concurrency", "output_throughput", "accept_length")


def costs_of(runs: Sequence[str]) -> dict[int, dict[int, float]]:
    """Return batch size -> steps -> seconds of a round. runs: texts STEPS=FILE. Raises ConfigError
    for other texts and lines."""
    seconds: dict[int, dict[int, float]] = {}
    for steps, path in (pair(run, "STEPS=FILE") for run in runs):
        for batch, round_ in rounds(Path(path), steps).items():
            seconds.setdefault(batch, {})[steps] = round_
    return dict(sorted(seconds.items()))


def nodes_of(text: str) -> dict[int, int]:
    """Return 'STEPS=NODES,...' as steps -> nodes; none for an empty text."""
    pairs = [pair(part, "STEPS=NODES") for part in text.split(",") if part.strip()]
    return {steps: count(nodes) for steps, nodes in pairs}


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
