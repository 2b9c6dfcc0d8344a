"""From chunks to the answers of /v1/responses: output items, and events about them."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from smart_decoding.server.answers import ChatForm, Json
from smart_decoding.server.errors import ApiError
from smart_decoding.server.replies import Reply, event

if TYPE_CHECKING:
    from smart_decoding.engine.jobs import Chunk


class Items:
    """An answer's output as it grows: reasoning, messages and calls. All methods yield events."""

    def __init__(self) -> None:
        self.items: list[Json] = []
        self.logprobs: list[Json] = []  # of tokens whose text is still to come
        self._open = False  # whether the last one may grow

    def text(self, text: str) -> Iterator[Json]:
        """Add text."""
        if not (self._open and self.items[-1]["type"] == "message"):
            yield from self._begin_message()
        if text:
            part = self.items[-1]["content"][0]
            part["text"] += text
            found = self._take_logprobs(part)
            yield self._event("output_text.delta", content_index=0, delta=text, logprobs=found)

    def reasoning(self, text: str) -> Iterator[Json]:
        """Add text of the model's reasoning."""
        if not (self._open and self.items[-1]["type"] == "reasoning"):
            yield from self.end("completed")
            part: Json = {"type": "reasoning_text", "text": ""}
            yield from self._begin("reasoning", "rs", {"summary": [], "content": [part]})
        self.items[-1]["content"][0]["text"] += text
        yield self._event("reasoning_text.delta", content_index=0, delta=text)

    def call(self, piece: Json) -> Iterator[Json]:
        """Add a piece of a call, as chats stream them."""
        if "id" in piece:
            yield from self.end("completed")
            self.logprobs = []
            call = {"call_id": piece["id"], "name": piece["function"]["name"], "arguments": ""}
            yield from self._begin("function_call", "fc", call)
        arguments = piece["function"]["arguments"]
        if arguments:
            self.items[-1]["arguments"] += arguments
            yield self._event("function_call_arguments.delta", delta=arguments)

    def end(self, status: str) -> Iterator[Json]:
        """End the last item. status: 'completed' or 'incomplete'."""
        if not self._open:
            return
        item = self.items[-1]
        if item["type"] == "message":
            part = item["content"][0]
            self._take_logprobs(part)
            done = {"text": part["text"], "logprobs": part["logprobs"]}
            yield self._event("output_text.done", content_index=0, **done)
            yield self._event("content_part.done", content_index=0, part=part)
        elif item["type"] == "reasoning":
            text = item["content"][0]["text"]
            yield self._event("reasoning_text.done", content_index=0, text=text)
        else:
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield self._event("function_call_arguments.done", **done)
        item["status"] = status
        self._open = False
        yield self._event("output_item.done", item=item)

    def _take_logprobs(self, part: Json) -> list[Json]:
        found = self.logprobs
        self.logprobs = []
        part["logprobs"] += found
        return found

    def _begin_message(self) -> Iterator[Json]:
        yield from self.end("completed")
        yield from self._begin("message", "msg", {"role": "assistant", "content": []})
        part: Json = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        yield self._event("content_part.added", content_index=0, part=part)
        self.items[-1]["content"].append(part)

    def _begin(self, kind: str, prefix: str, fields: Json) -> Iterator[Json]:
        name = f"{prefix}_{uuid.uuid4().hex}"
        self.items.append({"id": name, "type": kind, "status": "in_progress", **fields})
        self._open = True
        yield self._event("output_item.added", item=self.items[-1])

    def _event(self, kind: str, **fields: Any) -> Json:
        place: Json = {"output_index": len(self.items) - 1}
        if "item" not in fields:
            place["item_id"] = self.items[-1]["id"]
        return {"type": f"response.{kind}", **place, **fields}


@dataclass(frozen=True, slots=True)
class ResponsesReply(Reply):
    """The reply to /v1/responses. echo: the fields that it repeats from its request."""

    echo: Json
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, chunks: Sequence[Chunk]) -> Json:
        """Return the whole reply, made of all `chunks`."""
        items = Items()
        reason = None
        for chunk in chunks:
            for _ in self._additions(items, chunk):
                pass
            reason = chunk.finish_reason
        return self._response(items, reason)

    async def events(self, first: Awaitable[Chunk]) -> AsyncIterator[str]:
        """Return the events, numbered."""
        number = 0
        try:
            async for each in self._events(first):
                yield event({**each, "sequence_number": number})
                number += 1
        except ApiError as error:  # too late for a status
            content = error.body["error"]
            fields = {name: content[name] for name in ("code", "message", "param")}
            yield event({"type": "error", **fields, "sequence_number": number})

    async def _events(self, first: Awaitable[Chunk]) -> AsyncIterator[Json]:
        items = Items()
        for kind in ("created", "in_progress"):
            yield {"type": f"response.{kind}", "response": self._response(items, None)}
        reason = None
        async for chunk in self.chunks(first):
            for addition in self._additions(items, chunk):
                yield addition
            reason = chunk.finish_reason
        response = self._response(items, reason)
        yield {"type": f"response.{response['status']}", "response": response}

    def _additions(self, items: Items, chunk: Chunk) -> Iterator[Json]:
        """Add a chunk to `items`; return its events."""
        assert isinstance(self.form, ChatForm)
        (content, calls, reasoning), reason = self.form.read(chunk)
        found = self.form.logprobs(chunk)
        items.logprobs += found["content"] if found else []
        if reasoning:
            yield from items.reasoning(reasoning)
        empty = reason is not None and not items.items and not calls
        if content or empty:
            yield from items.text(content)
        for piece in calls:
            yield from items.call(piece)
        if reason is not None:
            yield from items.end("incomplete" if reason == "length" else "completed")

    def _response(self, items: Items, reason: str | None) -> Json:
        cut = reason == "length"
        ended = "incomplete" if cut else "completed"
        return {
            "id": f"resp_{self.job.id}",
            "object": "response",
            "created_at": self.created,
            "status": "in_progress" if reason is None else ended,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "model": self.model,
            "output": items.items,
            **self.echo,
            "usage": None if reason is None else self._usage(),
            **({} if reason is None else self._figures()),
        }

    def _usage(self) -> Json:
        usage = self.usage.json()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }
