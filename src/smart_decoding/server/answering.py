"""From a request to its response: check it, submit its job, answer or stream."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from smart_decoding.async_llm import AsyncJob
from smart_decoding.engine.jobs import Ask
from smart_decoding.errors import ConfigError
from smart_decoding.server.answers import Usage
from smart_decoding.server.errors import ApiError
from smart_decoding.server.replies import Reply, encoded
from smart_decoding.server.turns import disconnect, unless_gone

if TYPE_CHECKING:
    from smart_decoding.engine.jobs import Chunk
    from smart_decoding.engine.media import Media
    from smart_decoding.engine.sampling_params import SamplingParams
    from smart_decoding.llm import LLM
    from smart_decoding.models.text.grammars import Compiled
    from smart_decoding.server.answers import Form
    from smart_decoding.server.schemas import Completions
    from smart_decoding.server.worker import Worker

SILENCE = 10.0  # seconds until a comment in a stream without a token
STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A request as its route has read it.

    form, reply: shape the answers; encode: token ids of a field's texts, without special tokens;
    media: of the one prompt; ended: called at the job's end.
    """

    body: Completions
    prompts: list[list[int]]
    form: Form
    logprobs: int | None
    encode: Callable[[str, list[str]], Awaitable[list[list[int]]]]
    media: Media | None = None
    reply: Callable[..., Reply] = Reply
    ended: Callable[[], None] = lambda: None


async def answer(worker: Worker, request: Request, parsed: ParsedRequest) -> Response:
    """Return the response, whole or as a stream, which has its headers before the first token:
    later errors are events. Raises ApiError."""
    job = await _job(worker, request, parsed)
    worker.submit(job, parsed.ended)
    watch = asyncio.create_task(_cancel_at_disconnect(request, job, worker))
    usage = Usage(sum(map(len, parsed.prompts)))
    reply = parsed.reply(worker, job, parsed.form, worker.settings.model_name, usage, parsed.body)
    if job.stream:
        events = _to_the_end(reply, job, worker, watch)
        return StreamingResponse(events, media_type="text/event-stream", headers=STREAM_HEADERS)
    try:
        chunks = [chunk async for chunk in reply.chunks(worker.chunk(job))]
        body = await _written(worker, request, reply, chunks)
    except BaseException:
        worker.cancel(job)
        watch.cancel()
        raise
    watch.cancel()
    return Response(body, media_type="application/json")


async def _written(worker: Worker, request: Request, reply: Reply, chunks: Sequence[Chunk]) -> str:
    """Return the whole answer. Log probabilities take long to write: they wait for their turn."""

    def write() -> str:
        return encoded(reply.whole(chunks))

    long = any(chunk.logprobs for chunk in chunks)
    return await worker.texts.write(request, write) if long else write()


def check_model(name: str, worker: Worker) -> None:
    """Raise ApiError unless `name` is the model's."""
    ours = worker.settings.model_name
    if name != ours:
        message = f"there is no model {name!r} here; this server has {ours!r}"
        raise ApiError(404, message, "model_not_found", "model")


async def _job(worker: Worker, request: Request, parsed: ParsedRequest) -> AsyncJob:
    """Return the job of a request. Raises ApiError if it is not allowed."""
    body = parsed.body
    if body.model:  # llama.vim sends an empty one
        check_model(body.model, worker)
    most = worker.settings.max_n
    if (body.n or 1) > most:
        message = f"n={body.n}: at most {most} answers to one prompt"
        raise ApiError(400, message, "invalid_value", "n")
    llm = worker.ready()
    _check_length(parsed, llm)
    open_ended = body.limit is None and body.n_predict is None
    limit = body.usual_limit if open_ended else body.limit
    defaults = llm.default_sampling_params
    longest = defaults.get("max_tokens")  # the model's limit holds for all requests, as in vLLM
    if longest is not None:
        limit = longest if limit is None else min(limit, longest)
    make_params = partial(body.params, limit, parsed.logprobs, defaults)
    params = await worker.texts.checked(request, make_params)
    if body.bad_words:
        words = params.bad_word_texts
        tokens = await parsed.encode("bad_words", words)
        params = params.checked(dict(zip(words, tokens, strict=True)).__getitem__)
    grammars = await _grammars(body, params, worker, request)
    client = request.state.client
    return AsyncJob(
        uuid.uuid4().hex,
        llm.engine,
        [Ask(prompt, params, parsed.media) for prompt in parsed.prompts],
        bool(body.stream),
        request_id=request.state.request_id,
        client=client,
        viewer=request.state.viewer,
        cache_salt=worker.settings.cache_salt(client, body.cache_salt),
        grammars=grammars,
    )


def _check_length(parsed: ParsedRequest, llm: LLM) -> None:
    """Raise ApiError unless the prompt and all requested tokens fit into the context."""
    longest = max(map(len, parsed.prompts), default=0)
    room = llm.engine.config.max_model_len
    limit = parsed.body.limit
    if longest + max(1, limit or 1) > room:
        more = f" and {limit} more were requested" if limit else ""
        message = (
            f"this model's maximum context length is {room} tokens; the prompt has {longest}{more}"
        )
        limit_too_high = limit and longest < room
        field = parsed.body.limit_field if limit_too_high else parsed.body.prompt_field
        raise ApiError(400, message, "context_length_exceeded", field)


async def _grammars(
    body: Completions, params: SamplingParams, worker: Worker, request: Request
) -> list[Compiled]:
    """Return the request's grammar, if it has one, compiled. Raises ApiError."""
    structure = params.structured_outputs
    if structure is None:
        return []
    client = request.state.client
    try:
        compiled = worker.preparation.compiled(worker.ready().grammars, structure, client)
        return [await unless_gone(request, compiled)]
    except ConfigError as error:
        field = body.structured_by
        message = str(error).removeprefix("structured_outputs: ")
        raise ApiError(400, f"{field}: {message}", "invalid_value", field) from error


async def _to_the_end(
    reply: Reply, job: AsyncJob, worker: Worker, watch: asyncio.Task[None]
) -> AsyncIterator[str]:
    """Return the reply's events, and cancel the job at their end. Until its first token comments
    keep proxies from cutting the stream: clients ignore them."""
    first = asyncio.create_task(worker.chunk(job))
    try:
        while not (await asyncio.wait((first,), timeout=SILENCE))[0]:
            yield ": keep-alive\n\n"
        async for event in reply.events(first):
            yield event
    finally:
        first.cancel()
        worker.cancel(job)  # of no effect if it is over
        watch.cancel()


async def _cancel_at_disconnect(request: Request, job: AsyncJob, worker: Worker) -> None:
    await disconnect(request)
    worker.cancel(job)  # which wakes the task that waits for its chunks
