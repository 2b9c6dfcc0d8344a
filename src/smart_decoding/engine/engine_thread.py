"""The engine thread: takes jobs in, runs rounds, gives chunks out."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Generator
from queue import SimpleQueue
from typing import TYPE_CHECKING, Protocol

from smart_decoding.engine.inbox import Inbox
from smart_decoding.engine.jobs import (
    Chunk,
    Delivery,
    Job,
    QueueTimeoutError,
)
from smart_decoding.engine.observers import Observers
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.errors import ConfigError, EngineStoppedError

if TYPE_CHECKING:
    from smart_decoding.engine.engine import Engine
    from smart_decoding.engine.request import Request

log = logging.getLogger("smart.engine")
LONGEST_ROUND = 10.0  # seconds that stop() waits for the present round
ROUNDS_OVER_WORK = 2.0  # seconds of rounds per second of urgent work, where several requests run
IDLE_AFTER = 0.05  # seconds without work in the process before idle work begins
GIVE_UP = 3  # failures in a row without a surviving request: the engine itself may be broken

# Threads of this process that have requests, or do idle work. Idle work that measures needs all
# cores for itself.
_AT_WORK: set[EngineLoop] = set()


class IdleWork(Protocol):
    """Work that an engine thread does in steps, while all engines of this process are idle.

    urgent: whether it goes on while other engines run, and between the rounds of several requests.
    Between two steps rounds then take ROUNDS_OVER_WORK times as long as a step. A lone request is
    not held up."""

    @property
    def urgent(self) -> bool:
        """See above."""
        ...

    def step(self) -> bool:
        """Do one step, for which requests may have to wait; return whether more is left."""


class EngineThread:
    """The one thread that runs the rounds of an engine and of all engines that share its weights.

    It starts with the first job, and ends with this object. observers: are called for all rounds.
    All methods may be called from any thread. In a process forked after the start, jobs raise
    EngineStoppedError: a fork has no such thread.
    """

    def __init__(self) -> None:
        self.inbox = Inbox()
        self.observers = Observers()
        self._idle_work: list[IdleWork] = []
        self._thread: threading.Thread | None = None
        self._process = 0  # id of the process in which the thread runs
        self._starting = threading.Lock()

    def start(self) -> None:
        """Start the thread now, not with the first job."""
        self._require_process()
        with self._starting:
            if self._thread is None:
                self._start()

    def work_before(self, work: Callable[[], object]) -> bool:
        """Do some work before the thread starts; a start waits for its end. Return False, and do
        nothing, if the thread runs already."""
        self._require_process()
        with self._starting:
            if self._thread is not None:
                return False
            work()
            return True

    def add_idle_work(self, work: IdleWork) -> None:
        """Add work for the thread's idle times; see `IdleWork`."""
        self._idle_work.append(work)
        self.inbox.wake()

    def still_does(self, work: IdleWork) -> bool:
        """Return whether this work has steps left; none after one that raised."""
        return work in self._idle_work

    def require_another(self) -> None:
        """Raise ConfigError in the engine thread, which cannot wait for itself."""
        if threading.current_thread() is self._thread:
            raise ConfigError("on_step cannot ask the model: it would wait for itself")

    def _require_process(self) -> None:
        """Raise EngineStoppedError in a forked process: a lock that another thread held during the
        fork is never released there."""
        if self._thread is not None and os.getpid() != self._process:
            raise EngineStoppedError(
                "this process was forked from the one that loaded the model: load it in the child"
            )

    def submit(self, job: Job) -> None:
        """Queue a job. Raises EngineStoppedError."""
        self._require_process()
        job.submitted = time.monotonic()
        job.left = job.size
        self.inbox.add(job)
        self.start()  # with the job there: it is not idle

    def cancel(self, job: Job) -> bool:
        """End a job before the next round and free its slots. Return whether a thread runs; it then
        delivers None."""
        runs_here = self._thread is not None and os.getpid() == self._process
        return runs_here and self.inbox.abort(job)

    def results(self, job: Job) -> Generator[Chunk, None, None]:
        """Run a job: yield its chunks, round by round. Closing the generator ends the job.

        Raises the errors of its asks or of its `on_round`, EngineStoppedError, and ConfigError in
        the engine thread itself."""
        self.require_another()
        box: SimpleQueue[list[Delivery]] = SimpleQueue()
        job.deliver = box.put
        left = job.size
        try:
            if left:
                self.submit(job)
            while left:
                for delivery in box.get():
                    left -= delivery.ended
                    if isinstance(delivery.content, BaseException):
                        left = 0
                        raise delivery.content
                    if delivery.content is not None:
                        yield delivery.content
        finally:
            # A generator may be collected in any thread. The engine's cannot wait for itself.
            if left and self.cancel(job) and threading.current_thread() is not self._thread:
                while all(delivery.content is not None for delivery in box.get()):
                    pass

    def stop(self, timeout: float = LONGEST_ROUND) -> None:
        """End the thread after its present round; unfinished jobs get EngineStoppedError."""
        self.inbox.stop()
        if self._thread is not None:
            _join(self._thread, timeout)

    def _start(self) -> None:
        args = (self.inbox, self.observers, self._idle_work)
        thread = threading.Thread(target=_main, args=args, name="smart-engine", daemon=True)
        self._process = os.getpid()
        self._thread = thread  # before it runs: its first round may call require_another()
        try:
            thread.start()
        except BaseException:
            self._thread = None
            raise
        weakref.finalize(self, _end, self.inbox, thread)


