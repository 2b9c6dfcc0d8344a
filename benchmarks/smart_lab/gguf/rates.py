"""Chunks of prompts answered by one contestant, and what many of them say."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from smart_decoding.bench.statistics import Pair, Ratio, paired_ratio


@dataclass(frozen=True, slots=True)
class Span:
    """One answer of a chunk. first, end: seconds from sending to its first and last token; tokens:
    those that count."""

    first: float
    end: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Reply:
    """One chunk answered. decode: `decode_rate`; overall: tokens over seconds, prompts included;
    prefill_seconds: until each has a token; per_round: tokens of a request in a round."""

    decode: float
    overall: float
    prefill_seconds: float
    per_round: float
    answers: list[list[int]]

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def decode_rate(spans: Sequence[Span]) -> float:
    """Tokens per second: all but the requests' first ones, from the moment when each has its first
    to the last one's end. NaN where all ended before that.

    A sum of the requests' own rates would be a speed that nobody ever had: what ends early counts
    in it as if its place were filled again at once."""
    begin = max(span.first for span in spans)
    end = max(span.end for span in spans)
    return sum(span.tokens for span in spans) / (end - begin) if end > begin else math.nan


def agreement(theirs: Sequence[Sequence[int]], ours: Sequence[Sequence[int]]) -> float:
    """Mean share of an answer before the first token that differs."""
    shares = []
    for a, b in zip(theirs, ours, strict=True):
        length = min(len(a), len(b))
        same = next((i for i in range(length) if a[i] != b[i]), length)
        shares.append(same / length if length else 1.0)
    return sum(shares) / len(shares)


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one contestant at one number of slots: tokens per second of all blocks (their harmonic
    mean, as nearly all answers go up to the same length), of the slowest and of the fastest,
    decoding and overall; tokens of a round; and the share of answers like the baseline's."""

    name: str
    decode: tuple[float, float, float]
    overall: tuple[float, float, float]
    prefill_seconds: float
    per_round: float
    same: float


def figures(blocks: Sequence[Mapping[str, Mapping[str, Any]]], baseline: str) -> list[Figures]:
    """blocks: contestant -> a Reply as JSON, in each; baseline: whose answers the others' are
    compared with."""
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


def best(found: Sequence[Figures], names: Sequence[str], key: str) -> str:
    """Of these contestants the one with the highest rate. key: 'decode' or 'overall'."""
    return max((f for f in found if f.name in names), key=lambda f: getattr(f, key)[0]).name


def ratio(ours: Sequence[float], base: Sequence[float], tasks: Sequence[str]) -> Ratio:
    """How much faster the first is over the same blocks, by rates, with its 95 % interval.

    tasks: of each block, resampled apart."""
    pairs = [Pair(a, b, 1.0, task) for a, b, task in zip(ours, base, tasks, strict=True)]
    return paired_ratio(pairs)
