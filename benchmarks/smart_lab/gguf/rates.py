"""Chunks of prompts answered by one contestant, and figures of many chunks.

Needed by `gguf-speed`, whose files are the README's first table.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from smart_decoding.errors import ModelError
from smart_decoding.measuring.statistics import Pair, Ratio, paired_ratio


@dataclass(frozen=True, slots=True)
class Span:
    """One answer. first: seconds from its start to its first token; later: from there to its last
    token; tokens: those after the first round."""

    first: float
    later: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Reply:
    """One chunk answered. overall: tokens per second of all, prompts included; decode: of one
    request, behind its first; prefill_seconds: mean of Span.first; per_round: tokens of a request
    in a round; seconds: of each answer, from when it has a place; counts: its tokens."""

    decode: float
    overall: float
    prefill_seconds: float
    per_round: float
    answers: list[list[int]]
    seconds: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """Return the reply for JSON."""
        return asdict(self)


def reply(
    spans: Sequence[Span],
    seconds: float,
    rounds: int,
    answers: list[list[int]],
    counts: list[int] | None = None,
) -> Reply:
    """Return the reply of a queue that was answered in so many seconds. rounds: with later tokens,
    summed over requests; counts: tokens that were made for each answer, if `answers` lacks some.
    Raises ModelError for an answer without a token."""
    if not all(answers):
        raise ModelError("an answer has no token")
    counts = counts or [len(answer) for answer in answers]
    later = sum(span.tokens for span in spans)
    return Reply(
        decode_rate(spans),
        sum(counts) / seconds,
        statistics.fmean(span.first for span in spans),
        later / rounds if rounds > 0 else math.nan,
        answers,
        [span.first + span.later for span in spans],
        counts,
    )


def decode_rate(spans: Sequence[Span]) -> float:
    """Return tokens per second of one request behind its first token: all tokens over all seconds
    of all requests. NaN without later tokens.

    The seconds include neighbours' prompts."""
    tokens = sum(span.tokens for span in spans)
    return tokens / sum(span.later for span in spans) if tokens else math.nan


def agreement(theirs: Sequence[Sequence[int]], ours: Sequence[Sequence[int]]) -> float:
    """Return mean share of an answer before the first token that differs."""
    shares = []
    for a, b in zip(theirs, ours, strict=True):
        length = min(len(a), len(b))
        same = next((i for i in range(length) if a[i] != b[i]), length)
        shares.append(same / length if length else 1.0)
    return sum(shares) / len(shares)


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures of one contestant at one number of slots. decode, overall: tokens per second of all
    blocks (their harmonic mean, as nearly all answers have the same length), of the slowest and of
    the fastest; per_round: tokens of a round; same: share of answers like the baseline's."""

    name: str
    decode: tuple[float, float, float]
    overall: tuple[float, float, float]
    prefill_seconds: float
    per_round: float
    same: float


def figures(blocks: Sequence[Mapping[str, Mapping[str, Any]]], baseline: str) -> list[Figures]:
    """Return figures of all contestants. blocks: contestant -> a Reply as JSON, in each; baseline:
    the contestant whose answers are the reference."""
    return [_figures(blocks, name, baseline) for name in blocks[0]] if blocks else []


def _figures(
    blocks: Sequence[Mapping[str, Mapping[str, Any]]], name: str, baseline: str
) -> Figures:
    def spread(key: str) -> tuple[float, float, float]:
        values = [block[name][key] for block in blocks if math.isfinite(block[name][key])]
        if not values:
            return math.nan, math.nan, math.nan
        return statistics.harmonic_mean(values), min(values), max(values)

    same = [agreement(block[name]["answers"], block[baseline]["answers"]) for block in blocks]
    return Figures(
        name,
        spread("decode"),
        spread("overall"),
        statistics.fmean(block[name]["prefill_seconds"] for block in blocks),
        statistics.median(block[name]["per_round"] for block in blocks),
        sum(same) / len(same),
    )


def by_task(
    blocks: Sequence[Mapping[str, Mapping[str, Any]]], tasks: Sequence[Sequence[str]], name: str
) -> dict[str, float]:
    """Task -> one request's tokens per second, its prompt included, for a contestant. tasks: of
    each prompt of each block."""
    tokens: defaultdict[str, int] = defaultdict(int)
    seconds: defaultdict[str, float] = defaultdict(float)
    for block, names in zip(blocks, tasks, strict=True):
        answered = block[name]
        for count, spent, task in zip(answered["counts"], answered["seconds"], names, strict=True):
            tokens[task] += count
            seconds[task] += spent
    return {task: tokens[task] / seconds[task] for task in sorted(tokens)}


def best(found: Sequence[Figures], names: Sequence[str], key: str) -> str:
    """Return the contestant with the highest rate. key: 'decode' or 'overall'."""
    return max((f for f in found if f.name in names), key=lambda f: getattr(f, key)[0]).name


def ratio(ours: Sequence[float], base: Sequence[float], tasks: Sequence[str]) -> Ratio:
    """Return how much faster the first is over the same blocks, by rates, with its 95 % interval.

    tasks: of each block, resampled apart."""
    pairs = [Pair(a, b, 1.0, task) for a, b, task in zip(ours, base, tasks, strict=True)]
    return paired_ratio(pairs)
