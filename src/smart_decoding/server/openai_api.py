"""The routes under /v1, /infill and tokenisation: OpenAI's interface over the worker."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import Response

from smart_decoding.engine.engine import BEFORE
from smart_decoding.engine.stopping import Detokenizer
from smart_decoding.errors import CapacityError
from smart_decoding.models.text.harmony import speaks_harmony
from smart_decoding.server.answering import ParsedRequest, answer, check_model
from smart_decoding.server.answers import ChatForm, CompletionForm, Json
from smart_decoding.server.chat import ChatTask, chat_task
from smart_decoding.server.counting import CountedRoute
from smart_decoding.server.errors import ApiError
from smart_decoding.server.infill import (
    InfillReply,
    infill_tokens,
    prompt_of,
    stop_at_ends,
    texts_of,
)
from smart_decoding.server.preparation import TooLargeError, task
from smart_decoding.server.replies import Reply
from smart_decoding.server.responses import ResponsesReply
from smart_decoding.server.responses_request import ResponsesRequest
from smart_decoding.server.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    InfillRequest,
    TokenizeRequest,
)
from smart_decoding.server.tool_text import HarmonyReader, ToolText
from smart_decoding.server.turns import unless_gone

if TYPE_CHECKING:
    from smart_decoding.llm import LLM
    from smart_decoding.multimodal.prompts import PlannedPrompt
    from smart_decoding.server.tool_text import AnswerReader
    from smart_decoding.server.worker import Worker

T = TypeVar("T")


def router(worker: Worker) -> APIRouter:
    """Return all routes that speak OpenAI's language."""
    api = APIRouter(route_class=CountedRoute)
    routes = _Routes(worker)
    api.get("/v1/models")(routes.models)
    api.get("/v1/models/{name:path}")(routes.model)
    api.post("/v1/completions", response_model=None)(routes.completions)
    api.post("/v1/chat/completions", response_model=None)(routes.chat)
    api.post("/v1/responses", response_model=None)(routes.responses)
    api.post("/infill", response_model=None)(routes.infill)
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
        sent = _prompts(body.prompt)
        llm = self._worker.check_room(len(sent) * (body.n or 1), request.state.client)
        if body.suffix:
            sent = await self._around_gap(request, llm, body, sent)
        prompts = [await self._text_prompt(request, llm, each) for each in sent]
        form = CompletionForm(llm.tokenizer.token_text, body.logprobs, _readers(llm, body, prompts))
        parsed = ParsedRequest(
            body, prompts, form, body.logprobs, partial(self._encode, request, False)
        )
        return await answer(self._worker, request, parsed)

    async def _around_gap(
        self, request: Request, llm: LLM, body: CompletionRequest, sent: Sequence[str | list[int]]
    ) -> list[list[int]]:
        """Return prompts with the suffix behind them, to be answered with the text between."""
        tokens = infill_tokens(llm.tokenizer, "suffix")
        stop_at_ends(body, tokens)
        behind = await self._encoded(request, "suffix", body.suffix or "", False)
        before = [
            await self._encoded(request, "prompt", each, False) if isinstance(each, str) else each
            for each in sent
        ]
        return [tokens.prompt(each, behind) for each in before]

    async def infill(self, request: Request, body: InfillRequest) -> Response:
        llm = self._worker.check_room(1, request.state.client)
        tokens = infill_tokens(llm.tokenizer, body.prompt_field)
        stop_at_ends(body, tokens)
        context = llm.engine.config.max_model_len
        texts, shortened = texts_of(body, tokens, context)
        encode = partial(self._encode, request, False)
        encoded = await encode(body.prompt_field, texts)
        prompt, cut = prompt_of(encoded, tokens, context, body.limit or context // 2)
        prompts = [await self._text_prompt(request, llm, prompt)]
        form = CompletionForm(llm.tokenizer.token_text, None, _readers(llm, body, prompts))
        reply = partial(InfillReply, truncated=cut or shortened)
        parsed = ParsedRequest(body, prompts, form, None, encode, reply=reply)
        return await answer(self._worker, request, parsed)

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
        make = partial(chat_task, llm, body.messages, tools, body.variables)
        plan = await self._chat_prompt(request, body.prompt_field, llm, make)
        body.messages.clear()  # they may hold megabytes, and the answer may wait
        pictures = self._worker.pictures
        client = request.state.client
        release = pictures.hold(client, plan.bytes)
        try:
            salt = self._worker.settings.cache_salt(client, body.cache_salt)
            prompt = await pictures.decoded(request, plan, salt)
            top = (body.top_logprobs or 0) if body.logprobs else None
            form = ChatForm(llm.tokenizer.token_text, top, _reader(llm, body))
            encode = partial(self._encode, request, False)
            parsed = ParsedRequest(
                body, [prompt.tokens], form, top, encode, prompt.media, reply, release
            )
            return await answer(self._worker, request, parsed)
        except BaseException:
            release()
            raise

    async def _chat_prompt(
        self, request: Request, field: str, llm: LLM, make: Callable[[], ChatTask]
    ) -> PlannedPrompt:
        """Return the prompt of the conversation in `field`."""
        texts = self._worker.texts
        made = await texts.checked(request, make)
        (tokens,) = await self._prepared(request, field, self._worker.preparation.tokens, made.task)
        plan = partial(llm.prompts.plan, tokens, made.pictures)
        try:
            return await (texts.read if made.pictures else texts.checked)(request, plan)
        except CapacityError as error:
            raise _too_long(error, field) from error

    async def _text_prompt(self, request: Request, llm: LLM, prompt: str | list[int]) -> list[int]:
        """Return a completion's prompt, which has no pictures."""
        if isinstance(prompt, str):
            prompt = await self._encoded(request, "prompt", prompt)
        plan = partial(llm.prompts.plan, prompt, ())
        return (await self._worker.texts.checked(request, plan)).tokens

    async def _encoded(
        self, request: Request, field: str, text: str, add_special_tokens: bool = True
    ) -> list[int]:
        """Return token ids of the text in `field`."""
        (tokens,) = await self._encode(request, add_special_tokens, field, [text])
        return tokens

    async def _encode(
        self, request: Request, add_special_tokens: bool, field: str, texts: list[str]
    ) -> list[list[int]]:
        """Return token ids of texts in `field`."""
        make = partial(task, "encode", texts=texts, add_special_tokens=add_special_tokens)
        made = await self._worker.texts.checked(request, make)
        return await self._prepared(request, field, self._worker.preparation.tokens, made)

    async def _prepared(
        self,
        request: Request,
        field: str,
        prepare: Callable[[str, bytes], Coroutine[Any, Any, T]],
        made: bytes,
    ) -> T:
        """Return the result of a preparation task of `field`. Raises ApiError."""
        try:
            result = prepare(request.state.client, made)
            return await unless_gone(request, result)
        except CapacityError as error:
            raise _too_long(error, field) from error
        except TooLargeError as error:
            raise ApiError(400, f"{field}: {error}", "invalid_value", field) from error

    async def tokenize(self, request: Request, body: TokenizeRequest) -> Json:
        llm = self._model(body.model)
        if body.messages:
            make = partial(chat_task, llm, body.messages, (), body.chat_template_kwargs)
            found = (await self._chat_prompt(request, "messages", llm, make)).tokens
        else:
            special = body.add_special_tokens
            found = await self._encoded(request, "prompt", body.prompt or "", special)
        length = llm.engine.config.max_model_len
        return {"count": len(found), "max_model_len": length, "tokens": found}

    async def detokenize(self, request: Request, body: DetokenizeRequest) -> Json:
        llm = self._model(body.model)
        if max(body.tokens, default=0) >= llm.target.vocab:
            message = f"a token id is outside the vocabulary of {llm.target.vocab}"
            raise ApiError(400, message, "invalid_value", "tokens")
        make = partial(task, "decode", ids=body.tokens)
        made = await self._worker.texts.checked(request, make)
        text = await self._prepared(request, "tokens", self._worker.preparation.text, made)
        return {"prompt": text}

    def _model(self, name: str | None) -> LLM:
        """Return the loaded model. Raises ApiError if `name` is another model's."""
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


def _reader(llm: LLM, body: ChatRequest) -> Callable[[], AnswerReader] | None:
    """Return what splits the answers to a chat, if they may hold more than content."""
    if speaks_harmony(llm.tokenizer.template) and body.read_channels():
        return HarmonyReader
    return None if body.offer is None else ToolText


def _too_long(error: CapacityError, field: str) -> ApiError:
    return ApiError(400, str(error), "context_length_exceeded", field)


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> list[Any]:
    """Return one prompt, or several, as a list: texts or token ids. Raises ApiError if there is
    none."""
    if prompt == []:
        raise ApiError(400, "the prompt is empty", "invalid_value", "prompt")
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)


def _readers(
    llm: LLM, body: CompletionRequest | InfillRequest, prompts: Sequence[list[int]]
) -> Callable[[int], Detokenizer]:
    """Return a function from an answer's index to a detokenizer as the engine uses it."""
    skip = body.skip_special_tokens is not False
    n = body.n or 1

    def decode(ids: Sequence[int]) -> str:
        return llm.tokenizer.decode(ids, skip)

    return lambda index: Detokenizer(decode, prompts[index // n][-BEFORE:])
