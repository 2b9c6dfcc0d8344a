"""The engine thread's side of the worker: takes jobs in, runs rounds, gives chunks out."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from smart_decoding.errors import CapacityError, ConfigError, SmartError
from smart_decoding.server.errors import ApiError, of_smart_error
from smart_decoding.server.isolation import Isolation
from smart_decoding.server.jobs import Chunk, Delivery, Job

if TYPE_CHECKING:
    from smart_decoding.engine.request import Request
    from smart_decoding.llm import LLM
    from smart_decoding.server.inbox import Inbox
    from smart_decoding.server.observers import Observers

log = logging.getLogger("smart.engine")


@dataclass(frozen=True, slots=True)
class Outlet:
    """The ways back to the event loop. deliver: hands over; retry_after: seconds for refusals."""

    deliver: Callable[[list[Delivery]], None]
    retry_after: Callable[[], int]


class EngineThread:
    """Owns the engine and the jobs in it; nothing here is called from another thread.

    queue_timeout: seconds that a job may wait for its first slot.
    """

    def __init__(
        self, llm: LLM, inbox: Inbox, observers: Observers, outlet: Outlet, queue_timeout: float
    ) -> None:
        self.llm = llm
        self.engine = llm.engine
        self.owners: dict[Request, Job] = {}
        self._inbox = inbox
        self._observers = observers
        self._outlet = outlet
        self._queue_timeout = queue_timeout
        self._waiting: deque[Job] = deque()  # jobs of which no answer has begun
        self._outbox: list[Delivery] = []
        self._isolation = Isolation(self)

    def run(self) -> None:
        """Rounds until the inbox says stop. Raises what breaks the engine itself."""
        while not self._inbox.stopping:
            self._carry_out_commands(wait=not self.engine.has_unfinished_requests)
            self._drop_overdue()
            if self.engine.has_unfinished_requests:
                try:
                    self.step(self._inbox.arrived)
                    self._isolation.failures = 0
                except Exception as error:
                    self._isolation.after_failed_round(error)
            self._flush()

    def end_all(self, error: ApiError) -> None:
        """Tells every job that is still here why it ends."""
        for job in dict.fromkeys(self.owners.values()):
            self._outbox.append(Delivery(job, error, job.left))
        self._flush()

    def step(self, arrived: Callable[[], bool] = lambda: False) -> None:
        """One round. arrived: whether somebody waits for its end."""
        self._observers.tell(lambda observer: observer.before(self.engine))
        touched = self.engine.step(arrived)
        while self._waiting and any(r.table.pages or r.finished for r in self._waiting[0].answers):
            self._waiting.popleft()  # first come, first served: the others have not begun either
        self._observers.tell(lambda observer: observer.after(self.engine, touched))
        for request in touched:
            self.emit(request)

    def emit(self, request: Request) -> None:
        """Puts out what a request has gained; ends it if that raises."""
        try:
            self._emit(request)
        except Exception as error:  # of its text: the others have nothing to do with it
            self.fail(request, error)

    def fail(self, request: Request, error: Exception) -> None:
        """Ends the job of a request that raised, and tells its client."""
        job = self.owners.get(request)
        request_id = job.request_id if job else ""
        log.error("request failed", exc_info=error, extra={"request_id": request_id})
        self.engine.abort(request.id)
        if job is None:
            return
        if isinstance(error, ConfigError | CapacityError):  # any other error is not the request's
            self._end(job, of_smart_error(error))
        else:
            message = f"the model failed on this request: {type(error).__name__}: {error}"
            self._end(job, ApiError(500, message, "request_failed"))

    def _carry_out_commands(self, wait: bool) -> None:
        for command, job in self._inbox.commands(wait):
            if command == "add":
                self._add(job)
            else:
                self._end(job)

    def _add(self, job: Job) -> None:
        try:
            for place, prompt in enumerate(job.prompts):
                name = f"{job.id}-{place}"
                for request in self.engine.add_request(name, prompt, job.params, job.media):
                    job.answers[request] = place * job.params.n + request.sample
                    job.sent[request] = 0
                    self.owners[request] = job
        except SmartError as error:
            self._end(job, of_smart_error(error))
        except Exception as error:
            extra = {"request_id": job.request_id}
            log.error("a request could not be queued", exc_info=error, extra=extra)
            self._end(job, ApiError(500, f"internal error: {type(error).__name__}"))
        else:
            self._waiting.append(job)

    def _end(self, job: Job, error: ApiError | None = None) -> None:
        """Takes a job out of the engine, its slots with it; `error` goes to its client."""
        for request in job.answers:
            if self.owners.pop(request, None) is not None:
                self.engine.abort(request.id)
                self._tell_ended(request, "error" if error else "abort")
        if job in self._waiting:
            self._waiting.remove(job)
        self._outbox.append(Delivery(job, error, job.left))
        job.left = 0

    def _drop_overdue(self) -> None:
        now = time.monotonic()
        while self._waiting and now - self._waiting[0].submitted > self._queue_timeout:
            message = f"no free slot within {self._queue_timeout:g} s: try again later"
            retry_after = self._outlet.retry_after()
            error = ApiError(503, message, "queue_timeout", retry_after=retry_after)
            self._end(self._waiting[0], error)

    def _emit(self, request: Request) -> None:
        """For a job that does not stream, only at its end."""
        job = self.owners.get(request)
        if job is None or not (job.stream or request.finished):
            return
        stop = request.stop
        start = job.sent[request]
        tokens = list(request.output[start:])
        logprobs = None
        if request.logprobs is not None:
            logprobs = request.logprobs[start : len(request.output)]
        job.sent[request] = start + len(tokens)
        chunk = Chunk(job.answers[request], stop.new_text(), tokens, logprobs, stop.finish_reason)
        if request.finished:
            chunk.cached_tokens = request.metrics.cached_tokens
            del self.owners[request]
            job.left -= 1
            self._tell_ended(request, stop.finish_reason or "abort")
        self._outbox.append(Delivery(job, chunk, int(request.finished)))

    def _tell_ended(self, request: Request, reason: str) -> None:
        self._observers.tell(lambda observer: observer.ended(request, reason))

    def _flush(self) -> None:
        if self._outbox:
            self._outlet.deliver(self._outbox)
            self._outbox = []
