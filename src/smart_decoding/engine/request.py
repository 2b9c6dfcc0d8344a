"""A request on its way through the engine, and its metrics."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smart_decoding.engine.kv import BlockTable
    from smart_decoding.engine.media import Media
    from smart_decoding.engine.sampling_params import SamplingParams
    from smart_decoding.engine.stopping import StopChecker
    from smart_decoding.engine.structured import Constraint


@dataclass(slots=True)
class RequestMetrics:
    """Counts and times of one request. Seconds are on the engine's clock.

    scheduled: when it left the queue; vision_seconds: of the vision tower, within the time to the
    first token; rounds: decoding rounds; drafted, verified, accepted: its tree nodes;
    accepted_lengths: rounds that verified nodes, by their number of accepted nodes; preemptions:
    how often it was put back for lack of KV memory.
    """

    arrival: float = 0.0
    scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None
    rounds: int = 0
    drafted: int = 0
    verified: int = 0
    accepted: int = 0
    accepted_lengths: Counter[int] = field(default_factory=Counter)
    preemptions: int = 0
    cached_tokens: int = 0
    vision_seconds: float = 0.0

    @property
    def wasted_rows(self) -> int:
        """Verified nodes that were not accepted."""
        return self.verified - self.accepted

    @property
    def ttft(self) -> float | None:
        """Seconds from arrival to the first token."""
        return None if self.first_token is None else self.first_token - self.arrival


@dataclass(eq=False, slots=True)
class Request:
    """One answer to one prompt. A prompt with n > 1 becomes n requests, `sample` = 0 .. n-1.

    client: name of its client, for `engine.fairness`. viewer: name of the user who may watch it, if
    any. tokens: prompt and output so far. table.length of them are in the KV cache: all but the
    last while decoding."""

    id: str
    prompt: list[int]
    params: SamplingParams
    seed: int
    table: BlockTable
    stop: StopChecker
    sample: int = 0
    max_tokens: int = 0
    history: Any = None
    constraint: Constraint | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Any] | None = None
    prompt_logprobs: list[Any] | None = None  # of the prompt's first tokens, as far as it has run
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    aborted: bool = False
    admitted: bool = False  # whether a part of it, at least, has run
    takes_argmax: bool = False  # whether its token is the largest of the model's own logits
    media: Media | None = None
    client: str = ""
    viewer: str = ""
    # by which policies know it again: an id may come again in a later call
    number: int = field(default_factory=partial(next, itertools.count()))

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        self.takes_argmax = self.params.greedy and not self.params.changes_logits

    def accept(self, tokens: Sequence[int], now: float) -> list[int]:
        """Take the tokens of a round; return the ones that belong to the answer. An answer that
        ends before its grammar's error has no error. now: seconds on the engine's clock."""
        if self.constraint is not None:
            tokens = self.constraint.before_error(tokens)
        answer = self.stop.push(tokens)
        if self.logprobs is not None:
            del self.logprobs[len(self.output) :]
        self.tokens.extend(answer)
        if self.history is not None:
            self.history.append(answer)
        if self.constraint is not None and self.stop.finish_reason is None:
            self.constraint.append(answer)
        if self.metrics.first_token is None:
            self.metrics.first_token = now
        return answer

    @property
    def pending(self) -> int:
        """Number of tokens that are not in the KV cache yet: 1 while decoding, more for a
        prompt."""
        return len(self.tokens) - self.table.length

    @property
    def decodes(self) -> bool:
        """Whether its next round draws a token, and runs none of its prompt."""
        return self.pending == 1 and bool(self.output)

    @property
    def may_speculate(self) -> bool:
        """Whether drafts for it can be worth their rows."""
        return self.params.speculate and not (self.constraint and self.constraint.expensive)

    def ready(self, seconds: float = 0.0) -> bool:
        """Return whether a round need not wait for its mask. seconds: to wait for it, at most."""
        return self.constraint is None or self.constraint.ready(seconds)

    @property
    def scores_prompt(self) -> bool:
        """Whether log probabilities of prompt tokens are still missing."""
        found = self.prompt_logprobs
        return found is not None and len(found) < len(self.prompt)

    @property
    def output(self) -> list[int]:
        """The answer's tokens so far."""
        return self.stop.token_ids

    @property
    def remaining(self) -> int:
        """Number of tokens that it may still emit."""
        return self.max_tokens - len(self.stop.token_ids)

    @property
    def error(self) -> Exception | None:
        """The error of its grammar, after which the answer cannot go on."""
        return None if self.constraint is None else self.constraint.error

    @property
    def finished(self) -> bool:
        """Whether it has ended, was aborted, or has failed."""
        return self.aborted or self.stop.finish_reason is not None or self.error is not None
