"""Replies made of a job's chunks: one JSON object, or server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smart_decoding.server.answers import Form, Json, Usage, envelope
from smart_decoding.server.errors import ApiError

if TYPE_CHECKING:
    from smart_decoding.async_llm import AsyncJob
    from smart_decoding.engine.jobs import Chunk
    from smart_decoding.server.schemas import Completions
    from smart_decoding.server.worker import Worker


@dataclass(frozen=True, slots=True)
class Reply:
    """The reply to /v1/completions and /v1/chat/completions. model: its name for clients.

    The job's asks share their parameters: answer i to prompt p has the index p * n + i.
    """

    worker: Worker
    job: AsyncJob
    form: Form
    model: str
    usage: Usage
    body: Completions

    def whole(self, chunks: Sequence[Chunk]) -> Json:
        """Return the whole reply, made of all `chunks`."""
        choices = [self.form.choice(chunk) for chunk in chunks]
        return {
            **envelope(self.form, self.job.id, self.model, True),
            "choices": sorted(choices, key=lambda choice: int(choice["index"])),
            "usage": self.usage.json(),
            **self._figures(),
        }

    async def events(self, first: Awaitable[Chunk]) -> AsyncIterator[str]:
        """Return a delta per round with text, the usage if requested, [DONE]."""
        frame = envelope(self.form, self.job.id, self.model, False)
        with_usage = self.body.include_usage
        more: Json = {"usage": None} if with_usage else {}
        opened: set[int] = set()
        try:
            async for chunk in self.chunks(first):
                if self.body.continuous_usage:
                    more = {"usage": self.usage.json()}
                opening = self.form.opening(chunk.index) if chunk.index not in opened else None
                opened.add(chunk.index)
                if opening is not None:
                    yield event({**frame, "choices": [opening], **more})
                delta = self.form.delta(chunk)
                if delta is not None:
                    last = chunk.finish_reason is not None and not with_usage
                    figures = self._figures() if last else {}
                    yield event({**frame, "choices": [delta], **more, **figures})
            if with_usage:
                usage = self.usage.json()
                yield event({**frame, "choices": [], "usage": usage, **self._figures()})
            yield "data: [DONE]\n\n"
        except ApiError as error:  # too late for a status
            yield event(error.body)

    def _figures(self) -> Json:
        """Return the figures of a job with one answer, as vLLM does."""
        return self.usage.figures() if self.job.size == 1 else {}

    async def chunks(self, first: Awaitable[Chunk]) -> AsyncIterator[Chunk]:
        """Return all chunks of the job, to the end of its last answer. Raises ApiError if it
        fails."""
        chunk = await first
        while True:
            self.usage.add(chunk, self.job.asks[0].params.n)
            yield chunk
            if not self.job.open:
                return
            chunk = await self.worker.chunk(self.job)


def encoded(value: Any, depth: int = 6) -> str:
    """Return a value as JSON, its outer values one by one: a single call holds Python's lock to its
    end, and log probabilities can be many megabytes."""
    if depth and isinstance(value, dict):
        parts = (f"{json.dumps(key)}:{encoded(each, depth - 1)}" for key, each in value.items())
        return "{" + ",".join(parts) + "}"
    if depth and isinstance(value, list):
        return "[" + ",".join(encoded(each, depth - 1) for each in value) + "]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def event(data: Json) -> str:
    """Return a server-sent event, named by its type if it has one."""
    name = f"event: {data['type']}\n" if "type" in data else ""
    return f"{name}data: {json.dumps(data, separators=(',', ':'))}\n\n"
