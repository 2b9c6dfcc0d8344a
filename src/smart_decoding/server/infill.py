"""Filling in the middle: `suffix` of /v1/completions, and llama.cpp's /infill, for editors."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smart_decoding.models.text.infill import InfillTokens
from smart_decoding.server.errors import ApiError
from smart_decoding.server.replies import Reply, event

if TYPE_CHECKING:
    from smart_decoding.engine.jobs import Chunk
    from smart_decoding.models.text.tokenizer import Tokenizer
    from smart_decoding.server.answers import Json
    from smart_decoding.server.schemas import Completions, InfillRequest

CHARACTERS = 8  # a token of the context: of longer texts the rest is not encoded
SUFFIX_SHARE = 4  # the part of the context that the text behind a gap gets: a quarter
SNIPPET = "\n\n--- snippet ---\n\n"  # before a text where the vocabulary has no token for a file
FILENAME = "filename"  # of the file with the gap, of which requests do not tell
REPOSITORY = "repository\n"


def infill_tokens(tokenizer: Tokenizer, field: str) -> InfillTokens:
    """Return the tokens for filling in. Raises ApiError for a model without any. field: the one
    that asks for it."""
    found = InfillTokens.of(tokenizer)
    if found is None:
        message = (
            f"{field}: this model has no tokens for filling in the middle: serve one for code, "
            "such as qwen2.5-coder-1.5b, or leave the field out"
        )
        raise ApiError(400, message, "unsupported_parameter", field)
    return found


def stop_at_ends(body: Completions, tokens: InfillTokens) -> None:
    """End the answers where the middle does."""
    if not body.ignore_eos:
        body.stop_token_ids = [*(body.stop_token_ids or ()), *tokens.ends]


def texts_of(body: InfillRequest, tokens: InfillTokens, context: int) -> tuple[list[str], bool]:
    """Return the texts to encode: before the gap, behind it, and then those beside the file with
    it; and whether they were cut to what is worth encoding for so many tokens."""
    most = CHARACTERS * context
    before, behind = body.input_prefix + body.prompt, body.input_suffix
    extra = body.input_extra or ()
    snippets = [
        f"{SNIPPET}{each.text}" if tokens.file is None else f"{each.filename}\n{each.text}"
        for each in extra
    ]
    beside = _latest(snippets, most)
    cut = max(len(before), len(behind), sum(map(len, snippets))) > most
    if beside and tokens.file is not None:
        head = [] if tokens.repository is None else [REPOSITORY]
        beside = [*head, *beside, f"{FILENAME}\n"]
    return [before[-most:], behind[:most], *beside], cut


def _latest(texts: Sequence[str], most: int) -> list[str]:
    """Return the last texts, of so many characters together."""
    kept: list[str] = []
    for text in reversed(texts):
        if most <= 0:
            break
        kept.append(text[-most:])
        most -= len(text)
    return kept[::-1]


def prompt_of(
    encoded: Sequence[list[int]], tokens: InfillTokens, context: int, limit: int
) -> tuple[list[int], bool]:
    """Return the prompt of encoded `texts_of`, and whether it was cut to leave room for `limit`
    tokens: the text behind the gap to a quarter, the others to their ends."""
    before, behind, *beside = encoded
    room = max(0, context - limit - len(tokens.prompt((), ())))
    marks = [[] if tokens.file is None else [tokens.file] for _ in beside]
    if tokens.file is not None and tokens.repository is not None:
        marks[:1] = [[tokens.repository] for _ in beside[:1]]
    extra = [token for parts in zip(marks, beside, strict=True) for ids in parts for token in ids]
    suffix = behind[: room // SUFFIX_SHARE]
    prefix = _last(before, room - len(suffix))
    kept = _last(extra, room - len(suffix) - len(prefix))
    cut = len(suffix) + len(prefix) < len(behind) + len(before) or len(kept) < len(extra)
    return tokens.prompt(prefix, suffix, kept), cut


def _last(ids: list[int], count: int) -> list[int]:
    return ids[max(0, len(ids) - count) :]


@dataclass(frozen=True, slots=True)
class InfillReply(Reply):
    """The reply to /infill. truncated: the prompt was cut."""

    truncated: bool = False

    def whole(self, chunks: Sequence[Chunk]) -> Json:
        """Return the whole reply, made of all `chunks`."""
        return self._selected("".join(chunk.text for chunk in chunks), chunks[-1])

    async def events(self, first: Awaitable[Chunk]) -> AsyncIterator[str]:
        """Return an event for each round with text; the last has the figures."""
        try:
            async for chunk in self.chunks(first):
                if chunk.finish_reason is None:
                    yield event({"content": chunk.text, "stop": False})
                else:
                    yield event(self._selected(chunk.text, chunk))
        except ApiError as error:  # too late for a status
            yield event(error.body)

    def _selected(self, content: str, last: Chunk) -> Json:
        """Return the requested fields, or all."""
        body: Any = self.body
        timings = self.usage.figures()["timings"]
        found = {
            "index": 0,
            "content": "" if body.n_predict == 0 else content,
            "stop": True,
            "model": self.model,
            "tokens_predicted": self.usage.completion,
            "tokens_evaluated": self.usage.prompt,
            "tokens_cached": timings["cache_n"],
            "truncated": self.truncated,
            "timings": timings,
        }
        if not body.response_fields:
            return found
        flat = {f"timings/{name}": value for name, value in timings.items()}
        known = {**found, **flat}
        return {name: known[name] for name in body.response_fields if name in known}
