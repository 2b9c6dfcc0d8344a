"""`AsyncLLM`: the engine behind vLLM's asynchronous interface."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from copy import copy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from smart_decoding.engine.outputs import (
    CompletionOutput,
    RequestOutput,
    TokenText,
    completion_of,
    logprobs_of,
    prompt_logprobs_of,
)
from smart_decoding.engine.request import RequestMetrics
from smart_decoding.engine.sampling_params import RequestOutputKind, SamplingParams
from smart_decoding.engine_args import EngineArgs, require_neutral
from smart_decoding.errors import ConfigError
from smart_decoding.models.registry import DEFAULT_MODEL

if TYPE_CHECKING:
    from pathlib import Path

    from smart_decoding.engine.jobs import Chunk, Delivery, Job
    from smart_decoding.llm import LLM
    from smart_decoding.multimodal.prompts import MediaPrompt, Prompt


@dataclass(slots=True)
class _Asked:
    """A request on its way. job: None while its prompt is tokenised."""

    text_of: TokenText
    job: Job | None = None
    aborted: bool = False
    box: asyncio.Queue[list[Delivery]] = field(default_factory=asyncio.Queue)


class AsyncLLM:
    """A model ready to answer from asyncio. The requests of all tasks share rounds.

    model, options: as for `LLM`, which is `llm`: its `chat_prompt` makes prompts of conversations.
    """

    def __init__(self, model: str | Path = DEFAULT_MODEL, **options: Any) -> None:
        from smart_decoding.llm import LLM

        self.llm: LLM = LLM(model, **options)
        self.llm.take_profile()
        self._asked: dict[str, _Asked] = {}

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> AsyncLLM:
        """The same from `AsyncEngineArgs`."""
        return cls(**vars(engine_args))

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None,
        request_id: str,
        lora_request: object = None,
        priority: object = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """The answers to one prompt, each time as they stand so far, or as `output_kind` says; the
        last is `finished`. lora_request, priority: as to `LLM.generate`.

        Leaving the loop, or the end of its task, aborts the request. Raises ConfigError or
        CapacityError for what can never run or an id that runs, and EngineStoppedError."""
        require_neutral({"lora_request": lora_request, "priority": priority})
        if request_id in self._asked:
            raise ConfigError(f"request id {request_id!r} is already running: give another")
        asked = self._asked[request_id] = _Asked(self.llm.tokenizer.token_text)
        params = sampling_params or self.llm.get_default_sampling_params()
        try:
            ready = await asyncio.to_thread(self.llm.text_prompt, prompt)
            job = await asyncio.to_thread(self.llm.job, [ready], [params], True)
            if not asked.aborted:
                self._submit(job, asked)
            given = output = _nothing_yet(request_id, ready, params)
            while not output.finished:
                output = await _more(output, asked)
                news = _news(given, output)
                if not news.outputs:  # callers read outputs[0] without asking
                    continue
                given = output
                if params.output_kind is RequestOutputKind.DELTA:
                    yield news
                elif output.finished or params.output_kind is RequestOutputKind.CUMULATIVE:
                    yield output
        finally:
            del self._asked[request_id]
            if asked.job is not None:
                self.llm.engine_thread.cancel(asked.job)  # of no effect if it is over

    async def abort(self, request_id: str) -> None:
        """Ends a request; its last output's answers have the finish_reason 'abort'. Unknown ids are
        ignored: it may have ended."""
        asked = self._asked.get(request_id)
        if asked is not None:
            asked.aborted = True
            if asked.job is not None:
                self.llm.engine_thread.cancel(asked.job)

    def shutdown(self) -> None:
        """Ends the engine after its present round. What still runs raises EngineStoppedError."""
        self.llm.engine_thread.stop()

    def _submit(self, job: Job, asked: _Asked) -> None:
        loop = asyncio.get_running_loop()

        def deliver(deliveries: list[Delivery]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(asked.box.put_nowait, deliveries)

        job.deliver = deliver
        self.llm.engine_thread.submit(job)
        asked.job = job


async def _more(output: RequestOutput, asked: _Asked) -> RequestOutput:
    answers = list(output.outputs)
    over = asked.job is None
    deliveries = [] if asked.job is None else await asked.box.get()
    while not asked.box.empty():  # the caller is slower than the engine
        deliveries += asked.box.get_nowait()
    for delivery in deliveries:
        if isinstance(delivery.content, BaseException):
            raise delivery.content
        if delivery.content is None:
            over = True
        else:
            chunk = delivery.content
            answers[chunk.index] = _grown(answers[chunk.index], chunk, asked)
    if over:
        answers = [replace(each, finish_reason=each.finish_reason or "abort") for each in answers]
    finished = all(each.finish_reason is not None for each in answers)
    scored = output.prompt_logprobs
    if scored is None and asked.job is not None and answers[0].token_ids:  # its prompt has run
        scored = prompt_logprobs_of(next(iter(asked.job.answers)), asked.text_of)
    return replace(output, outputs=answers, finished=finished, prompt_logprobs=scored)


def _news(before: RequestOutput, output: RequestOutput) -> RequestOutput:
    """What has come between two outputs; answers that stayed as they were are left out."""
    pairs = zip(before.outputs, output.outputs, strict=True)
    new = [
        replace(
            answer,
            text=answer.text[len(old.text) :],
            token_ids=answer.token_ids[len(old.token_ids) :],
            logprobs=answer.logprobs and answer.logprobs[len(old.logprobs or ()) :],
        )
        for old, answer in pairs
        if len(answer.token_ids) > len(old.token_ids) or answer.finish_reason != old.finish_reason
    ]
    scored = output.prompt_logprobs if before.prompt_logprobs is None else None
    return replace(output, outputs=new, prompt_logprobs=scored)


def _grown(answer: CompletionOutput, chunk: Chunk, asked: _Asked) -> CompletionOutput:
    """A new object: those given out before stay as they were."""
    assert asked.job is not None
    request = list(asked.job.answers)[chunk.index]
    if chunk.finish_reason is not None:  # the engine has done with it
        return completion_of(request, asked.text_of)
    logprobs = answer.logprobs
    if chunk.logprobs is not None:
        logprobs = (logprobs or []) + logprobs_of(chunk.logprobs, asked.text_of)
    return replace(
        answer,
        text=answer.text + chunk.text,
        token_ids=answer.token_ids + chunk.tokens,
        logprobs=logprobs,
        metrics=copy(request.metrics),
    )


def _nothing_yet(request_id: str, prompt: MediaPrompt, params: SamplingParams) -> RequestOutput:
    answers = [
        CompletionOutput(sample, "", [], None, None, RequestMetrics()) for sample in range(params.n)
    ]
    return RequestOutput(request_id, prompt.text, list(prompt.tokens), answers, finished=False)
