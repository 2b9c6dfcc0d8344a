"""Counts of the scheduler's steps, for Prometheus from the process that it runs in. Imports no
vLLM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

HELP = {
    "steps_on": "Steps that verified drafts",
    "steps_off": "Decoding steps that verified none",
    "verified": "Draft tokens that were verified",
    "accepted": "Draft tokens that were accepted",
    "explorations": "Steps of a length that was not predicted best",
    "seconds": "Seconds spent on choosing and learning",
}


@dataclass(slots=True)
class Step:
    """One step of the engine.

    batch: sequences in it. length: K of the step before, whose drafts it verifies. drafts: its own
    K. verified: draft tokens in all. accepted: of each request that decoded. clean: whether it
    prefilled nothing. exploring: whether `length` was an exploration."""

    batch: int
    length: int
    drafts: int
    verified: int = 0
    accepted: Sequence[int] = ()
    clean: bool = True
    exploring: bool = False


@dataclass
class Counters:
    """Counts that only grow, exported as metrics by these names."""

    steps_on: int = 0  # steps that verified drafts
    steps_off: int = 0  # decoding steps that did not
    verified: int = 0
    accepted: int = 0
    explorations: int = 0  # steps that explored
    seconds: float = 0.0  # spent on choosing and learning
    lengths: dict[int, int] = field(default_factory=dict)  # K -> steps drafted with it

    def add(self, step: Step) -> None:
        """Count a step."""
        self.verified += step.verified
        self.accepted += sum(step.accepted)
        self.steps_on += step.verified > 0
        self.steps_off += not step.verified
        self.explorations += step.exploring
        self.lengths[step.drafts] = self.lengths.get(step.drafts, 0) + 1


class CounterCollector:
    """A collector for prometheus_client."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters

    def collect(self) -> Iterator[Any]:
        """Return a family for each counter."""
        from prometheus_client.core import CounterMetricFamily

        for name, text in HELP.items():
            yield CounterMetricFamily(
                f"smart_vllm_{name}", text, value=getattr(self._counters, name)
            )
        lengths = CounterMetricFamily(
            "smart_vllm_length", "Steps by draft length", labels=["tokens"]
        )
        for length, steps in sorted(dict(self._counters.lengths).items()):
            lengths.add_metric([str(length)], steps)
        yield lengths


def serve_metrics(counters: Counters, port: int) -> None:
    """Answer on http://127.0.0.1:`port`/metrics from a thread, as long as the process lives.

    Raises OSError if the port is taken."""
    from prometheus_client import CollectorRegistry, start_http_server

    registry = CollectorRegistry()
    registry.register(CounterCollector(counters))
    start_http_server(port, "127.0.0.1", registry)
