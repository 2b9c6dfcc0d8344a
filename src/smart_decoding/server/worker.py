"""The server's `AsyncLLM`: load it, admit and count its jobs, turn its errors into HTTP's."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from smart_decoding.async_llm import AsyncJob, AsyncLLM
from smart_decoding.engine.engine_thread import warm_up
from smart_decoding.engine.jobs import Chunk, Delivery, Job, QueueTimeoutError
from smart_decoding.engine.observers import Observer
from smart_decoding.errors import CapacityError, ConfigError, EngineStoppedError, SmartError
from smart_decoding.multimodal.prompts import PromptBuilder
from smart_decoding.server.errors import ApiError, gone, of_smart_error, shutting_down
from smart_decoding.server.pictures import Pictures
from smart_decoding.server.preparation import Preparation
from smart_decoding.server.turns import Texts

if TYPE_CHECKING:
    from smart_decoding.engine.inbox import Inbox
    from smart_decoding.llm import LLM
    from smart_decoding.server.settings import ServerSettings

log = logging.getLogger("smart.engine")


class Watcher(Observer):
    """An observer that also gets the model once it is loaded."""

    def start(self, llm: LLM) -> None:
        """The model is loaded."""


class Worker:
    """Serves an LLM. `load` builds it in a thread; `failed` is called if that fails.

    engine: None until it is ready; clients: answers that wait or run, by client; texts,
    preparation, pictures: work on requests before they are jobs.
    """

    def __init__(
        self,
        load: Callable[[], LLM],
        settings: ServerSettings,
        observers: Sequence[Watcher] = (),
    ) -> None:
        self.settings = settings
        self.texts = Texts()
        self.engine: AsyncLLM | None = None
        self.failed: Callable[[], None] = lambda: None
        self.clients: Counter[str] = Counter()
        self.preparation = Preparation()
        self.pictures = Pictures()
        self.draining = False
        self._observers = observers
        self._load_error: BaseException | None = None
        self._load = load
        # Unended answers of each job, and the callback at the end of the last one.
        self._unended: dict[Job, tuple[int, Callable[[], None]]] = {}
        self._seconds = 1.0  # an answer takes, on average
        self._thread = threading.Thread(target=self._main, name="smart-load", daemon=True)

    def start(self) -> None:
        """Begin to load the model."""
        self.preparation.start()
        self._thread.start()

    def drain(self) -> None:
        """Refuse new jobs from now on; running ones go on."""
        self.draining = True
        self.preparation.stop()

    def stop(self, timeout: float = 10.0) -> None:
        """End the engine after its present round; running requests get an error. A model that still
        loads is not waited for: its daemon thread ends with the process."""
        self.draining = True
        if self.engine is not None:
            self.engine.shutdown(timeout)

    @property
    def llm(self) -> LLM | None:
        """The engine's model, once it is loaded."""
        return None if self.engine is None else self.engine.llm

    @property
    def inbox(self) -> Inbox | None:
        """The engine thread's inbox, once the model is loaded."""
        return None if self.llm is None else self.llm.engine_thread.inbox

    @property
    def error(self) -> BaseException | None:
        """The error that ended the engine or its loading."""
        return self.inbox.error if self.inbox else self._load_error

    def check_alive(self) -> None:
        """Raise ApiError (503) if the engine neither loads nor runs."""
        runs = self.inbox is not None or self._thread.is_alive()
        if self.error is not None or not runs:
            message = "the engine has stopped; the server's log says why"
            raise ApiError(503, message, "engine_stopped")

    def ready(self) -> LLM:
        """Return the loaded model. Raises ApiError (503) while there is none."""
        if self._stopping:
            raise shutting_down()
        self.check_alive()
        if self.llm is None:
            raise ApiError(503, "the model is still loading", "not_ready")
        return self.llm

    @property
    def active(self) -> int:
        """Answers that wait or run."""
        return self.clients.total()

    @property
    def capacity(self) -> int:
        """Answers that may wait or run."""
        slots = 0 if self.llm is None else self.llm.engine.config.max_num_seqs
        return slots + self.settings.max_queue

    def share(self, newcomer: str | None = None) -> int:
        """Return the answers that each client may have here, even if others fill the queue."""
        return self.capacity // max(1, len({*self.clients, newcomer} - {None}))

    def check_room(self, answers: int, client: str) -> LLM:
        """Return the loaded model, if so many more answers may come in.

        Raises ApiError: 429 if the queue is full.
        """
        llm = self.ready()
        if answers > self.capacity:
            message = f"{answers} answers in one request: at most {self.capacity} fit in here"
            raise ApiError(400, message, "invalid_value")
        mine = self.clients[client] + answers
        if self.active + answers > self.capacity and mine > self.share(client):
            message = (
                f"the queue is full ({self.active} answers are waiting or running): try again later"
            )
            raise ApiError(429, message, "queue_full", retry_after=self._retry_after())
        return llm

    def gauges(self) -> list[tuple[str, str, float]]:
        """Return how clients share the server, for `Metrics`: name, help text, value."""
        capacity = "Answers that may wait or run before more get a 429."
        share = "Answers of one client that may wait or run even then."
        return [
            ("num_clients", "Clients, by key or address, with answers here.", len(self.clients)),
            ("max_num_requests", capacity, self.capacity),
            ("max_num_requests_per_client", share, self.share()),
        ]

    def submit(self, job: AsyncJob, ended: Callable[[], None] = lambda: None) -> None:
        """Queue a job; `ended` is called at its end. Raises ApiError as `check_room` does."""
        self.check_room(job.size, job.client)
        assert self.engine is not None
        job.timeout = self.settings.queue_timeout
        job.on_delivery = self._count
        try:
            self.engine.submit(job)
        except EngineStoppedError as error:
            raise self._api_error(job, error) from error
        self.clients[job.client] += job.size
        self._unended[job] = job.size, ended

    async def chunk(self, job: AsyncJob) -> Chunk:
        """Wait for a job's next chunk. Raises ApiError if the job has failed or was cancelled."""
        try:
            chunk = await job.next()
        except Exception as error:
            raise self._api_error(job, error) from error
        if chunk is None:
            raise gone()
        return chunk

    def cancel(self, job: AsyncJob) -> None:
        """End a job before the next round, if it has not ended, and free its slots."""
        if self.engine is not None:
            self.engine.cancel(job)

    @property
    def _stopping(self) -> bool:
        return self.draining or (self.inbox is not None and self.inbox.stopping)

    def _retry_after(self) -> int:
        """Return seconds after which a place may be free."""
        return min(30, max(1, math.ceil(self._seconds)))

    def _count(self, delivery: Delivery) -> None:
        if delivery.ended:
            self.clients[delivery.job.client] -= delivery.ended
            self.clients += Counter()  # drop zero counts
            seconds = time.monotonic() - delivery.job.submitted
            self._seconds += 0.1 * (seconds - self._seconds)
            left, ended = self._unended.pop(delivery.job)
            if left > delivery.ended:
                self._unended[delivery.job] = left - delivery.ended, ended
            else:
                ended()

    def _api_error(self, job: AsyncJob, error: BaseException) -> ApiError:
        """Return the error for a job's client."""
        if isinstance(error, QueueTimeoutError):
            return ApiError(503, str(error), "queue_timeout", retry_after=self._retry_after())
        # An exception's text may quote any request of the round: it is for the log only.
        if isinstance(error, EngineStoppedError):
            message = "the engine has died; the server's log says why"
            return shutting_down() if self._stopping else ApiError(500, message, "engine_died")
        if isinstance(error, ConfigError | CapacityError):  # any other error is not the request's
            return of_smart_error(error)
        log.error("request failed", exc_info=error, extra={"request_id": job.request_id})
        message = f"the model failed on this request: {type(error).__name__}"
        return ApiError(500, f"{message}; the server's log says why", "request_failed")

    # --- from here on, other threads ---

    def _main(self) -> None:
        try:
            self.engine = AsyncLLM(self._loaded())
        except BaseException as error:
            self._load_error = error
            if not isinstance(error, SmartError | OSError):
                log.error(f"the model could not be loaded: {error}", exc_info=error)
            self.failed()

    def _loaded(self) -> LLM:
        llm = self._load()
        self.preparation.know(llm)
        if isinstance(llm.prompts, PromptBuilder):
            llm.prompts.bound_turned()
        llm.grammars.prepare()
        warm_up(llm.engine)
        for watcher in self._observers:
            watcher.start(llm)
        llm.engine_thread.observers.extend(self._observers)
        llm.engine_thread.start()
        model = str(llm.provenance.get("model", ""))
        log.info("ready", extra={"model": model, "speculation": llm.speculation.description})
        return llm
