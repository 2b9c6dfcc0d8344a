"""From chunks to OpenAI's JSON: choices, deltas, log probabilities, usage."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from smart_decoding.server.figures import figures
from smart_decoding.server.tool_text import Pieces, whole_calls

if TYPE_CHECKING:
    from smart_decoding.engine.jobs import Chunk
    from smart_decoding.engine.request import RequestMetrics
    from smart_decoding.engine.stopping import Detokenizer
    from smart_decoding.server.tool_text import AnswerReader

TokenText = Callable[[int], str]
Json = dict[str, Any]


@dataclass(slots=True)
class Usage:
    """Token counts of one HTTP request, added up over its answers.

    accepted, rejected: drafted tokens; last: figures of the answer that ended last.
    """

    prompt: int
    completion: int = 0
    accepted: int = 0
    rejected: int = 0
    last: RequestMetrics | None = None
    cached: dict[int, int] = field(default_factory=dict)  # by prompt

    def add(self, chunk: Chunk, n: int) -> None:
        """Count a chunk; n: answers to each prompt."""
        self.completion += len(chunk.tokens)
        if chunk.metrics is not None:
            self.last = chunk.metrics
            self.accepted += chunk.metrics.accepted
            self.rejected += chunk.metrics.wasted_rows
            place = chunk.index // n
            known = self.cached.get(place, chunk.metrics.cached_tokens)
            self.cached[place] = min(known, chunk.metrics.cached_tokens)

    def figures(self) -> Json:
        """Return the figures of the one answer that has ended, as llama.cpp and vLLM name them."""
        assert self.last is not None
        return figures(self.last, self.prompt, self.completion)

    def json(self) -> Json:
        """Return the counts in OpenAI's form."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached.values())},
            "completion_tokens_details": {
                "accepted_prediction_tokens": self.accepted,
                "rejected_prediction_tokens": self.rejected,
            },
        }


class ChatForm:
    """The shape of /v1/chat/completions.

    top: alternatives a token, None without log probabilities; reader: splits an answer's text, if
    that may hold more than content.
    """

    prefix = "chatcmpl-"
    whole = "chat.completion"
    piece = "chat.completion.chunk"

    def __init__(
        self,
        text_of: TokenText,
        top: int | None,
        reader: Callable[[], AnswerReader] | None = None,
    ) -> None:
        self._text_of = text_of
        self._top = top
        self._reader = reader
        self._readers: dict[int, AnswerReader] = {}

    def opening(self, index: int) -> Json | None:
        """Return the first delta of an answer."""
        return {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }

    def delta(self, chunk: Chunk) -> Json | None:
        """Return a chunk as a delta, or None for an empty one."""
        pieces, reason = self.read(chunk)
        if not (any(pieces) or reason or chunk.logprobs):
            return None
        delta: Json = {}
        if pieces.reasoning:
            delta["reasoning_content"] = pieces.reasoning
        if pieces.content:
            delta["content"] = pieces.content
        if pieces.calls:
            delta["tool_calls"] = pieces.calls
        return self._choice(chunk, "delta", delta, reason)

    def choice(self, chunk: Chunk) -> Json:
        """Return a whole answer."""
        (content, calls, reasoning), reason = self.read(chunk)
        message: Json = {"role": "assistant", "content": content, "refusal": None}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message |= {"content": content or None, "tool_calls": whole_calls(calls)}
        return self._choice(chunk, "message", message, reason)

    def _choice(self, chunk: Chunk, kind: str, what: Json, reason: str | None) -> Json:
        return {
            "index": chunk.index,
            kind: what,
            "logprobs": self.logprobs(chunk),
            "finish_reason": reason,
        }

    def read(self, chunk: Chunk) -> tuple[Pieces, str | None]:
        """Return what a chunk adds, and why the answer ended."""
        if self._reader is None:
            return Pieces(chunk.text, []), chunk.finish_reason
        if chunk.index not in self._readers:
            self._readers[chunk.index] = self._reader()
        reader = self._readers[chunk.index]
        pieces = reader.feed(chunk.text, chunk.finish_reason)
        called = chunk.finish_reason == "stop" and reader.complete
        return pieces, "tool_calls" if called else chunk.finish_reason

    def logprobs(self, chunk: Chunk) -> Json | None:
        """Return a chunk's log probabilities, or None without any."""
        if chunk.logprobs is None:
            return None
        content = []
        for entry in chunk.logprobs:
            top = zip(entry.top_tokens[: self._top], entry.top_logprobs[: self._top], strict=True)
            alternatives = [self._token(int(token), float(value)) for token, value in top]
            drawn = self._token(entry.token, float(entry.logprob))
            content.append({**drawn, "top_logprobs": alternatives})
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> Json:
        text = self._text_of(token)
        # Of a token that is a part of a character, not even the bytes are known here.
        as_bytes = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": _finite(logprob), "bytes": as_bytes}


class Offsets:
    """Where the tokens of one answer begin in its text. reader: turns them into that text.

    A token inside a character begins where the character does. A token without text begins where
    the next one does.
    """

    def __init__(self, reader: Detokenizer) -> None:
        self._reader = reader
        self._length = 0

    def push(self, token: int) -> int:
        """Return the next token's offset."""
        offset = self._length + len(self._reader.held)
        self._length += len(self._reader.push([token]))
        return offset


class CompletionForm:
    """The shape of /v1/completions.

    top: alternatives a token; reader: makes the detokenizer of an answer, by its index.
    """

    prefix = "cmpl-"
    whole = "text_completion"
    piece = "text_completion"

    def __init__(
        self, text_of: TokenText, top: int | None, reader: Callable[[int], Detokenizer]
    ) -> None:
        self._text_of = text_of
        self._top = top
        self._reader = reader
        self._offsets: dict[int, Offsets] = {}

    def opening(self, index: int) -> Json | None:
        """Return None: an answer begins with its text."""

    def delta(self, chunk: Chunk) -> Json | None:
        """Return a chunk as a delta, or None for an empty one."""
        return self.choice(chunk) if chunk.text or chunk.finish_reason or chunk.logprobs else None

    def choice(self, chunk: Chunk) -> Json:
        """Return a whole answer, or a part of it."""
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
        tops = []  # the drawn token is among them, however unlikely it was
        for entry, text, value in zip(chunk.logprobs, texts, values, strict=True):
            top = zip(entry.top_tokens[: self._top], entry.top_logprobs[: self._top], strict=True)
            likely = {self._text_of(int(token)): _finite(float(logprob)) for token, logprob in top}
            tops.append(likely | {text: value})
        return {
            "tokens": texts,
            "token_logprobs": values,
            "top_logprobs": tops,
            "text_offset": offsets,
        }


Form = ChatForm | CompletionForm


def envelope(form: Form, job_id: str, model: str, whole: bool) -> Json:
    """Return the fields around the choices."""
    kind = form.whole if whole else form.piece
    return {"id": form.prefix + job_id, "object": kind, "created": int(time.time()), "model": model}


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for a token that cannot be drawn."""
    return max(logprob, -9999.0)
