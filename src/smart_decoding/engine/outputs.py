"""Results for callers: the answers to a prompt, in vLLM's names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from smart_decoding.engine.request import Request, RequestMetrics

TokenText: TypeAlias = Callable[[int], str]


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token's log probability (natural, of the model's own logits), its rank from 1, its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One answer. finish_reason: 'stop', 'length' or 'abort'; metrics: rounds, rows and times of
    this answer.

    logprobs: None unless requested; else for each of token_ids the drawn token and the most likely
    ones, by their ids. cumulative_logprob: the sum of the drawn tokens' log probabilities."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: str | int | None
    metrics: RequestMetrics
    logprobs: list[dict[int, Logprob]] | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        """Log probability of the whole answer; None unless log probabilities were requested."""
        if self.logprobs is None:
            return None
        pairs = zip(self.token_ids, self.logprobs, strict=True)
        return sum(entry[token].logprob for token, entry in pairs)

    @property
    def tokens_per_round(self) -> float:
        """Tokens per decoding round, without the first token, which comes from the prompt's
        round."""
        return (len(self.token_ids) - 1) / self.metrics.rounds if self.metrics.rounds else 0.0


@dataclass(slots=True)
class RequestOutput:
    """The answers to one prompt.

    prompt_logprobs: None unless requested; else as `logprobs`, for each of prompt_token_ids. The
    first one's entry is None: no token precedes it."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    @property
    def num_cached_tokens(self) -> int:
        """Number of the prompt's tokens whose keys were found in the prefix cache."""
        return self.outputs[0].metrics.cached_tokens


def completion_of(request: Request, text_of: TokenText) -> CompletionOutput:
    """Return a finished request's answer. text_of: a token's text."""
    return CompletionOutput(
        request.sample,
        request.stop.text,
        list(request.output),
        "abort" if request.aborted else request.stop.finish_reason,
        request.stop.stop_reason,
        request.metrics,
        None if request.logprobs is None else logprobs_of(request.logprobs, text_of),
    )


def prompt_logprobs_of(
    request: Request, text_of: TokenText
) -> list[dict[int, Logprob] | None] | None:
    """Return `prompt_logprobs` of a prompt that has run."""
    found = request.prompt_logprobs
    return None if found is None else [None, *logprobs_of(found[1:], text_of)]


def logprobs_of(entries: Sequence[Any], text_of: TokenText) -> list[dict[int, Logprob]]:
    """Return log probabilities in vLLM's form. entries: a `TokenLogprobs` of
    models/sampling/sampler.py for each token."""
    found = []
    for entry in entries:
        values = {entry.token: Logprob(entry.logprob, entry.rank, text_of(entry.token))}
        top = zip(entry.top_tokens.tolist(), entry.top_logprobs.tolist(), strict=True)
        for rank, (token, logprob) in enumerate(top, start=1):
            values.setdefault(token, Logprob(logprob, rank, text_of(token)))
        found.append(values)
    return found