def _end(inbox: Inbox, thread: threading.Thread) -> None:
    """Stop the thread: the process must not end while one is in the kernels."""
    inbox.stop()
    _join(thread, LONGEST_ROUND)


def _join(thread: threading.Thread, timeout: float) -> None:
    if thread is not threading.current_thread():
        thread.join(timeout)


def _main(inbox: Inbox, observers: Observers, idle_work: list[IdleWork]) -> None:
    reason = "the engine has been shut down"
    rounds = EngineLoop(inbox, observers, idle_work)
    try:
        rounds.run()
    except BaseException as error:
        log.critical("the engine has died", exc_info=error)
        reason = f"the engine has died: {type(error).__name__}: {error}"
        inbox.error = error
    rounds.end_all(reason)
    idle_work.clear()
    for command, job in inbox.close(reason):
        end = EngineStoppedError(reason) if command == "add" else None
        job.deliver([Delivery(job, end, job.left)])
        job.left = 0


class EngineLoop:
    """Owns the engines and the jobs in them; nothing here is called from another thread.

    Engines that share weights and KV memory take turns. A job waits until no other engine has
    requests, and later jobs wait behind it. An idle thread holds no engine.
    """

    def __init__(self, inbox: Inbox, observers: Observers, idle_work: list[IdleWork]) -> None:
        self.owners: dict[Request, Job] = {}
        self._engine: Engine | None = None
        self._inbox = inbox
        self._observers = observers
        self._idle_work = idle_work
        self._queue: deque[Job] = deque()  # jobs that are not in an engine yet
        self._waiting: list[Job] = []  # jobs in the engine without a begun answer
        self._shown: list[Job] = []  # jobs in the engine with an `on_round`
        self._outbox: list[Delivery] = []
        self._isolation = Isolation(self)
        self._ran = False  # whether a round has run just now
        self._rounds_due = 0.0  # seconds of rounds before the next step of idle work

    @property
    def engine(self) -> Engine:
        """The engine that has requests."""
        assert self._engine is not None
        return self._engine

    @property
    def _busy(self) -> bool:
        return self._engine is not None and self._engine.has_unfinished_requests

    def run(self) -> None:
        """Run rounds until the inbox says stop. Raises the error that broke the engine itself."""
        while not self._inbox.stopping:
            self._carry_out_commands()
            self._drop_overdue()
            self._ran = self._busy
            if self._busy:
                _AT_WORK.add(self)
                self._run_round()
            if not self._busy:
                _AT_WORK.discard(self)
            self._flush()
            if self._idle_work and self._has_time():
                self._work_idly()

    def end_all(self, reason: str) -> None:
        """End every job that is left with EngineStoppedError."""
        _AT_WORK.discard(self)
        for job in dict.fromkeys((*self.owners.values(), *self._queue)):
            self._outbox.append(Delivery(job, EngineStoppedError(reason), job.left))
            job.left = 0
        self._flush()

    def _run_round(self) -> None:
        began = time.perf_counter()
        try:
            if self.step(self._inbox.arrived):
                self._isolation.failures = 0
        except Exception as error:
            self._isolation.after_failed_round(error)
        self._rounds_due -= time.perf_counter() - began

    def step(self, arrived: Callable[[], Collection[str]] = tuple) -> bool:
        """Run one round; return whether any request got tokens. arrived: as for `Engine.step`."""
        self._observers.notify(lambda observer: observer.before(self.engine))
        touched = self.engine.step(arrived)
        began = time.perf_counter()
        self._observers.notify(lambda observer: observer.after(self.engine, touched))
        self._show(touched)
        for request in touched:
            self.emit(request)
        self.engine.charge(time.perf_counter() - began)
        return bool(touched)

    def emit(self, request: Request) -> None:
        """Deliver a request's new tokens; end the request if that raises."""
        try:
            self._emit(request)
            if request.error is not None and request in self.owners:
                raise request.error
        except Exception as error:  # its own: the others go on
            self.fail(request, error)

    def fail(self, request: Request, error: Exception) -> None:
        """End the job of a request that raised; its caller gets the error."""
        self.engine.abort(request.id)
        job = self.owners.get(request)
        if job is not None:
            self._end(job, error)

    def _has_time(self) -> bool:
        """Return whether a step of idle work may be done now."""
        if self._busy:
            due = self._idle_work[0].urgent and self._rounds_due <= 0
            return due and len(self.engine.scheduler.running) > 1
        return not self._patience() and not self._inbox.arrived()

    def _work_idly(self) -> None:
        began = time.perf_counter()
        work = self._idle_work[0]
        _AT_WORK.add(self)
        try:
            going_on = work.step()
        except Exception as error:
            log.error("%s has failed and is given up", type(work).__name__, exc_info=error)
            going_on = False
        if not self._busy:
            _AT_WORK.discard(self)
        if not going_on:
            self._idle_work.remove(work)
        self._rounds_due = ROUNDS_OVER_WORK * (time.perf_counter() - began)

    def _carry_out_commands(self) -> None:
        idle = not self._busy and not self._queue
        if idle:
            self._engine = None
            self._shown = []
        for command, job in self._inbox.commands(self._patience() if idle else 0.0):
            if command == "add":
                self._queue.append(job)
            else:
                self._end(job)
        while self._queue and (self._queue[0].engine is self._engine or not self._busy):
            self._add(self._queue.popleft())

    def _patience(self) -> float:
        """Return seconds that an idle thread waits for commands before idle work. A client with a
        fresh answer often sends the next request at once."""
        if not self._idle_work:
            return math.inf
        others = bool(_AT_WORK) and not self._idle_work[0].urgent
        return IDLE_AFTER if self._ran or others else 0.0

    def _add(self, job: Job) -> None:
        self._engine = job.engine
        try:
            for place, ask in enumerate(job.asks):
                name = f"{job.id}-{place}"
                arguments = (ask.tokens, ask.params, ask.media, job.client, job.cache_salt)
                for request in job.engine.add_request(name, *arguments):
                    request.viewer = job.viewer
                    job.answers[request] = len(job.answers)
                    job.sent[request] = 0
                    self.owners[request] = job
        except Exception as error:
            self._end(job, error)
        else:
            self._waiting.append(job)
            if job.on_round is not None:
                self._shown.append(job)

    def _end(self, job: Job, error: BaseException | None = None) -> None:
        """Take a job out and free its slots; `error` goes to its caller."""
        for request in job.answers:
            if self.owners.pop(request, None) is not None:
                self.engine.abort(request.id)
                self._report_end(request, "error" if error else "abort")
        for line in (self._queue, self._waiting):
            if job in line:
                line.remove(job)
        self._outbox.append(Delivery(job, error, job.left))
        job.left = 0

    def _drop_overdue(self) -> None:
        now = time.monotonic()
        still = [job for job in self._waiting if not any(r.admitted for r in job.answers)]
        self._waiting = [job for job in still if not all(r.finished for r in job.answers)]
        for job in [job for job in self._waiting if now - job.submitted > job.timeout]:
            message = f"no free slot within {job.timeout:g} s: try again later"
            self._end(job, QueueTimeoutError(message))

    def _show(self, touched: list[Request]) -> None:
        """Call the jobs' `on_round`; one that raises ends its own job."""
        self._shown = [job for job in self._shown if job.left]
        for job in self._shown:
            assert job.on_round is not None
            try:
                job.on_round([request for request in touched if request in job.answers])
            except BaseException as error:
                self._end(job, error)
        if self._shown:
            for request in [request for request in self.owners if request.aborted]:  # just now
                self.emit(request)

    def _emit(self, request: Request) -> None:
        """Put a request's new tokens into the outbox: after each round for a job that streams, else
        at the request's end."""
        job = self.owners.get(request)
        ended = request.finished and request.error is None
        if job is None or not (job.stream or ended):
            return
        stop = request.stop
        start = job.sent[request]
        tokens = list(request.output[start:])
        logprobs = None
        if request.logprobs is not None:
            logprobs = request.logprobs[start : len(request.output)]
        job.sent[request] = start + len(tokens)
        reason = "abort" if request.aborted else stop.finish_reason
        chunk = Chunk(job.answers[request], stop.new_text(), tokens, logprobs, reason)
        if ended:
            chunk.metrics = request.metrics
            del self.owners[request]
            job.left -= 1
            self._report_end(request, reason or "abort")
        self._outbox.append(Delivery(job, chunk, int(ended)))

    def _report_end(self, request: Request, reason: str) -> None:
        self._observers.notify(lambda observer: observer.ended(request, reason))

    def _flush(self) -> None:
        """Deliver the outbox, with one call for each receiver."""
        outbox = self._outbox
        self._outbox = []
        for deliver in dict.fromkeys(delivery.job.deliver for delivery in outbox):
            deliver([delivery for delivery in outbox if delivery.job.deliver == deliver])


