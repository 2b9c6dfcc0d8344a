"""Requests that arrive at random, through the continuous batcher: what a server would see.

Arrivals are Poisson at shares of the capacity, which is the rate at which plain decoding answers
when its queue is never empty. Every policy gets the same prompts at the same times, in segments
that take turns; latencies count from the time of arrival, not from when the engine took the
request.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from smart_decoding.bench.blocks import Prompt, run_block
from smart_decoding.bench.options import BASELINE

if TYPE_CHECKING:
    from smart_decoding.engine.engine import Engine
    from smart_decoding.engine.request import Request

SECONDS = 45.0  # of arrivals, for each policy and load
SEGMENTS = 3  # in which they come
CAPACITY_BLOCKS = 2  # blocks of as many prompts as run at once
Wave = Sequence[tuple[float, Prompt]]  # seconds from the start, and who arrives then
PERCENTILES = (50, 95, 99)
RESOLUTION = 1e-6  # seconds: who comes that soon is here


@dataclass(frozen=True, slots=True)
class Time:
    """What tells the time and lets it pass."""

    clock: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], object] = time.sleep


REAL = Time()


@dataclass(frozen=True, slots=True)
class Served:
    """One request under load: its prompt, tokens, and seconds: ttft and whole latency since
    arrival, tpot."""

    index: int
    tokens: list[int]
    ttft: float
    latency: float
    tpot: float


@dataclass(frozen=True, slots=True)
class Segment:
    """Requests of one stretch, its seconds until the last was answered, and the mean of requests
    that decoded in a round."""

    served: list[Served]
    seconds: float
    running: float


def measure_load(
    engines: Mapping[str, Engine],
    prompts: Mapping[str, Sequence[Prompt]],
    shares: Sequence[float],
    seed: int,
    seconds: float | None,
    timing: Time = REAL,
) -> dict[str, Any]:
    """Serves every share of the capacity with every engine. seconds: for all of it, about; None
    takes SECONDS for each policy and share."""
    mixed = in_turn(prompts)
    slots = engines[BASELINE].config.max_num_seqs
    rate, tokens_per_s = capacity(engines[BASELINE], mixed, slots, timing.clock)
    each = SECONDS if seconds is None else min(SECONDS, seconds / len(shares) / len(engines))
    for engine in engines.values():
        run_block(engine, mixed[:2], mixed[2:], 2, timing.clock)  # a warm-up
    runs: list[dict[str, Any]] = []
    with tqdm(total=len(shares) * SEGMENTS, desc="load", unit="segment", leave=False) as bar:
        for share in shares:
            segments: dict[str, list[Segment]] = {label: [] for label in engines}
            for number in range(SEGMENTS):
                wave = arrivals(mixed, share * rate, each / SEGMENTS, (seed, number))
                for label in _turns(list(engines), number):
                    segments[label].append(serve(engines[label], wave, timing))
                bar.update()
            plain = segments[BASELINE]
            runs += [
                load_run(label, share, share * rate, of, plain) for label, of in segments.items()
            ]
    return {
        "slots": slots,
        "capacity_requests_per_s": rate,
        "capacity_tokens_per_s": tokens_per_s,
        "runs": runs,
    }


def _turns(labels: Sequence[str], number: int) -> Sequence[str]:
    turn = number % len(labels)
    return [*labels[turn:], *labels[:turn]]


def capacity(
    engine: Engine, prompts: Sequence[Prompt], slots: int, clock: Callable[[], float]
) -> tuple[float, float]:
    """Requests and tokens per second, prompts included, while the queue is never empty."""
    tokens = seconds = answered = length = 0.0
    for number in range(CAPACITY_BLOCKS):
        start = number * slots % len(prompts)
        chunk = [*prompts[start:], *prompts[:start]][:slots]
        block = run_block(
            engine, chunk, [*prompts[start + slots :], *prompts[:start]], slots, clock
        )
        tokens += block.total_tokens
        seconds += block.total_seconds
        answered += len(block.answers)
        length += sum(len(a.tokens) + a.looped for a in block.answers.values())
    return tokens / seconds / (length / answered), tokens / seconds


def arrivals(prompts: Sequence[Prompt], rate: float, seconds: float, seed: tuple[int, int]) -> Wave:
    """(seconds from the start, prompt) of Poisson arrivals at `rate` per second; at least one."""
    rng = np.random.default_rng(seed)
    count = max(1, rng.poisson(rate * seconds))
    times = np.sort(rng.uniform(0.0, seconds, count))
    first = int(rng.integers(len(prompts)))
    return [(float(at), prompts[(first + i) % len(prompts)]) for i, at in enumerate(times)]


def serve(engine: Engine, wave: Wave, timing: Time) -> Segment:
    """Answers requests as they arrive, until the last is answered. The engine is empty before and
    after."""
    clock = timing.clock
    started = clock()
    coming = deque(enumerate(wave))
    decoding = []
    taken: list[tuple[float, Prompt, Request]] = []
    try:
        while coming or engine.has_unfinished_requests:
            now = clock() - started
            while coming and coming[0][1][0] <= now + RESOLUTION:
                number, (at, prompt) = coming.popleft()
                (request,) = engine.add_request(
                    f"load-{number}", prompt.tokens, prompt.params, prompt.media
                )
                taken.append((at, prompt, request))
            if not engine.has_unfinished_requests:
                timing.sleep(coming[0][1][0] - now)
                continue
            touched = engine.step(
                lambda: [""] if coming and coming[0][1][0] <= clock() - started else []
            )
            if touched and engine.last_round is not None and engine.last_round.round.batch.size:
                decoding.append(engine.last_round.round.batch.size)
        seconds = clock() - started
    finally:
        for _, _, request in taken:
            if not request.finished:
                engine.abort(request.id)
    served = [_served(prompt, request, started + at) for at, prompt, request in taken]
    return Segment(served, seconds, float(np.mean(decoding)) if decoding else 0.0)


def load_run(
    label: str, share: float, rate: float, segments: Sequence[Segment], baseline: Sequence[Segment]
) -> dict[str, Any]:
    """The figures of one policy at one load: percentiles over requests, ratios of the same
    requests' times."""
    served = [one for segment in segments for one in segment.served]
    base = [one for segment in baseline for one in segment.served]
    ratios = [
        a.tpot / b.tpot for a, b in zip(served, base, strict=True) if a.tpot > 0 and b.tpot > 0
    ]
    seconds = sum(segment.seconds for segment in segments)
    return {
        "policy": label,
        "load": share,
        "requests_per_s": rate,
        "requests": len(served),
        "seconds": seconds,
        "tokens_per_s": sum(len(one.tokens) for one in served) / seconds,
        "running": float(np.mean([segment.running for segment in segments])),
        "ttft_ms": _percentiles([one.ttft for one in served]),
        "tpot_ms": _percentiles([one.tpot for one in served]),
        "latency_ms": _percentiles([one.latency for one in served]),
        "tpot_ratio": float(np.median(ratios)) if ratios else math.nan,
        "identical": [one.tokens for one in served] == [one.tokens for one in base],
    }


def in_turn(prompts: Mapping[str, Sequence[Prompt]]) -> list[Prompt]:
    """The first prompts of all tasks, then the second ones, and so on."""
    longest = max(map(len, prompts.values()), default=0)
    return [of_task[i] for i in range(longest) for of_task in prompts.values() if i < len(of_task)]


def _served(prompt: Prompt, request: Request, arrived: float) -> Served:
    metrics = request.metrics
    tokens = list(request.output)
    first = arrived if metrics.first_token is None else metrics.first_token
    end = first if metrics.finished is None else metrics.finished
    tpot = (end - first) / (len(tokens) - 1) if len(tokens) > 1 else math.nan
    return Served(prompt.index, tokens, first - arrived, end - arrived, tpot)


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    known = [value for value in seconds if math.isfinite(value)]
    return {
        f"p{p}": 1e3 * float(np.percentile(known, p)) if known else math.nan for p in PERCENTILES
    }
