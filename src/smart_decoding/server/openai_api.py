"""The routes under /v1, and tokenisation: OpenAI's interface over the worker."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from smart_decoding.engine.engine import BEFORE
from smart_decoding.engine.media import Media
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.engine.stopping import Detokenizer
from smart_decoding.errors import ConfigError
from smart_decoding.llm import LLM
from smart_decoding.server.answers import (
    ChatForm,
    CompletionForm,
    Form,
    Json,
    Usage,
    envelope,
    in_order,
)
from smart_decoding.server.chat import chat_prompt
from smart_decoding.server.errors import ApiError
from smart_decoding.server.jobs import Chunk, Job
from smart_decoding.server.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Sampling,
    TokenizeRequest,
)
from smart_decoding.server.settings import ServerSettings
from smart_decoding.server.worker import Worker

T = TypeVar("T")
COMPLETION_TOKENS = (
    16  # OpenAI's default for /v1/completions; a chat answer goes on to the context's end
)


def router(worker: Worker, settings: ServerSettings) -> APIRouter:
    """All routes that speak OpenAI's language."""
    api, started = APIRouter(), int(time.time())

    def card() -> Json:
        length = worker.llm.engine.config.max_model_len if worker.llm else None
        return {
            "id": settings.model_name,
            "object": "model",
            "created": started,
            "owned_by": "smart-decoding",
            "max_model_len": length,
        }

    @api.get("/v1/models")
    async def models() -> Json:
        return {"object": "list", "data": [card()]}

    @api.get("/v1/models/{name:path}")
    async def model(name: str) -> Json:
        _check_model(name, settings)
        return card()

    @api.post("/v1/completions", response_model=None)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        given = _prompts(body.prompt)
        llm = worker.check_room(len(given) * (body.n or 1))
        prompts = await _in_thread(lambda: [llm.text_prompt(each).tokens for each in given])
        form = CompletionForm(_token_text(llm), body.logprobs, _readers(llm, body, prompts))
        return await _answer(worker, settings, request, body, prompts, form, body.logprobs)

    @api.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request, body: ChatRequest) -> Response:
        llm = worker.check_room()
        offer = body.offer
        prompt = await _in_thread(
            lambda: chat_prompt(llm, body.messages, offer.tools if offer else ())
        )
        top = (body.top_logprobs or 0) if body.logprobs else None
        form = ChatForm(_token_text(llm), top, offer is not None)
        return await _answer(
            worker, settings, request, body, [list(prompt.tokens)], form, top, prompt.media
        )

    @api.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Json:
        llm = worker.ready()
        _check_model(body.model or settings.model_name, settings)

        def tokens() -> list[int]:
            if body.messages:
                return list(chat_prompt(llm, body.messages).tokens)
            return llm.tokenizer.encode(body.prompt or "", body.add_special_tokens)

        found = await _in_thread(tokens)
        return {
            "count": len(found),
            "max_model_len": llm.engine.config.max_model_len,
            "tokens": found,
        }

    @api.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Json:
        llm = worker.ready()
        _check_model(body.model or settings.model_name, settings)
        if max(body.tokens, default=0) >= llm.target.vocab:
            raise ApiError(
                400,
                f"a token id is outside the vocabulary of {llm.target.vocab}",
                "invalid_value",
                "tokens",
            )
        return {"prompt": await _in_thread(lambda: llm.tokenizer.decode(body.tokens, False))}

    return api


async def _answer(
    worker: Worker,
    settings: ServerSettings,
    request: Request,
    body: Sampling,
    prompts: list[list[int]],
    form: Form,
    logprobs: int | None,
    media: Media | None = None,
) -> Response:
    """Checks what is asked for, has it done, and answers as `form` says: whole, or as a stream."""
    _check_model(body.model, settings)
    if (body.n or 1) > settings.max_n:
        raise ApiError(
            400, f"n={body.n}: at most {settings.max_n} answers to one prompt", "invalid_value", "n"
        )
    _check_length(prompts, body, worker.ready())
    limit = (
        COMPLETION_TOKENS if body.limit is None and isinstance(form, CompletionForm) else body.limit
    )
    params, name = body.params(limit, logprobs), request.state.request_id
    await _check_structure(body, params, worker.ready())
    job = Job(uuid.uuid4().hex, prompts, params, bool(body.stream), name, media)
    worker.submit(job)
    watch = asyncio.create_task(_cancel_at_disconnect(request, job, worker))
    usage = Usage(sum(map(len, prompts)))
    try:
        first = await _next(job)  # before the headers: until here an error has a status of its own
        if not body.stream:
            return JSONResponse(await _whole(job, first, form, usage, settings.model_name))
    except BaseException:
        worker.cancel(job)
        raise
    finally:
        if not body.stream or job.closed:
            watch.cancel()
    events = _stream(job, first, form, usage, settings.model_name, body.include_usage)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(
        _to_the_end(events, job, worker, watch), media_type="text/event-stream", headers=headers
    )


