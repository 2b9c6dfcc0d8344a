"""What passes between the event loop and the engine thread: jobs one way, chunks the other."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smart_decoding.engine.media import Media
    from smart_decoding.engine.request import Request
    from smart_decoding.engine.sampling_params import SamplingParams
    from smart_decoding.server.errors import ApiError


@dataclass(slots=True)
class Chunk:
    """What one answer gained. tokens: ids; logprobs: one entry a token, None if not asked for."""

    index: int
    text: str
    tokens: list[int]
    logprobs: list[Any] | None
    finish_reason: str | None
    cached_tokens: int = 0


@dataclass(eq=False, slots=True)
class Job:
    """One HTTP request: its prompts, each with `params.n` answers.

    Answer i of prompt p has index p * n + i. id: unique, ours; request_id: for the log, may be the
    client's; media: the pictures of its one prompt.
    """

    id: str
    prompts: Sequence[list[int]]
    params: SamplingParams
    stream: bool
    request_id: str = ""
    media: Media | None = None
    chunks: asyncio.Queue[Chunk | ApiError] = field(default_factory=asyncio.Queue)
    submitted: float = 0.0
    closed: bool = False  # the event loop's: no more chunks are wanted
    # The engine thread's:
    answers: dict[Request, int] = field(default_factory=dict)
    sent: dict[Request, int] = field(default_factory=dict)  # tokens given out
    left: int = 0  # answers that are not over yet

    @property
    def size(self) -> int:
        """Answers in all."""
        return len(self.prompts) * self.params.n


@dataclass(frozen=True, slots=True)
class Delivery:
    """From the engine thread to a job's client. ended: answers of the job that are over with it."""

    job: Job
    content: Chunk | ApiError | None
    ended: int = 0
