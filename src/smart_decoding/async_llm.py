"""`AsyncLLM`: the engine behind vLLM's asynchronous interface, and below the server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from copy import copy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from smart_decoding.engine.engine_thread import LONGEST_ROUND
from smart_decoding.engine.jobs import Chunk, Delivery, Job
from smart_decoding.engine.outputs import (
    CompletionOutput,
    RequestOutput,
    TokenText,
    completion_of,
    logprobs_of,
    prompt_logprobs_of,
)
from smart_decoding.engine.request import Request, RequestMetrics
from smart_decoding.engine.sampling_params import RequestOutputKind, SamplingParams
from smart_decoding.engine_args import EngineArgs, require_neutral
from smart_decoding.errors import ConfigError
from smart_decoding.models.checkpoints.registry import DEFAULT_MODEL

if TYPE_CHECKING:
    from pathlib import Path

    from smart_decoding.llm import LLM
    from smart_decoding.multimodal.prompts import MediaPrompt, Prompt


@dataclass(eq=False, slots=True)
class AsyncJob(Job):
    """A job whose deliveries come to the event loop in which it was submitted.

    on_delivery: called in the loop with each delivery; box: deliveries not taken yet; open: answers
    whose end has not been taken, 0 before the job is submitted; cancelled: its caller has gone.
    """

    on_delivery: Callable[[Delivery], None] = lambda delivery: None
    box: asyncio.Queue[Delivery] = field(default_factory=asyncio.Queue)
    open: int = 0
    cancelled: bool = False

    async def next(self) -> Chunk | None:
        """Wait for the next chunk; None if the job was cancelled. Raises the job's error."""
        delivery = await self.box.get()
        self.open -= delivery.ended
        if isinstance(delivery.content, Chunk):
            return delivery.content
        self.open = 0
        if delivery.content is not None:
            raise delivery.content
        return None


@dataclass(frozen=True, slots=True)
class _Loop:
    """The way from the engine thread to an event loop: one call for all jobs of a round."""

    loop: asyncio.AbstractEventLoop

    def __call__(self, deliveries: list[Delivery]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self.loop.call_soon_threadsafe(_deliver, deliveries)


def _deliver(deliveries: list[Delivery]) -> None:
    for delivery in deliveries:
        job = delivery.job
        assert isinstance(job, AsyncJob)
        job.on_delivery(delivery)
        job.box.put_nowait(delivery)


class AsyncLLM:
    """A model ready to answer from asyncio. The requests of all tasks share rounds.

    model, options: as for `LLM`, or one that is loaded; it is `llm`, whose `chat_prompt` makes
    prompts of conversations.
    """

    def __init__(self, model: str | Path | LLM = DEFAULT_MODEL, **options: Any) -> None:
        from smart_decoding.llm import LLM

        self.llm = model if isinstance(model, LLM) else LLM(model, **options)
        self._jobs: dict[str, AsyncJob] = {}

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> AsyncLLM:
        """Return the same from `AsyncEngineArgs`."""
        return cls(**vars(engine_args))

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None,
        request_id: str,
        lora_request: object = None,
        priority: object = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Return the answers to one prompt, each time as they stand so far, or as `output_kind`
        says; the last is `finished`. lora_request, priority: as to `LLM.generate`.

        Leaving the loop, or the end of its task, aborts the request. Raises ConfigError or
        CapacityError for what can never run or an id that runs, and EngineStoppedError."""
        require_neutral({"lora_request": lora_request, "priority": priority})
        if request_id in self._jobs:
            raise ConfigError(f"request id {request_id!r} is already running: give another")
        job = self._jobs[request_id] = AsyncJob(request_id, self.llm.engine, [], stream=True)
        params = sampling_params or self.llm.get_default_sampling_params()
        try:
            ready = await asyncio.to_thread(self.llm.text_prompt, prompt)
            made = await asyncio.to_thread(self.llm.job, [ready], [params])
            job.id, job.asks, job.grammars = made.id, made.asks, made.grammars
            self.submit(job)
            sent = output = _nothing_yet(request_id, ready, params)
            while not output.finished:
                output = await _more(output, job, self.llm.tokenizer.token_text)
                news = _news(sent, output)
                if not news.outputs:  # callers read outputs[0] without asking
                    continue
                sent = output
                if params.output_kind is RequestOutputKind.DELTA:
                    yield news
                elif output.finished or params.output_kind is RequestOutputKind.CUMULATIVE:
                    yield output
        finally:
            del self._jobs[request_id]
            self.cancel(job)

    async def abort(self, request_id: str) -> None:
        """End a request; its last output's answers have the finish_reason 'abort'. Unknown ids are
        ignored: it may have ended."""
        if request_id in self._jobs:
            self.cancel(self._jobs[request_id])

    def submit(self, job: AsyncJob) -> None:
        """Queue a job, unless it is cancelled already; this event loop gets its deliveries. Raises
        EngineStoppedError."""
        if job.cancelled:
            return
        job.deliver = _Loop(asyncio.get_running_loop())
        self.llm.engine_thread.submit(job)
        job.open = job.size

    def cancel(self, job: AsyncJob) -> None:
        """End a job before the next round, if it has not ended, and free its slots."""
        job.cancelled = True
        if job.open:
            self.llm.engine_thread.cancel(job)

    def shutdown(self, timeout: float = LONGEST_ROUND) -> None:
        """End the engine after its present round. timeout: seconds to wait for that round. Requests
        that still run raise EngineStoppedError."""
        self.llm.engine_thread.stop(timeout)


async def _more(output: RequestOutput, job: AsyncJob, text_of: TokenText) -> RequestOutput:
    answers = list(output.outputs)
    while job.open:
        chunk = await job.next()
        if chunk is not None:
            index = chunk.index
            answers[index] = _extended(answers[index], chunk, list(job.answers)[index], text_of)
        if job.box.empty():  # else the caller is slower than the engine
            break
    if not job.open:
        answers = [replace(each, finish_reason=each.finish_reason or "abort") for each in answers]
    finished = all(each.finish_reason is not None for each in answers)
    scored = output.prompt_logprobs
    if scored is None and answers[0].token_ids:  # its prompt has run
        scored = prompt_logprobs_of(next(iter(job.answers)), text_of)
    return replace(output, outputs=answers, finished=finished, prompt_logprobs=scored)


def _news(before: RequestOutput, output: RequestOutput) -> RequestOutput:
    """Return the additions between two outputs; unchanged answers are left out."""
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


def _extended(
    answer: CompletionOutput, chunk: Chunk, request: Request, text_of: TokenText
) -> CompletionOutput:
    """Return a new object: callers keep the earlier ones."""
    if chunk.finish_reason is not None:  # the engine has done with it
        return completion_of(request, text_of)
    logprobs = answer.logprobs
    if chunk.logprobs is not None:
        logprobs = (logprobs or []) + logprobs_of(chunk.logprobs, text_of)
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
