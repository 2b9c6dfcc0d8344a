"""The event loop's side of the engine: admits jobs, and starts and ends the engine's thread.

What the event loop counts, it counts on its own thread (`_deliver`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from smart_decoding.errors import SmartError
from smart_decoding.server.engine_thread import EngineThread, Outlet
from smart_decoding.server.errors import ApiError
from smart_decoding.server.inbox import Inbox
from smart_decoding.server.isolation import warm_up
from smart_decoding.server.jobs import Delivery, Job
from smart_decoding.server.observers import Observer, Observers

if TYPE_CHECKING:
    from smart_decoding.llm import LLM

log = logging.getLogger("smart.engine")


class Worker:
    """Runs an LLM in its own thread. `load` builds it there; `failed` is called if that fails.

    llm: None until it is ready; error: what ended the thread; active: answers that wait or run.
    """

    def __init__(
        self,
        load: Callable[[], LLM],
        max_queue: int = 256,
        queue_timeout: float = 60.0,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.llm: LLM | None = None
        self.error: BaseException | None = None
        self.failed: Callable[[], None] = lambda: None
        self.active = 0
        self.draining = False
        self.observers = Observers(observers)
        self.inbox = Inbox()
        self._load = load
        self._max_queue = max_queue
        self._queue_timeout = queue_timeout
        self._seconds = 1.0  # an answer takes, on average
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._main, name="smart-engine", daemon=True)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begins to load the model."""
        self._loop = loop
        self._thread.start()

    def drain(self) -> None:
        """No new jobs from now on; what is here goes on."""
        self.draining = True

    def stop(self, timeout: float = 10.0) -> None:
        """Ends the thread after its present round; what still runs is aborted."""
        self.inbox.stop()
        self._thread.join(timeout)

    @property
    def alive(self) -> bool:
        """Whether it loads or runs."""
        return self._thread.is_alive() and self.error is None

    def check_alive(self) -> None:
        """Raises ApiError (503) if the engine neither loads nor runs."""
        if not self.alive:
            message = "the engine has stopped; the server's log says why"
            raise ApiError(503, message, "engine_stopped")

    def ready(self) -> LLM:
        """The loaded model. Raises ApiError (503) while there is none."""
        if self.draining or self.inbox.stopping:
            raise _shutting_down()
        self.check_alive()
        if self.llm is None:
            raise ApiError(503, "the model is still loading", "not_ready")
        return self.llm

    def check_room(self, answers: int = 1) -> LLM:
        """The loaded model, if so many more answers may come in.

        Raises ApiError: 429 if the queue is full.
        """
        llm = self.ready()
        capacity = llm.engine.config.max_num_seqs + self._max_queue
        if answers > capacity:
            message = f"{answers} answers in one request: at most {capacity} fit in here"
            raise ApiError(400, message, "invalid_value")
        if self.active + answers > capacity:
            message = (
                f"the queue is full ({self.active} answers are waiting or running): try again later"
            )
            raise ApiError(429, message, "queue_full", retry_after=self._retry_after())
        return llm

    def submit(self, job: Job) -> None:
        """Queues a job. Raises ApiError as `check_room` does."""
        self.check_room(job.size)
        self.active += job.size
        job.submitted = time.monotonic()
        job.left = job.size
        self.inbox.add(job)

    def cancel(self, job: Job) -> None:
        """Ends a job before the next round, if it has not ended, and frees its slots."""
        if not job.closed:
            job.closed = True
            self.inbox.abort(job)

    def _retry_after(self) -> int:
        """Seconds after which a place may be free."""
        return min(30, max(1, math.ceil(self._seconds)))

    def _deliver(self, deliveries: list[Delivery]) -> None:
        for each in deliveries:
            if each.ended:
                self.active -= each.ended
                seconds = time.monotonic() - each.job.submitted
                self._seconds += 0.1 * (seconds - self._seconds)
            if each.content is not None:
                each.job.chunks.put_nowait(each.content)

    def _refuse_latecomers(self, error: ApiError) -> None:
        """Answers the jobs that the thread has not taken in any more."""
        late = [job for command, job in self.inbox.commands() if command == "add"]
        self._deliver([Delivery(job, error, job.left) for job in late])

    # --- from here on, the engine's thread ---

    def _main(self) -> None:
        try:
            llm = self._loaded()
        except BaseException as error:
            self.error = error
            if not isinstance(error, SmartError):
                log.error("the model could not be loaded", exc_info=error)
            self.failed()
            return
        outlet = Outlet(lambda deliveries: self._call(self._deliver, deliveries), self._retry_after)
        thread = EngineThread(llm, self.inbox, self.observers, outlet, self._queue_timeout)
        end = _shutting_down()
        try:
            thread.run()
        except BaseException as error:
            log.critical("the engine has died", exc_info=error)
            self.error = error
            message = f"the engine has died: {type(error).__name__}: {error}"
            end = ApiError(500, message, "engine_died")
        thread.end_all(end)
        self._call(self._refuse_latecomers, end)

    def _loaded(self) -> LLM:
        llm = self._load()
        warm_up(llm)
        for observer in self.observers:
            observer.start(llm)
        self.llm = llm
        model = str(llm.provenance.get("model", ""))
        log.info("ready", extra={"model": model, "speculation": llm.speculation.description})
        return llm

    def _call(self, function: Callable[[Any], None], argument: Any) -> None:
        """Has the event loop call `function`."""
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(function, argument)


def _shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", "shutting_down")
