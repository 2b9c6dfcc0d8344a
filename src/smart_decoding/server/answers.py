"""From chunks to OpenAI's JSON: choices, deltas, log probabilities, usage."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from smart_decoding.engine.stopping import Detokenizer
from smart_decoding.server.jobs import Chunk
from smart_decoding.server.tool_text import ToolText, whole_calls

TokenText = Callable[[int], str]
Json = dict[str, Any]


@dataclass(slots=True)
class Usage:
    """Token counts of one HTTP request, added up over its answers."""

    prompt: int
    completion: int = 0
    cached: dict[int, int] = field(default_factory=dict)  # by prompt

    def add(self, chunk: Chunk, n: int) -> None:
        self.completion += len(chunk.tokens)
        if chunk.finish_reason:
            place = chunk.index // n
            self.cached[place] = min(
                self.cached.get(place, chunk.cached_tokens), chunk.cached_tokens
            )

    def json(self) -> Json:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached.values())},
        }


class ChatForm:
    """The shape of /v1/chat/completions. top: alternatives a token, or None without log
    probabilities.

    calls: whether the text may hold tool calls."""

    prefix, whole, piece = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, text_of: TokenText, top: int | None, calls: bool = False) -> None:
        self._text_of, self._top, self._calls = text_of, top, calls
        self._texts: dict[int, ToolText] = {}

    def opening(self, index: int) -> Json | None:
        """The first delta of an answer."""
        return {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }

    def delta(self, chunk: Chunk) -> Json | None:
        """What a chunk adds, or None if there is nothing to tell."""
        content, calls, reason = self._read(chunk)
        if not (content or calls or reason or chunk.logprobs):
            return None
        delta = ({"content": content} if content else {}) | ({"tool_calls": calls} if calls else {})
        return self._choice(chunk, "delta", delta, reason)

    def choice(self, chunk: Chunk) -> Json:
        content, calls, reason = self._read(chunk)
        message: Json = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message |= {"content": content or None, "tool_calls": whole_calls(calls)}
        return self._choice(chunk, "message", message, reason)

    def _choice(self, chunk: Chunk, kind: str, what: Json, reason: str | None) -> Json:
        return {
            "index": chunk.index,
            kind: what,
            "logprobs": self._logprobs(chunk),
            "finish_reason": reason,
        }

    def _read(self, chunk: Chunk) -> tuple[str, list[Json], str | None]:
        """Content, pieces of tool calls, and why the answer ended."""
        if not self._calls:
            return chunk.text, [], chunk.finish_reason
        text = self._texts.setdefault(chunk.index, ToolText())
        content, calls = text.feed(chunk.text, chunk.finish_reason is not None)
        return (
            content,
            calls,
            "tool_calls"
            if chunk.finish_reason == "stop" and text.complete
            else chunk.finish_reason,
        )

    def _logprobs(self, chunk: Chunk) -> Json | None:
        if chunk.logprobs is None:
            return None
        content = []
        for entry in chunk.logprobs:
            top = zip(entry.top_tokens[: self._top], entry.top_logprobs[: self._top], strict=True)
            alternatives = [self._token(int(token), float(value)) for token, value in top]
            content.append(
                {**self._token(entry.token, float(entry.logprob)), "top_logprobs": alternatives}
            )
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> Json:
        text = self._text_of(token)
        # A token that holds a part of a character has no text, and then its bytes are not known
        # here either.
        return {
            "token": text,
            "logprob": _finite(logprob),
            "bytes": None if "\ufffd" in text else list(text.encode()),
        }


class Offsets:
    """Where the tokens of one answer begin in its text. reader: turns them into that text.

    A token inside a character begins where the character does; one that is not shown, where the
    next one does."""

    def __init__(self, reader: Detokenizer) -> None:
        self._reader, self._length = reader, 0

    def push(self, token: int) -> int:
        """The next token's offset."""
        offset = self._length + len(self._reader.held)
        self._length += len(self._reader.push([token]))
        return offset


class CompletionForm:
    """The shape of /v1/completions. top: alternatives a token; reader: makes what turns an answer's
    tokens into text, by its index."""

    prefix, whole, piece = "cmpl-", "text_completion", "text_completion"

    def __init__(
        self, text_of: TokenText, top: int | None, reader: Callable[[int], Detokenizer]
    ) -> None:
        self._text_of, self._top, self._reader = text_of, top, reader
        self._offsets: dict[int, Offsets] = {}

    def opening(self, index: int) -> Json | None:
        return None

    def delta(self, chunk: Chunk) -> Json | None:
        return self.choice(chunk) if chunk.text or chunk.finish_reason or chunk.logprobs else None

    def choice(self, chunk: Chunk) -> Json:
        return {
            "index": chunk.index,
            "text": chunk.text,
            "logprobs": self._logprobs(chunk),
            "finish_reason": chunk.finish_reason,
        }

    def _logprobs(self, chunk: Chunk) -> Json | None:
        if chunk.logprobs is None:
            return None
        if chunk.index not in self._offsets:
            self._offsets[chunk.index] = Offsets(self._reader(chunk.index))
        texts = [self._text_of(entry.token) for entry in chunk.logprobs]
        values = [_finite(float(entry.logprob)) for entry in chunk.logprobs]
        offsets = [self._offsets[chunk.index].push(entry.token) for entry in chunk.logprobs]
        tops = []
        for entry, text, value in zip(chunk.logprobs, texts, values, strict=True):
            top = zip(entry.top_tokens[: self._top], entry.top_logprobs[: self._top], strict=True)
            likely = {self._text_of(int(token)): _finite(float(logprob)) for token, logprob in top}
            tops.append(
                likely | {text: value}
            )  # the drawn token is told of however unlikely it was
        return {
            "tokens": texts,
            "token_logprobs": values,
            "top_logprobs": tops,
            "text_offset": offsets,
        }


Form = ChatForm | CompletionForm


def envelope(form: Form, job_id: str, model: str, whole: bool) -> Json:
    """What surrounds the choices."""
    kind = form.whole if whole else form.piece
    return {"id": form.prefix + job_id, "object": kind, "created": int(time.time()), "model": model}


def in_order(choices: Sequence[Json]) -> list[Json]:
    return sorted(choices, key=lambda choice: int(choice["index"]))


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for a token that cannot be drawn."""
    return max(logprob, -9999.0)
