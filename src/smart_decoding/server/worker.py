"""The one thread that owns the engine. Jobs come in through a queue and leave in chunks, between
rounds.

Two threads share no mutable state but the inbox: what the event loop counts, it counts on its own
thread (`_deliver`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Literal, Protocol, TypeAlias

from smart_decoding.engine.engine import Engine
from smart_decoding.engine.media import Media
from smart_decoding.engine.request import Request
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.errors import CapacityError, ConfigError, SmartError
from smart_decoding.llm import LLM
from smart_decoding.server.errors import ApiError, of_smart_error

log = logging.getLogger("smart.engine")

GIVE_UP = 3  # failures in a row that no request survived: then the engine itself is broken

Command: TypeAlias = Literal["add", "abort", "stop"]


class Observer(Protocol):
    """Watches the engine from its own thread: metrics, the live page. All calls must be quick."""

    def start(self, llm: LLM) -> None:
        """The model is loaded."""
        ...

    def before(self, engine: Engine) -> None:
        """A round begins."""
        ...

    def after(self, engine: Engine, touched: Sequence[Request]) -> None:
        """A round is over; `touched` got tokens."""
        ...

    def ended(self, request: Request, reason: str) -> None:
        """An answer is over: 'stop', 'length', 'abort' or 'error'."""
        ...


@dataclass(slots=True)
class Chunk:
    """What one answer gained. tokens: ids; logprobs: one entry a token, or None if not asked
    for."""

    index: int
    text: str
    tokens: list[int]
    logprobs: list[Any] | None
    finish_reason: str | None
    cached_tokens: int = 0


@dataclass(eq=False, slots=True)
class Job:
    """One HTTP request: its prompts, each with `params.n` answers. Answer i of prompt p has index p
    * n + i.

    id: unique, ours; request_id: for the log, may be the client's; media: the pictures of its one
    prompt."""

    id: str
    prompts: Sequence[list[int]]
    params: SamplingParams
    stream: bool
    request_id: str = ""
    media: Media | None = None
    chunks: asyncio.Queue[Chunk | ApiError] = field(default_factory=asyncio.Queue)
    submitted: float = 0.0
    closed: bool = False  # the event loop's: no more chunks are wanted
    # The engine thread's:
    answers: dict[Request, int] = field(default_factory=dict)
    sent: dict[Request, int] = field(default_factory=dict)  # tokens given out
    left: int = 0  # answers that are not over yet

    @property
    def size(self) -> int:
        """Answers in all."""
        return len(self.prompts) * self.params.n


class Worker:
    """Runs an LLM in its own thread. `load` builds it there; `failed` is called if that cannot be
    done."""

    def __init__(
        self,
        load: Callable[[], LLM],
        max_queue: int = 256,
        queue_timeout: float = 60.0,
        observers: Sequence[Observer] = (),
    ) -> None:
        self._load, self.max_queue, self.queue_timeout, self.observers = (
            load,
            max_queue,
            queue_timeout,
            observers,
        )
        self.llm: LLM | None = None  # there once it is ready
        self.error: BaseException | None = None
        self.failed: Callable[[], None] = lambda: None
        self.active = 0  # answers that are waiting or running
        self._seconds = 1.0  # an answer takes, on average
        self._inbox: SimpleQueue[tuple[Command, Job | None]] = SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._main, name="smart-engine", daemon=True)
        self.draining = self._stopping = False
        self._read: deque[tuple[Command, Job | None]] = (
            deque()
        )  # out of the inbox, but not carried out yet
        self._owners: dict[Request, Job] = {}
        self._waiting: deque[Job] = deque()  # jobs of which no answer has begun
        self._outbox: list[tuple[Job, Chunk | ApiError | int]] = []
        self._failures = 0

    # ------------------------------------------------------------------------------------------ the
    # event loop's side

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begins to load the model."""
        self._loop = loop
        self._thread.start()

    def drain(self) -> None:
        """No new jobs from now on; what is here goes on."""
        self.draining = True

    def stop(self, timeout: float = 10.0) -> None:
        """Ends the thread after its present round; what still runs is aborted."""
        self._stopping = True
        self._inbox.put(("stop", None))
        self._thread.join(timeout)

    @property
    def alive(self) -> bool:
        """Whether it loads or runs."""
        return self._thread.is_alive() and self.error is None

    def ready(self) -> LLM:
        """The loaded model. Raises ApiError (503) while there is none."""
        if self.draining or self._stopping:
            raise ApiError(503, "the server is shutting down", "shutting_down")
        if not self.alive:
            raise ApiError(
                503, "the engine has stopped; the server's log says why", "engine_stopped"
            )
        if self.llm is None:
            raise ApiError(503, "the model is still loading", "not_ready")
        return self.llm

    def check_room(self, answers: int = 1) -> LLM:
        """The loaded model, if so many more answers may come in. Raises ApiError: 429 if the queue
        is full."""
        llm = self.ready()
        capacity = llm.engine.config.max_num_seqs + self.max_queue
        if answers > capacity:
            raise ApiError(
                400,
                f"{answers} answers in one request: at most {capacity} fit in here",
                "invalid_value",
            )
        if self.active + answers > capacity:
            message = (
                f"the queue is full ({self.active} answers are waiting or running): try again later"
            )
            raise ApiError(429, message, "queue_full", retry_after=self.retry_after)
        return llm

    def submit(self, job: Job) -> None:
        """Queues a job. Raises ApiError as `check_room` does."""
        self.check_room(job.size)
        self.active += job.size
        job.submitted, job.left = time.monotonic(), job.size
        self._inbox.put(("add", job))

    def cancel(self, job: Job) -> None:
        """Ends a job before the next round, if it has not ended, and frees its slots."""
        if not job.closed:
            job.closed = True
            self._inbox.put(("abort", job))

    @property
    def retry_after(self) -> int:
        """Seconds after which a place may be free."""
        return min(30, max(1, math.ceil(self._seconds)))

    def _deliver(self, items: list[tuple[Job, Chunk | ApiError | int]]) -> None:
        for job, item in items:
            if isinstance(item, int):  # so many answers are over
                if not item:
                    continue
                self.active -= item
                self._seconds += 0.1 * (time.monotonic() - job.submitted - self._seconds)
            else:
                job.chunks.put_nowait(item)

    def _refuse_latecomers(self, error: ApiError) -> None:
        """Jobs that were put into the inbox while the thread was ending, or read from it in its
        last round."""
        while self._read or not self._inbox.empty():
            command, job = self._next_command()
            if command == "add" and job is not None:
                self._deliver([(job, job.left), (job, error)])

    # ----------------------------------------------------------------------------------------------
    # the engine thread

    def _main(self) -> None:
        try:
            llm = self._load()
            warm_up(llm)
            for observer in self.observers:
                observer.start(llm)
            self.llm = llm
        except BaseException as error:
            self.error = error
            if not isinstance(error, SmartError):
                log.error("the model could not be loaded", exc_info=error)
            self.failed()
            return
        log.info(
            "ready",
            extra={
                "model": str(llm.provenance.get("model", "")),
                "speculation": llm.speculation.description,
            },
        )
        end = ApiError(503, "the server is shutting down", "shutting_down")
        try:
            while not self._stopping:
                self._round(llm.engine)
        except BaseException as error:
            log.critical("the engine has died", exc_info=error)
            self.error = error
            end = ApiError(
                500, f"the engine has died: {type(error).__name__}: {error}", "engine_died"
            )
        for job in dict.fromkeys(self._owners.values()):
            self._outbox += [(job, job.left), (job, end)]
        self._flush()
        self._call(self._refuse_latecomers, end)

    def _round(self, engine: Engine) -> None:
        self._take(engine, wait=not engine.has_unfinished_requests)
        self._drop_overdue(engine)
        if engine.has_unfinished_requests:
            try:
                self._step(engine, self._somebody_came)
                self._failures = 0
            except Exception as error:
                self._isolate(engine, error)
        self._flush()

    def _step(self, engine: Engine, arrived: Callable[[], bool] = lambda: False) -> None:
        self._tell(lambda observer: observer.before(engine))
        touched = engine.step(arrived)
        while self._waiting and any(r.table.pages or r.finished for r in self._waiting[0].answers):
            self._waiting.popleft()  # first come, first served: the others have not begun either
        self._tell(lambda observer: observer.after(engine, touched))
        for request in touched:
            self._emit_or_end(engine, request)

    def _tell(self, call: Callable[[Observer], None]) -> None:
        """An observer that raises is not asked again: watching must not hurt the watched."""
        for observer in self.observers:
            try:
                call(observer)
            except Exception as error:
                log.error("%s has failed and sees no more", type(observer).__name__, exc_info=error)
                self.observers = [other for other in self.observers if other is not observer]

    def _take(self, engine: Engine, wait: bool) -> None:
        """Carries out what has come in; waits for it if there is nothing else to do."""
        while wait or self._read or not self._inbox.empty():
            command, job = self._next_command()
            wait = False
            if command == "add" and job is not None:
                self._add(engine, job)
            elif command == "abort" and job is not None:
                self._end(engine, job)

    def _next_command(self) -> tuple[Command, Job | None]:
        return self._read.popleft() if self._read else self._inbox.get()

    def _somebody_came(self) -> bool:
        """Whether a job has come in since the round began, and has not left again."""
        while not self._inbox.empty():
            self._read.append(self._inbox.get())
        left = [job for command, job in self._read if command == "abort"]
        return any(command == "add" and job not in left for command, job in self._read)

    def _add(self, engine: Engine, job: Job) -> None:
        try:
            for place, prompt in enumerate(job.prompts):
                for request in engine.add_request(
                    f"{job.id}-{place}", prompt, job.params, job.media
                ):
                    job.answers[request] = place * job.params.n + request.sample
                    job.sent[request] = 0
                    self._owners[request] = job
        except SmartError as error:
            self._end(engine, job, of_smart_error(error))
        except Exception as error:
            log.error(
                "a request could not be queued",
                exc_info=error,
                extra={"request_id": job.request_id},
            )
            self._end(engine, job, ApiError(500, f"internal error: {type(error).__name__}"))
        else:
            self._waiting.append(job)

    def _end(self, engine: Engine, job: Job, error: ApiError | None = None) -> None:
        """Takes a job out of the engine, its slots with it; `error` goes to its client."""
        for request in job.answers:
            if self._owners.pop(request, None) is not None:
                engine.abort(request.id)
                self._gone(request, "error" if error else "abort")
        if job in self._waiting:
            self._waiting.remove(job)
        self._outbox.append((job, job.left))
        job.left = 0
        if error is not None:
            self._outbox.append((job, error))

    def _drop_overdue(self, engine: Engine) -> None:
        now = time.monotonic()
        while self._waiting and now - self._waiting[0].submitted > self.queue_timeout:
            message = f"no free slot within {self.queue_timeout:g} s: try again later"
            error = ApiError(503, message, "queue_timeout", retry_after=self.retry_after)
            self._end(engine, self._waiting[0], error)

    def _emit_or_end(self, engine: Engine, request: Request) -> None:
        try:
            self._emit(request)
        except Exception as error:  # of its text: the others have nothing to do with it
            self._condemn(engine, request, error)

    def _emit(self, request: Request) -> None:
        """Puts out what a request has gained; for a job that does not stream, only at its end."""
        job = self._owners.get(request)
        if job is None or not (job.stream or request.finished):
            return
        stop, start = request.stop, job.sent[request]
        tokens = list(request.output[start:])
        logprobs = (
            None if request.logprobs is None else request.logprobs[start : len(request.output)]
        )
        job.sent[request] = start + len(tokens)
        chunk = Chunk(job.answers[request], stop.new_text(), tokens, logprobs, stop.finish_reason)
        if request.finished:
            chunk.cached_tokens = request.metrics.cached_tokens
            del self._owners[request]
            job.left -= 1
            self._outbox.append((job, 1))
            self._gone(request, stop.finish_reason or "abort")
        self._outbox.append((job, chunk))

    def _gone(self, request: Request, reason: str) -> None:
        self._tell(lambda observer: observer.ended(request, reason))

    def _flush(self) -> None:
        if self._outbox:
            self._call(self._deliver, self._outbox)
            self._outbox = []

    def _call(self, function: Callable[[Any], None], argument: Any) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(function, argument)

    # ------------------------------------------------------------------------------------------------------- failures

    def _isolate(self, engine: Engine, error: Exception) -> None:
        """After a round that raised: runs each of its requests alone. Those that raise again end,
        the others go on.

        Tokens do not depend on the batch, so the survivors' answers are the same as without the
        failure."""
        log.error("a round has failed; trying its requests one by one", exc_info=error)
        suspects, queue = engine.suspend(), engine.scheduler.waiting
        others = [request for request in queue if request not in suspects]
        survivors = []
        for suspect in suspects:
            queue.clear()
            if suspect.finished:  # in the very round that failed, or with another answer of its job
                self._emit_or_end(engine, suspect)
                continue
            queue.append(suspect)
            try:
                self._run_alone(engine, suspect)
                survivors.append(suspect)
            except Exception as own:
                self._condemn(engine, suspect, own)
            engine.suspend()
        for request in [request for request in self._owners if request.finished]:
            self._emit_or_end(engine, request)
        queue.clear()
        self._failures = 0 if survivors else self._failures + 1
        if self._failures >= GIVE_UP:
            self._try_what_must_work(error)
        queue.extend(request for request in (*survivors, *others) if not request.finished)

    def _try_what_must_work(self, error: Exception) -> None:
        """After failures in a row, which may have been the requests' own. Raises `error` if the
        engine is to blame."""
        assert self.llm is not None
        try:
            warm_up(self.llm)
        except Exception:
            raise error from None
        self._failures = 0

    def _condemn(self, engine: Engine, request: Request, error: Exception) -> None:
        job = self._owners.get(request)
        log.error(
            "request failed", exc_info=error, extra={"request_id": job.request_id if job else ""}
        )
        engine.abort(request.id)
        if job is not None:
            message = f"the model failed on this request: {type(error).__name__}: {error}"
            asked_too_much = isinstance(
                error, ConfigError | CapacityError
            )  # a ModelError is nobody's request's fault
            own = (
                of_smart_error(error)
                if asked_too_much
                else ApiError(500, message, "request_failed")
            )
            self._end(engine, job, own)

    def _run_alone(self, engine: Engine, request: Request) -> None:
        """Until it has taken part in a round of each kind: its prompt's, and a decoding one."""
        if len(request.tokens) != len(request.prompt) + len(request.output):
            raise RuntimeError("it failed while its new tokens were taken in")
        rounds, progress = request.metrics.rounds, -1
        while (
            not request.finished
            and request.metrics.rounds == rounds
            and request.table.length > progress
        ):
            progress = request.table.length
            self._step(engine)


def warm_up(llm: LLM) -> None:
    """One short answer, so that the first client does not pay for compilation and first touches of
    memory.

    Raises ConfigError if not even that fits in."""
    room = llm.engine.config.max_model_len
    if room < 3:
        raise ConfigError(
            f"max_model_len={room} is not allowed for a server: it must be at least 3"
        )
    llm.generate([[0] * min(8, room - 2)], SamplingParams(temperature=0, max_tokens=2))
