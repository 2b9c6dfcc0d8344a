"""Counters of an engine, in vLLM's names: the result of `LLM.get_metrics`, and a part of the
server's metrics."""

from __future__ import annotations

import copy
from collections import Counter as Counts
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from smart_decoding.engine.observers import Observer

if TYPE_CHECKING:
    from smart_decoding.engine.engine import Engine
    from smart_decoding.engine.request import Request

# seconds: limits of the histograms of `LLM.get_metrics`, of times to the first and the last token
TTFT_LIMITS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

COUNTERS = (
    "prompt_tokens",  # of answers that have begun
    "generation_tokens",
    "prefix_cache_queries",  # tokens of prompts
    "prefix_cache_hits",  # tokens of prompts
    "num_preemptions",
    "spec_decode_num_drafts",  # trees
    "spec_decode_num_draft_tokens",  # nodes verified
    "spec_decode_num_accepted_tokens",  # unlike vLLM's, without tokens behind an answer's end
)


@dataclass
class Metric:
    """A named number, or several."""

    name: str
    labels: dict[str, str] = field(default_factory=dict, kw_only=True)


@dataclass
class Counter(Metric):
    """A number that only grows."""

    value: int


@dataclass
class Vector(Metric):
    """Counters by position, from 0."""

    values: list[int]


@dataclass
class Gauge(Metric):
    """A number that goes up and down."""

    value: float


@dataclass
class Histogram(Metric):
    """Counts of values. buckets: upper limit -> number of values up to it; the last limit is
    '+Inf'."""

    count: int = 0
    sum: float = 0.0
    buckets: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys([*map(str, TTFT_LIMITS), "+Inf"], 0)
    )

    def observe(self, value: float) -> None:
        """Count a value."""
        self.count += 1
        self.sum += value
        for limit in self.buckets:
            self.buckets[limit] += value <= float(limit)


def gauges(engine: Engine) -> dict[str, float]:
    """Return the numbers of running and waiting requests, and the share of KV memory in use."""
    return {
        "num_requests_running": len(engine.scheduler.running),
        "num_requests_waiting": len(engine.scheduler.waiting),
        "kv_cache_usage_perc": engine.pool.used,
    }


class Record(Observer):
    """Counts rounds and answers, as an observer of the engine thread. Growing numbers need no lock.

    ends: ended answers by reason; accepted: accepted nodes at each depth.
    """

    def __init__(self) -> None:
        self.counts = dict.fromkeys(COUNTERS, 0)
        self.ends: Counts[str] = Counts()
        self.accepted: list[int] = []
        self._begun: set[Request] = set()
        self._first = Histogram("vllm:time_to_first_token_seconds")
        self._whole = Histogram("vllm:e2e_request_latency_seconds")

    def after(self, engine: Engine, touched: Sequence[Request]) -> None:
        """Count the round."""
        done = engine.last_round
        if done is None or not touched:  # drafts were dropped, or prompts go on
            return
        counts = self.counts
        counts["generation_tokens"] += done.emitted
        for request in touched:
            if request not in self._begun:
                self._begun.add(request)
                counts["prompt_tokens"] += len(request.prompt)
                counts["prefix_cache_queries"] += len(request.prompt)
                counts["prefix_cache_hits"] += request.metrics.cached_tokens
        kept = done.round.kept
        if not len(kept):
            return
        counts["spec_decode_num_drafts"] += len(set(done.round.trees.owner[kept].tolist()))
        counts["spec_decode_num_draft_tokens"] += len(kept)
        for length in done.accepted:
            counts["spec_decode_num_accepted_tokens"] += length
            self.accepted += [0] * (length - len(self.accepted))
            for depth in range(length):
                self.accepted[depth] += 1

    def ended(self, request: Request, reason: str) -> None:
        """Count an ended answer."""
        metrics = request.metrics
        self._begun.discard(request)
        self.ends[reason] += 1
        self.counts["num_preemptions"] += metrics.preemptions
        if metrics.ttft is not None and metrics.finished is not None:
            self._first.observe(metrics.ttft)
            self._whole.observe(metrics.finished - metrics.arrival)

    def metrics(self, engine: Engine) -> list[Metric]:
        """Return all metrics as they stand. engine: the source of the gauges."""
        ended = [
            Counter("vllm:request_success", count, labels={"finished_reason": reason})
            for reason, count in list(self.ends.items())
        ]
        return [
            *(Gauge(f"vllm:{name}", value) for name, value in gauges(engine).items()),
            *(Counter(f"vllm:{name}", value) for name, value in self.counts.items()),
            *ended,
            Vector("vllm:spec_decode_num_accepted_tokens_per_pos", list(self.accepted)),
            *copy.deepcopy([self._first, self._whole]),
        ]
