"""The scheduler's counters for Prometheus, from the process that it runs in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smart_decoding.integrations.vllm.lengths import Counters

HELP = {
    "steps_on": "Steps that verified drafts",
    "steps_off": "Decoding steps that verified none",
    "verified": "Draft tokens that were verified",
    "accepted": "Draft tokens that were accepted",
    "explorations": "Steps of a length that was not predicted best",
    "seconds": "Seconds spent on choosing and learning",
}


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
