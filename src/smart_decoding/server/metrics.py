"""Prometheus metrics, in vLLM's names with our prefix where vLLM has them.

Written by the engine thread between rounds, read by the event loop: numbers that only grow need
no lock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from smart_decoding.server.exposition import Exposition, Histogram

if TYPE_CHECKING:
    from smart_decoding.core.cost import CostModel
    from smart_decoding.core.policies.base import Round
    from smart_decoding.engine.engine import Engine, RoundRecord
    from smart_decoding.engine.request import Request
    from smart_decoding.llm import LLM

CHECK_EVERY = 8  # rounds, of which one is compared with its prediction
_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)
_WHOLE = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0)

# What a policy's statistics are called here: (their key, metric, what it says).
_POLICY_GAUGES = (
    (
        "estimated_speedup",
        "speedup_estimate",
        "Tokens per second over plain decoding's, as estimated.",
    ),
    ("calibration_error", "calibration_error", "Accepted over expected nodes, minus 1."),
    ("share_off", "speculation_off_share", "Share of recent rounds that did not draft."),
    ("probe_seconds", "probe_seconds", "Seconds that exploration has cost."),
)
# (key of `Metrics.counts`, metric, what it says).
_COUNTERS = (
    ("prompt_tokens", "prompt_tokens_total", "Prompt tokens of answers that have begun."),
    ("tokens", "generation_tokens_total", "Tokens generated."),
    ("preemptions", "num_preemptions_total", "Answers put back for lack of KV memory."),
    ("drafts", "spec_decode_num_drafts_total", "Trees of which nodes were verified."),
    ("verified", "spec_decode_num_draft_tokens_total", "Tree nodes verified."),
    ("accepted", "spec_decode_num_accepted_tokens_total", "Tree nodes accepted."),
    (
        "drafted",
        "spec_decode_num_proposed_tokens_total",
        "Tree nodes drafted, pruned ones too.",
    ),
    ("rounds", "rounds_total", "Rounds of the engine."),
    (
        "drafting_rounds",
        "drafting_rounds_total",
        "Rounds that speculated; the others had speculation off.",
    ),
    ("levels", "draft_levels_total", "Levels drafted by the model drafter."),
    ("rows", "verify_rows_total", "Rows of the verifying forwards."),
)
# (key of `Metrics.seconds`, metric, what it says).
_SECONDS = (
    ("round", "round_seconds_total", "Seconds in rounds."),
    (
        "controller",
        "controller_seconds_total",
        "Seconds in rounds outside of forwards, sampling and KV.",
    ),
    (
        "checked_round",
        "checked_round_seconds_total",
        f"Real seconds of every {CHECK_EVERY}th decoding round.",
    ),
    (
        "predicted_round",
        "predicted_round_seconds_total",
        "The cost model's seconds for the same rounds.",
    ),
)


class Metrics:
    """An observer of the worker that counts."""

    def __init__(self, model_name: str) -> None:
        self.counts: Counter[str] = Counter()
        self.ended_by: Counter[str] = Counter()
        self.seconds = {key: 0.0 for key, _, _ in _SECONDS}
        self.ttft = Histogram(_FIRST)
        self.tpot = Histogram(_TOKEN)
        self.e2e = Histogram(_WHOLE)
        self._exposition = Exposition(model_name)
        # What the event loop knows: (name, what it says, value).
        self.shared: Callable[[], Iterable[tuple[str, str, float]]] = tuple
        self._engine: Engine | None = None
        self._cost: CostModel | None = None
        self._last: RoundRecord | None = None

    # --- the engine thread's calls ---

    def start(self, llm: LLM) -> None:
        """Counts from the engine's next round on."""
        self._engine = llm.engine
        self._last = llm.engine.last_round

    def before(self, engine: Engine) -> None:
        """Keeps the costs, as they are before the round corrects them."""
        self._cost = engine.policy.cost  # immutable

    def after(self, engine: Engine, touched: Sequence[Request]) -> None:
        """Counts the round and the answers that have begun in it."""
        record = engine.last_round
        if record is None or record is self._last:
            return
        self._last = record
        self._count_round(record)
        for request in touched:
            # More output than a token: a prompt that was run again after a preemption.
            if request.metrics.rounds == 0 and len(request.output) <= 1:
                self.ttft.observe(request.metrics.ttft or 0.0)
                self.counts["prompt_tokens"] += len(request.prompt)

    def _count_round(self, record: RoundRecord) -> None:
        counts = self.counts
        done = record.round
        counts["rounds"] += 1
        counts["tokens"] += record.emitted
        counts["accepted"] += record.accepted
        counts["rows"] += done.verify_rows
        if done.rule is not None:
            counts["drafting_rounds"] += 1
            counts["levels"] += len(done.level_widths)
            counts["drafts"] += len(set(done.trees.owner[done.kept].tolist()))
            counts["verified"] += len(done.kept)
            counts["drafted"] += len(done.trees)
        self.seconds["round"] += record.seconds
        self.seconds["controller"] += record.controller_seconds
        if self._cost is not None and done.batch.size and counts["rounds"] % CHECK_EVERY == 0:
            self.seconds["checked_round"] += done.verify_seconds + sum(done.level_seconds)
            self.seconds["predicted_round"] += predicted_seconds(self._cost, done)

    def ended(self, request: Request, reason: str) -> None:
        """Counts an answer that is over."""
        self.ended_by[reason] += 1
        metrics = request.metrics
        self.counts["preemptions"] += metrics.preemptions
        if reason not in ("stop", "length"):
            return
        if metrics.finished is None or metrics.first_token is None:
            return
        self.e2e.observe(metrics.finished - metrics.arrival)
        if len(request.output) > 1:
            seconds = metrics.finished - metrics.first_token
            self.tpot.observe(seconds / (len(request.output) - 1))

    # --- the event loop's ---

    def render(self) -> str:
        """The text exposition format."""
        return "".join(f"{line}\n" for line in self._lines())

    def _lines(self) -> Iterator[str]:
        out = self._exposition
        yield from self._engine_gauges()
        for key, name, text in _COUNTERS:
            yield from out.number(name, "counter", text, self.counts[key])
        for key, name, text in _SECONDS:
            yield from out.number(name, "counter", text, self.seconds[key])
        yield from out.by_reason(
            "request_success_total", "Answers that ended, by reason.", self.ended_by
        )
        for name, text, histogram in (
            ("time_to_first_token_seconds", "Arrival to first token.", self.ttft),
            ("time_per_output_token_seconds", "Mean per answer, first token excluded.", self.tpot),
            ("e2e_request_latency_seconds", "Arrival to end.", self.e2e),
        ):
            yield from out.histogram(name, text, histogram)

    def _engine_gauges(self) -> Iterator[str]:
        if self._engine is None:
            return
        scheduler = self._engine.scheduler
        pool = self._engine.pool
        used = 1 - pool.available / pool.pages
        for name, text, value in (
            ("num_requests_running", "Answers in the running batch.", len(scheduler.running)),
            ("num_requests_waiting", "Answers waiting for a slot.", len(scheduler.waiting)),
            ("kv_cache_usage_perc", "Share of KV pages in use, 1 is all.", used),
            *self.shared(),
        ):
            yield from self._exposition.number(name, "gauge", text, value)
        stats = self._engine.policy.stats()
        for key, name, text in _POLICY_GAUGES:
            if key in stats:
                yield from self._exposition.number(name, "gauge", text, stats[key])


def predicted_seconds(cost: CostModel, done: Round) -> float:
    """What `cost` says a round's forwards take."""
    batch = done.batch
    context = batch.mean_context
    seconds = float(cost.verify_seconds(batch.size, done.verify_rows, context))
    return seconds + sum(cost.levels_seconds(batch.size, done.level_widths, context))