async def _to_the_end(
    events: AsyncIterator[str], job: Job, worker: Worker, watch: asyncio.Task[None]
) -> AsyncIterator[str]:
    """The events. However they end, nobody waits for the job any more."""
    try:
        async for event in events:
            yield event
    finally:
        worker.cancel(job)  # of no effect if it is over
        watch.cancel()


async def _whole(job: Job, first: Chunk, form: Form, usage: Usage, model: str) -> Json:
    choices = []
    async for chunk in _chunks(job, first):
        usage.add(chunk, job.params.n)
        choices.append(form.choice(chunk))
    return {
        **envelope(form, job.id, model, True),
        "choices": in_order(choices),
        "usage": usage.json(),
    }


async def _stream(
    job: Job, first: Chunk, form: Form, usage: Usage, model: str, include_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events: a delta per round that yields text, then the usage if asked for, then
    [DONE]."""
    frame = envelope(form, job.id, model, False)
    more: Json = {"usage": None} if include_usage else {}
    opened: set[int] = set()
    try:
        async for chunk in _chunks(job, first):
            usage.add(chunk, job.params.n)
            opening = form.opening(chunk.index) if chunk.index not in opened else None
            opened.add(chunk.index)
            if opening is not None:
                yield _event({**frame, "choices": [opening], **more})
            delta = form.delta(chunk)
            if delta is not None:
                yield _event({**frame, "choices": [delta], **more})
        if include_usage:
            yield _event({**frame, "choices": [], "usage": usage.json()})
        yield "data: [DONE]\n\n"
    except ApiError as error:  # too late for a status
        yield _event(error.body)


def _event(data: Json) -> str:
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


async def _chunks(job: Job, first: Chunk) -> AsyncIterator[Chunk]:
    """All chunks of a job, to the end of its last answer. Raises ApiError if it fails on the
    way."""
    chunk, left = first, job.size
    while True:
        left -= chunk.finish_reason is not None
        job.closed = job.closed or not left
        yield chunk
        if not left:
            return
        chunk = await _next(job)


async def _next(job: Job) -> Chunk:
    item = await job.chunks.get()
    if isinstance(item, ApiError):
        job.closed = True
        raise item
    return item


async def _cancel_at_disconnect(request: Request, job: Job, worker: Worker) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    worker.cancel(job)
    job.chunks.put_nowait(ApiError(499, "the client has gone"))


def _check_model(name: str, settings: ServerSettings) -> None:
    if name != settings.model_name:
        message = f"there is no model {name!r} here; this server has {settings.model_name!r}"
        raise ApiError(404, message, "model_not_found", "model")


def _check_length(prompts: Sequence[list[int]], body: Sampling, llm: LLM) -> None:
    """Prompt and all tokens asked for must fit into the context."""
    longest, room, limit = (
        max(map(len, prompts), default=0),
        llm.engine.config.max_model_len,
        body.limit,
    )
    if longest + max(1, limit or 1) > room:
        wish = f" and {limit} more were asked for" if limit else ""
        message = (
            f"this model's maximum context length is {room} tokens; the prompt has {longest}{wish}"
        )
        at_fault = body.limit_field if limit and longest < room else body.prompt_field
        raise ApiError(400, message, "context_length_exceeded", at_fault)


async def _check_structure(body: Sampling, params: SamplingParams, llm: LLM) -> None:
    """Compiles the request's grammar, not in the engine's time: the engine then finds it ready."""
    structure = params.structured_outputs
    if structure is not None:
        try:
            await _in_thread(lambda: llm.grammars(structure))
        except ConfigError as error:
            field, message = body.structured_by, str(error).removeprefix("structured_outputs: ")
            raise ApiError(400, f"{field}: {message}", "invalid_value", field) from error


def _prompts(given: str | list[str] | list[int] | list[list[int]]) -> list[Any]:
    """One prompt, or several, as a list: texts or token ids. Raises ApiError if there is none."""
    if given == []:
        raise ApiError(400, "the prompt is empty", "invalid_value", "prompt")
    return [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)


def _token_text(llm: LLM) -> Callable[[int], str]:
    """Decodes a token as it reads behind another one: some tokenizers drop the space that a text
    begins with."""
    decode, anchor = llm.tokenizer.decode, llm.tokenizer.encode("a", add_special_tokens=False)
    known = len(decode(anchor, False))
    return lambda token: decode([*anchor, token], False)[known:]


def _readers(
    llm: LLM, body: CompletionRequest, prompts: Sequence[list[int]]
) -> Callable[[int], Detokenizer]:
    """Makes detokenizers as the engine uses them, for answers by their index."""
    skip, n = body.skip_special_tokens is not False, body.n or 1
    return lambda index: Detokenizer(
        lambda ids: llm.tokenizer.decode(ids, skip), prompts[index // n][-BEFORE:]
    )


async def _in_thread(work: Callable[[], T]) -> T:
    """Long texts take a while to tokenise: the other streams go on meanwhile."""
    return await asyncio.to_thread(work)
