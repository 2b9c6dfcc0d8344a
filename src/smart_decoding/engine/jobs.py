"""Messages between callers and the engine thread: jobs one way, chunks the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from smart_decoding.errors import SmartError

if TYPE_CHECKING:
    from smart_decoding.engine.engine import Engine
    from smart_decoding.engine.media import Media
    from smart_decoding.engine.request import Request, RequestMetrics
    from smart_decoding.engine.sampling_params import SamplingParams


class QueueTimeoutError(SmartError):
    """A job has waited for its first slot for too long."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A prompt's tokens with its pictures, to be answered `params.n` times."""

    tokens: Sequence[int]
    params: SamplingParams
    media: Media | None = None


@dataclass(slots=True)
class Chunk:
    """New text and tokens of one answer. tokens: ids; logprobs: one entry a token, None if not
    requested; metrics: of the whole answer, at its end."""

    index: int
    text: str
    tokens: list[int]
    logprobs: list[Any] | None
    finish_reason: str | None
    metrics: RequestMetrics | None = None


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message from the engine thread to a job's caller. content: a chunk, an error that ended the
    job, or None after a cancellation; ended: answers of the job that end with it."""

    job: Job
    content: Chunk | BaseException | None
    ended: int = 0


def _to_nobody(deliveries: list[Delivery]) -> None:
    pass


@dataclass(eq=False, slots=True)
class Job:
    """One caller's prompts. The whole job ends if it is cancelled or if one of its asks fails.

    Answers are numbered through all asks. id: unique in its engine; stream: deliver chunks after
    each round, not only at an answer's end; deliver: called by the engine thread with chunks;
    on_round: called by it after each round with the job's requests that got tokens; timeout:
    seconds to wait for a first slot; request_id: for the log; client: name of the client; viewer:
    name of the user who may watch it; cache_salt: jobs with an equal one share cached prefixes;
    grammars: compiled ones, held so that the engine finds them.
    """

    id: str
    engine: Engine
    asks: Sequence[Ask]
    stream: bool = False
    deliver: Callable[[list[Delivery]], None] = _to_nobody
    on_round: Callable[[list[Request]], None] | None = None
    timeout: float = float("inf")
    request_id: str = ""
    client: str = ""
    viewer: str = ""
    cache_salt: str = ""
    grammars: Sequence[object] = ()
    submitted: float = 0.0  # when, on time.monotonic
    # For the engine thread only:
    answers: dict[Request, int] = field(default_factory=dict)
    sent: dict[Request, int] = field(default_factory=dict)  # delivered tokens
    left: int = 0  # answers that are not over yet

    @property
    def size(self) -> int:
        """Number of answers."""
        return sum(ask.params.n for ask in self.asks)
