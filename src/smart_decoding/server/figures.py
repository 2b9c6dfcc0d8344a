"""Figures of one answer: `timings` in llama.cpp's names, `metrics` in vLLM's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smart_decoding.engine.request import RequestMetrics

Json = dict[str, Any]


def figures(metrics: RequestMetrics, prompt: int, completion: int) -> Json:
    """Return the figures of an answer that has ended. prompt, completion: its tokens."""
    arrival = metrics.arrival
    scheduled = arrival if metrics.scheduled is None else metrics.scheduled
    first = scheduled if metrics.first_token is None else metrics.first_token
    finished = first if metrics.finished is None else metrics.finished
    read = prompt - metrics.cached_tokens
    prompt_ms = 1000 * (first - scheduled)
    predicted_ms = 1000 * (finished - first)
    timings = {
        "cache_n": metrics.cached_tokens,
        **_pace("prompt", read, prompt_ms),
        **_pace("predicted", completion, predicted_ms),
    }
    if metrics.verified:
        timings |= {"draft_n": metrics.verified, "draft_n_accepted": metrics.accepted}
    later = completion - 1  # tokens that came after the first
    mean = predicted_ms / later if later > 0 else None
    return {
        "timings": timings,
        "metrics": {
            "time_to_first_token_ms": _rounded(1000 * (first - arrival)),
            "generation_time_ms": _rounded(predicted_ms),
            "queue_time_ms": _rounded(1000 * (scheduled - arrival)),
            "mean_itl_ms": mean and _rounded(mean),
            "tokens_per_second": _rounded(1000 / mean) if mean else None,
            "speculative_decoding": _acceptance(metrics),
        },
    }


def _pace(kind: str, tokens: int, milliseconds: float) -> Json:
    return {
        f"{kind}_n": tokens,
        f"{kind}_ms": _rounded(milliseconds),
        f"{kind}_per_token_ms": _rounded(milliseconds / tokens) if tokens else None,
        f"{kind}_per_second": _rounded(1000 * tokens / milliseconds) if milliseconds else None,
    }


def _acceptance(metrics: RequestMetrics) -> Json | None:
    """Return the acceptance of drafts; None if nothing was verified. Drafts are trees here, so
    num_spec_tokens is the length of the longest accepted path."""
    lengths = metrics.accepted_lengths
    if not lengths:
        return None
    longest = max(lengths)
    return {
        "mean_acceptance_length": round(1 + metrics.accepted / lengths.total(), 4),
        "draft_acceptance_rate": round(metrics.accepted / metrics.verified, 4),
        "acceptance_histogram": [lengths[length] for length in range(longest + 1)],
        "num_spec_steps": lengths.total(),
        "num_accepted_draft_tokens": metrics.accepted,
        "num_draft_tokens": metrics.verified,
        "num_spec_tokens": longest,
    }


def _rounded(value: float) -> float:
    return round(value, 3)