class Isolation:
    """Runs the requests of a failed round one by one. A request that raises again ends, the others
    go on.

    Tokens do not depend on the batch, so the survivors' answers are the same as without the
    failure. failures: failed rounds in a row without a survivor.
    """

    def __init__(self, rounds: EngineLoop) -> None:
        self.failures = 0
        self._rounds = rounds

    def after_failed_round(self, error: Exception) -> None:
        """Raise `error` if the engine itself is to blame."""
        log.info("a round has failed; trying its requests one by one", exc_info=error)
        engine = self._rounds.engine
        queue = engine.scheduler.waiting
        suspects = engine.suspend() or list(queue)  # the round may have failed before admission
        others = [request for request in queue if request not in suspects]
        survivors = []
        for suspect in suspects:
            queue.clear()
            if suspect.finished:  # in the failed round, or with another answer of its job
                self._rounds.emit(suspect)
                continue
            queue.append(suspect)
            if self._survives(suspect):
                survivors.append(suspect)
            engine.suspend()
        for request in [request for request in self._rounds.owners if request.finished]:
            self._rounds.emit(request)
        queue.clear()
        self.failures = 0 if survivors else self.failures + 1
        if self.failures >= GIVE_UP:
            self._check_engine(error)
        for request in (*survivors, *others):
            if not request.finished:
                queue.append(request)

    def _survives(self, request: Request) -> bool:
        """Run one request through a prompt's round and a decoding one; return whether none
        raised."""
        try:
            if len(request.tokens) != len(request.prompt) + len(request.output):
                raise RuntimeError("it failed while its new tokens were taken in")
            rounds = request.metrics.rounds
            progress = -1
            while (
                not request.finished
                and request.metrics.rounds == rounds
                and request.table.length > progress
            ):
                progress = request.table.length if request.ready() else -1
                self._rounds.step()
        except Exception as error:
            self._rounds.fail(request, error)
            return False
        return True

    def _check_engine(self, error: Exception) -> None:
        """Raise `error` unless a short warm-up works: then the failures were the requests' own."""
        try:
            warm_up(self._rounds.engine)
        except Exception:
            raise error from None
        self.failures = 0


def warm_up(engine: Engine) -> None:
    """Run one short answer in this thread, so that the first client does not pay for compilation
    and first touches of memory.

    Raises ConfigError if the context has no room for it.
    """
    room = engine.config.max_model_len
    if room < 3:
        raise ConfigError(
            f"max_model_len={room} is not allowed for a server: it must be at least 3"
        )
    params = SamplingParams(temperature=0, max_tokens=2)
    (request,) = engine.add_request("warm-up", [0] * min(8, room - 2), params)
    try:
        while not request.finished:
            engine.step()
    finally:
        engine.abort(request.id)  # without effect on a finished one
