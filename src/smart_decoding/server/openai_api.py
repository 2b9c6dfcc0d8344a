"""The routes under /v1, and tokenisation: OpenAI's interface over the worker."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import Response

from smart_decoding.engine.engine import BEFORE
from smart_decoding.engine.stopping import Detokenizer
from smart_decoding.errors import CapacityError
from smart_decoding.server.answering import Asked, answer, check_model
from smart_decoding.server.answers import ChatForm, CompletionForm, Json
from smart_decoding.server.chat import chat_prompt
from smart_decoding.server.counting import CountedRoute
from smart_decoding.server.errors import ApiError
from smart_decoding.server.replies import Reply
from smart_decoding.server.responses import ResponsesReply
from smart_decoding.server.responses_request import ResponsesRequest
from smart_decoding.server.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

if TYPE_CHECKING:
    from smart_decoding.llm import LLM
    from smart_decoding.server.worker import Worker

T = TypeVar("T")


def router(worker: Worker) -> APIRouter:
    """All routes that speak OpenAI's language."""
    api = APIRouter(route_class=CountedRoute)
    routes = _Routes(worker)
    api.get("/v1/models")(routes.models)
    api.get("/v1/models/{name:path}")(routes.model)
    api.post("/v1/completions", response_model=None)(routes.completions)
    api.post("/v1/chat/completions", response_model=None)(routes.chat)
    api.post("/v1/responses", response_model=None)(routes.responses)
    api.post("/tokenize")(routes.tokenize)
    api.post("/detokenize")(routes.detokenize)
    return api


class _Routes:
    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._started = int(time.time())

    async def models(self) -> Json:
        return {"object": "list", "data": [self._card()]}

    async def model(self, name: str) -> Json:
        check_model(name, self._worker)
        return self._card()

    async def completions(self, request: Request, body: CompletionRequest) -> Response:
        given = _prompts(body.prompt)
        llm = self._worker.check_room(len(given) * (body.n or 1), request.state.client)
        read = [partial(llm.text_prompt, each) for each in given]
        prompts = [(await self._read(request, body.prompt_field, each)).tokens for each in read]
        form = CompletionForm(llm.tokenizer.token_text, body.logprobs, _readers(llm, body, prompts))
        asked = Asked(body, prompts, form, body.logprobs, partial(self._read, request))
        return await answer(self._worker, request, asked)

    async def chat(self, request: Request, body: ChatRequest) -> Response:
        return await self._chat(request, body, Reply)

    async def responses(self, request: Request, body: ResponsesRequest) -> Response:
        defaults = self._worker.ready().default_sampling_params
        reply = partial(ResponsesReply, echo=body.echo(defaults))
        return await self._chat(request, body.chat, reply)

    async def _chat(
        self, request: Request, body: ChatRequest, reply: Callable[..., Reply]
    ) -> Response:
        llm = self._worker.check_room(1, request.state.client)
        offer = body.offer
        tools = offer.tools if offer else ()
        read = partial(chat_prompt, llm, body.messages, tools, body.variables)
        plan = await self._read(request, body.prompt_field, read)
        body.messages.clear()  # they may hold megabytes, and the answer may wait
        pictures = self._worker.pictures
        client = request.state.client
        release = pictures.hold(client, plan.bytes)
        try:
            salt = self._worker.settings.cache_salt(client, body.cache_salt)
            prompt = await pictures.decoded(request, plan, salt)
            top = (body.top_logprobs or 0) if body.logprobs else None
            form = ChatForm(llm.tokenizer.token_text, top, offer is not None)
            read_more = partial(self._read, request)
            tokens = [list(prompt.tokens)]
            asked = Asked(body, tokens, form, top, read_more, prompt.media, reply, release)
            return await answer(self._worker, request, asked)
        except BaseException:
            release()
            raise

    async def _read(self, request: Request, field: str, read: Callable[[], T]) -> T:
        """What `read` makes of the texts in `field`, when it is the client's turn."""
        try:
            return await self._worker.texts.read(request, read)
        except CapacityError as error:
            raise ApiError(400, str(error), "context_length_exceeded", field) from error

    async def tokenize(self, request: Request, body: TokenizeRequest) -> Json:
        llm = self._model(body.model)

        def tokens() -> list[int]:
            if body.messages:
                variables = body.chat_template_kwargs
                return list(chat_prompt(llm, body.messages, variables=variables).tokens)
            return llm.tokenizer.encode(body.prompt or "", body.add_special_tokens)

        found = await self._read(request, "messages" if body.messages else "prompt", tokens)
        length = llm.engine.config.max_model_len
        return {"count": len(found), "max_model_len": length, "tokens": found}

    async def detokenize(self, request: Request, body: DetokenizeRequest) -> Json:
        llm = self._model(body.model)
        if max(body.tokens, default=0) >= llm.target.vocab:
            message = f"a token id is outside the vocabulary of {llm.target.vocab}"
            raise ApiError(400, message, "invalid_value", "tokens")
        read = partial(llm.tokenizer.decode, body.tokens, False)
        return {"prompt": await self._read(request, "tokens", read)}

    def _model(self, name: str | None) -> LLM:
        """The model, if it is there and `name`, where one is given, is its name."""
        llm = self._worker.ready()
        if name:
            check_model(name, self._worker)
        return llm

    def _card(self) -> Json:
        llm = self._worker.llm
        return {
            "id": self._worker.settings.model_name,
            "object": "model",
            "created": self._started,
            "owned_by": "smart-decoding",
            "max_model_len": llm.engine.config.max_model_len if llm else None,
        }


def _prompts(given: str | list[str] | list[int] | list[list[int]]) -> list[Any]:
    """One prompt, or several, as a list: texts or token ids. Raises ApiError if there is none."""
    if given == []:
        raise ApiError(400, "the prompt is empty", "invalid_value", "prompt")
    return [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)


def _readers(
    llm: LLM, body: CompletionRequest, prompts: Sequence[list[int]]
) -> Callable[[int], Detokenizer]:
    """Makes detokenizers as the engine uses them, for answers by their index."""
    skip = body.skip_special_tokens is not False
    n = body.n or 1

    def decode(ids: Sequence[int]) -> str:
        return llm.tokenizer.decode(ids, skip)

    return lambda index: Detokenizer(decode, prompts[index // n][-BEFORE:])
