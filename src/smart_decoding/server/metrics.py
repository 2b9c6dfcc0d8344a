"""Prometheus metrics, in vLLM's names with our prefix where vLLM has them. Written by the engine
thread between rounds, read by the event loop: numbers that only grow need no lock."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from smart_decoding.core.cost import CostModel
from smart_decoding.core.policies.protocol import Round
from smart_decoding.engine.engine import Engine, RoundRecord
from smart_decoding.engine.request import Request
from smart_decoding.llm import LLM

CHECK_EVERY = 8  # rounds, of which one is compared with its prediction
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)
_WHOLE = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0)


class Histogram:
    """Counts of seconds up to each bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds, self.counts, self.sum = tuple(bounds), [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str, label: str) -> Iterator[str]:
        total = 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            total += count
            yield f'{name}_bucket{{{label},le="{"+Inf" if bound == float("inf") else bound}"}} {total}'
        yield f"{name}_sum{{{label}}} {self.sum:.9g}"
        yield f"{name}_count{{{label}}} {total}"


class Metrics:
    """An observer of the worker that counts."""

    def __init__(self, model_name: str) -> None:
        escaped = model_name.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        self._label = f'model_name="{escaped}"'
        self.counts: Counter[str] = Counter()
        self.ended_by: Counter[str] = Counter()
        self.seconds = dict.fromkeys(
            ("round", "controller", "checked_round", "predicted_round"), 0.0
        )
        self.ttft, self.tpot, self.e2e = Histogram(_FIRST), Histogram(_TOKEN), Histogram(_WHOLE)
        self._engine: Engine | None = None
        self._cost: CostModel | None = None
        self._last: RoundRecord | None = None

    # --- the engine thread's calls ---

    def start(self, llm: LLM) -> None:
        self._engine, self._last = llm.engine, llm.engine.last_round

    def before(self, engine: Engine) -> None:
        self._cost = engine.policy.cost  # as believed before the round corrects it; immutable

    def after(self, engine: Engine, touched: Sequence[Request]) -> None:
        record = engine.last_round
        if record is None or record is self._last:
            return
        self._last, counts, done = record, self.counts, record.round
        counts["rounds"] += 1
        counts["tokens"] += record.emitted
        counts["accepted"] += record.accepted
        counts["rows"] += done.verify_rows
        if done.plan.speculate:
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
        for request in touched:
            if (
                request.metrics.rounds == 0 and len(request.output) <= 1
            ):  # more: a prompt run again after a preemption
                self.ttft.observe(request.metrics.ttft or 0.0)
                counts["prompt_tokens"] += len(request.prompt)

    def ended(self, request: Request, reason: str) -> None:
        self.ended_by[reason] += 1
        metrics, tokens = request.metrics, len(request.output)
        self.counts["preemptions"] += metrics.preemptions
        if (
            reason in ("stop", "length")
            and metrics.finished is not None
            and metrics.first_token is not None
        ):
            self.e2e.observe(metrics.finished - metrics.arrival)
            if tokens > 1:
                self.tpot.observe((metrics.finished - metrics.first_token) / (tokens - 1))

    # --- the event loop's ---

    def render(self) -> str:
        """The text exposition format."""
        return "".join(f"{line}\n" for line in self._lines())

    def _lines(self) -> Iterator[str]:
        for name, (kind, text, value) in self._values().items():
            yield f"# HELP smart:{name} {text}"
            yield f"# TYPE smart:{name} {kind}"
            if isinstance(value, Histogram):
                yield from value.lines(f"smart:{name}", self._label)
            elif isinstance(value, Mapping):
                for reason, count in sorted(value.items()):
                    yield f'smart:{name}{{{self._label},finished_reason="{reason}"}} {count}'
            else:
                yield f"smart:{name}{{{self._label}}} {value:.9g}"

    def _values(self) -> dict[str, tuple[str, str, float | Histogram | Mapping[str, int]]]:
        c, s = self.counts, self.seconds
        found: dict[str, tuple[str, str, float | Histogram | Mapping[str, int]]] = {}
        if self._engine is not None:
            scheduler, pool = self._engine.scheduler, self._engine.pool
            found |= {
                "num_requests_running": (
                    "gauge",
                    "Answers in the running batch.",
                    len(scheduler.running),
                ),
                "num_requests_waiting": (
                    "gauge",
                    "Answers waiting for a slot.",
                    len(scheduler.waiting),
                ),
                "kv_cache_usage_perc": (
                    "gauge",
                    "Share of KV pages in use, 1 is all.",
                    1 - pool.available / pool.pages,
                ),
            }
            stats = self._engine.policy.stats()
            for key, name, text in (
                (
                    "estimated_speedup",
                    "speedup_estimate",
                    "Tokens per second over plain decoding's, as estimated.",
                ),
                (
                    "calibration_error",
                    "calibration_error",
                    "Accepted over expected nodes, minus 1.",
                ),
                (
                    "share_off",
                    "speculation_off_share",
                    "Share of recent rounds that did not draft.",
                ),
                (
                    "probe_seconds",
                    "probe_seconds",
                    "Seconds that checking the mode believed worse has cost.",
                ),
            ):
                if key in stats:
                    found[name] = ("gauge", text, stats[key])
        return found | {
            "prompt_tokens_total": (
                "counter",
                "Prompt tokens of answers that have begun.",
                c["prompt_tokens"],
            ),
            "generation_tokens_total": ("counter", "Tokens generated.", c["tokens"]),
            "num_preemptions_total": (
                "counter",
                "Answers put back for lack of KV memory.",
                c["preemptions"],
            ),
            "request_success_total": ("counter", "Answers that ended, by reason.", self.ended_by),
            "time_to_first_token_seconds": ("histogram", "Arrival to first token.", self.ttft),
            "time_per_output_token_seconds": (
                "histogram",
                "Mean per answer, first token excluded.",
                self.tpot,
            ),
            "e2e_request_latency_seconds": ("histogram", "Arrival to end.", self.e2e),
            "spec_decode_num_drafts_total": (
                "counter",
                "Trees of which nodes were verified.",
                c["drafts"],
            ),
            "spec_decode_num_draft_tokens_total": (
                "counter",
                "Tree nodes verified.",
                c["verified"],
            ),
            "spec_decode_num_accepted_tokens_total": (
                "counter",
                "Tree nodes accepted.",
                c["accepted"],
            ),
            "spec_decode_num_proposed_tokens_total": (
                "counter",
                "Tree nodes drafted, pruned ones too.",
                c["drafted"],
            ),
            "rounds_total": ("counter", "Rounds of the engine.", c["rounds"]),
            "drafting_rounds_total": (
                "counter",
                "Rounds that speculated; the others had speculation off.",
                c["drafting_rounds"],
            ),
            "draft_levels_total": ("counter", "Levels drafted by the model drafter.", c["levels"]),
            "verify_rows_total": ("counter", "Rows of the verifying forwards.", c["rows"]),
            "round_seconds_total": ("counter", "Seconds in rounds.", s["round"]),
            "controller_seconds_total": (
                "counter",
                "Seconds in rounds outside of forwards, sampling and KV.",
                s["controller"],
            ),
            "checked_round_seconds_total": (
                "counter",
                f"Real seconds of every {CHECK_EVERY}th decoding round.",
                s["checked_round"],
            ),
            "predicted_round_seconds_total": (
                "counter",
                "The cost model's seconds for the same rounds.",
                s["predicted_round"],
            ),
        }


def predicted_seconds(cost: CostModel, done: Round) -> float:
    """What `cost` says a round's forwards take."""
    batch = done.batch
    context = float(batch.context.mean())
    seconds = float(cost.verify_seconds(batch.size, done.verify_rows, context))
    return seconds + sum(cost.levels_seconds(batch.size, done.level_widths, context))
