"""What callers get: the answers to a prompt, as vLLM names them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smart_decoding.engine.request import Request, RequestMetrics


@dataclass(slots=True)
class CompletionOutput:
    """One answer. finish_reason: 'stop', 'length' or 'abort'; metrics: rounds, rows and times of
    this answer.

    logprobs: None unless asked for; else a `TokenLogprobs` (models/sampler.py) for each of
    token_ids: token, logprob, rank (from 1), and the most likely tokens as the arrays top_tokens
    and top_logprobs."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: str | int | None
    metrics: RequestMetrics
    logprobs: list[Any] | None = None

    @property
    def tokens_per_round(self) -> float:
        """Tokens per decoding round; the first token comes from the prompt's round and does not
        count."""
        return (len(self.token_ids) - 1) / self.metrics.rounds if self.metrics.rounds else 0.0


@dataclass(slots=True)
class RequestOutput:
    """The answers to one prompt."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True


def completion_of(request: Request) -> CompletionOutput:
    """A finished request's answer."""
    return CompletionOutput(
        request.sample,
        request.stop.text,
        list(request.output),
        "abort" if request.aborted else request.stop.finish_reason,
        request.stop.stop_reason,
        request.metrics,
        request.logprobs,
    )
