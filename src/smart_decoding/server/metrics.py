"""Prometheus metrics, in vLLM's names where vLLM has them: with our prefix and with its own.

Counted by the engine thread between rounds, read by the event loop: numbers that only grow need
no lock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Histogram, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from smart_decoding.core.policies.statistics import KINDS
from smart_decoding.engine.metrics import COUNTERS, TTFT_LIMITS, Record, gauges
from smart_decoding.server.worker import Watcher

if TYPE_CHECKING:
    from smart_decoding.engine.engine import Engine, RoundRecord
    from smart_decoding.engine.request import Request
    from smart_decoding.llm import LLM


_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)
_WHOLE = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0)

# A new metric needs a line here, and `metrics.counts[NAME] += 1` where it is counted.
_COUNTERS = {
    "prompt_tokens": "Prompt tokens of answers that have begun.",
    "generation_tokens": "Tokens generated.",
    "prefix_cache_queries": "Prompt tokens looked up in the prefix cache.",
    "prefix_cache_hits": "Prompt tokens found in the prefix cache.",
    "num_preemptions": "Answers put back: for lack of KV memory, or for another client's turn.",
    "spec_decode_num_drafts": "Trees of which nodes were verified.",
    "spec_decode_num_draft_tokens": "Tree nodes verified.",
    "spec_decode_num_accepted_tokens": "Tree nodes accepted.",
    "spec_decode_num_proposed_tokens": "Tree nodes drafted, pruned ones too.",
    "rounds": "Rounds of the engine.",
    "drafting_rounds": "Rounds that speculated; the others had speculation off.",
    "draft_levels": "Levels drafted by the model drafter.",
    "verify_rows": "Rows of the verifying forwards.",
    "round_seconds": "Seconds in rounds.",
    "controller_seconds": "Seconds in rounds outside of forwards, sampling and KV.",
}
_COUNTERS_BY = {  # name: (help text, its label besides the model's name)
    "request_success": ("Answers that ended, by reason.", "finished_reason"),
    "spec_decode_num_accepted_tokens_per_pos": ("Tree nodes accepted, by depth.", "position"),
}
_GAUGES = {
    "num_requests_running": "Answers in the running batch.",
    "num_requests_waiting": "Answers waiting for a slot.",
    "kv_cache_usage_perc": "Share of KV pages that requests hold, 1 is all.",
}
_HISTOGRAMS = {
    "time_to_first_token_seconds": ("Arrival to first token.", TTFT_LIMITS),
    "inter_token_latency_seconds": ("Between the rounds that gave an answer tokens.", _TOKEN),
    "time_per_output_token_seconds": ("Mean per answer, first token excluded.", _TOKEN),
    "e2e_request_latency_seconds": ("Arrival to end.", _WHOLE),
}
# Key of a policy's statistics: (name, help text).
_POLICY_GAUGES = {
    "estimated_speedup": (
        "speedup_estimate",
        "Tokens per second over plain decoding's, as estimated.",
    ),
    "calibration_error": ("calibration_error", "Accepted over expected nodes, minus 1."),
    "share_off": ("speculation_off_share", "Share of recent rounds that did not draft."),
    "exploration_seconds": ("exploration_seconds", "Seconds that exploration has cost."),
}
# Of recent rounds by kind: (end of the key of a policy's statistics, name, help text).
_BELIEFS = (
    ("predicted_seconds", "predicted_seconds_ratio", "Predicted over real seconds."),
    ("expected_tokens", "expected_tokens_ratio", "Expected over real tokens."),
)
# Metrics that vLLM has too: our name, and vLLM's names.
_VLLM = {
    **{name: (name,) for name in (*_GAUGES, *COUNTERS, *_COUNTERS_BY)},
    "time_to_first_token_seconds": ("time_to_first_token_seconds",),
    "e2e_request_latency_seconds": ("e2e_request_latency_seconds",),
    # The second is what older versions call it.
    "inter_token_latency_seconds": ("inter_token_latency_seconds", "time_per_output_token_seconds"),
    "time_per_output_token_seconds": ("request_time_per_output_token_seconds",),
}


class Metrics(Watcher):
    """An observer of the worker that counts, and a collector for prometheus_client.

    counts: plain numbers, since they are counted in every round; record: counts of the `LLM`
    itself.
    """

    def __init__(self, model_name: str) -> None:
        self.record = Record()
        self.counts = dict.fromkeys(_COUNTERS.keys() - self.record.counts.keys(), 0.0)
        self._model = model_name
        self._registry = CollectorRegistry()
        self.histograms = {
            name: Histogram(
                f"smart:{name}", text, ("model_name",), buckets=buckets, registry=self._registry
            ).labels(model_name)
            for name, (text, buckets) in _HISTOGRAMS.items()
        }
        # Gauges of the event loop: (name, help text, value).
        self.shared: Callable[[], Iterable[tuple[str, str, float]]] = tuple
        self._engine: Engine | None = None
        self._last: RoundRecord | None = None
        self._tokens_at: dict[Request, float] = {}  # second of a request's last tokens

    # --- the engine thread's calls ---

    def start(self, llm: LLM) -> None:
        """Count from the engine's next round on."""
        self._engine = llm.engine
        self._last = llm.engine.last_round
        self.record = llm.record

    def after(self, engine: Engine, touched: Sequence[Request]) -> None:
        """Count the round and the answers that have got tokens in it."""
        record = engine.last_round
        if record is None or record is self._last:
            return
        self._last = record
        self._count_round(record)
        now = time.monotonic()
        for request in touched:
            if request in self._tokens_at:
                waited = now - self._tokens_at[request]
                self.histograms["inter_token_latency_seconds"].observe(waited)
            else:
                first = request.metrics.ttft or 0.0
                self.histograms["time_to_first_token_seconds"].observe(first)
            self._tokens_at[request] = now

    def _count_round(self, record: RoundRecord) -> None:
        counts = self.counts
        done = record.round
        counts["rounds"] += 1
        counts["verify_rows"] += done.verify_rows
        if done.rule is not None:
            counts["drafting_rounds"] += 1
            counts["draft_levels"] += len(done.level_widths)
            counts["spec_decode_num_proposed_tokens"] += len(done.trees)
        counts["round_seconds"] += record.seconds
        counts["controller_seconds"] += record.controller_seconds

    def ended(self, request: Request, reason: str) -> None:
        """Count an answer that is over."""
        self._tokens_at.pop(request, None)
        metrics = request.metrics
        if reason not in ("stop", "length"):
            return
        if metrics.finished is None or metrics.first_token is None:
            return
        took = metrics.finished - metrics.arrival
        self.histograms["e2e_request_latency_seconds"].observe(took)
        if len(request.output) > 1:
            seconds = metrics.finished - metrics.first_token
            mean = seconds / (len(request.output) - 1)
            self.histograms["time_per_output_token_seconds"].observe(mean)

    # --- the event loop's ---

    def collect(self) -> Iterator[Metric]:
        """Return all metrics, for prometheus_client."""
        for metric in (*self._gauges(), *self._counted(), *self._registry.collect()):
            metric.samples = [each for each in metric.samples if not each.name.endswith("_created")]
            yield metric
            for name in _VLLM.get(metric.name.removeprefix("smart:"), ()):
                yield _renamed(metric, f"vllm:{name}")

    def _counted(self) -> Iterator[Metric]:
        counts = {**self.counts, **self.record.counts}
        for name, text in _COUNTERS.items():
            family = CounterMetricFamily(f"smart:{name}", text, labels=("model_name",))
            family.add_metric((self._model,), counts[name])
            yield family
        depths = {str(i): count for i, count in enumerate(list(self.record.accepted))}
        by = {
            "request_success": self.record.ends.copy(),
            "spec_decode_num_accepted_tokens_per_pos": depths,
        }
        for name, (text, label) in _COUNTERS_BY.items():
            family = CounterMetricFamily(f"smart:{name}", text, labels=("model_name", label))
            for value, count in sorted(by[name].items()):
                family.add_metric((self._model, value), count)
            yield family

    def _gauges(self) -> Iterator[Metric]:
        if self._engine is None:
            return
        for name, value in gauges(self._engine).items():
            yield self._gauge(name, _GAUGES[name], value)
        for each in self.shared():
            yield self._gauge(*each)
        stats: Mapping[str, float] = self._engine.policy.stats()
        for key, (name, text) in _POLICY_GAUGES.items():
            if key in stats:
                yield self._gauge(name, text, stats[key])
        for end, name, text in _BELIEFS:
            family = GaugeMetricFamily(f"smart:{name}", text, labels=("model_name", "round"))
            for kind in KINDS:
                if f"{kind}_{end}" in stats:
                    family.add_metric((self._model, kind), stats[f"{kind}_{end}"])
            yield family

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"smart:{name}", text, labels=("model_name",))
        family.add_metric((self._model,), value)
        return family


def _renamed(metric: Metric, name: str) -> Metric:
    """Return the metric under another name, with vLLM's label for the engine's number."""
    renamed = Metric(name, metric.documentation, metric.type)
    renamed.samples = [
        each._replace(
            name=name + each.name.removeprefix(metric.name), labels={**each.labels, "engine": "0"}
        )
        for each in metric.samples
    ]
    return renamed
