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
LONGEST_ROUND = 10.0  # seconds that an end waits for the present round
ROUNDS_OVER_WORK = 2.0  # seconds of rounds for each of urgent work, where several requests run
IDLE_AFTER = 0.05  # seconds without work in the process before idle work begins
GIVE_UP = 3  # failures in a row that no request survived: then the engine itself is broken

# Threads of this process that have requests, or do idle work: two at once would share the cores,
# and what one measures would be what the other leaves of them.
_AT_WORK: set[Rounds] = set()


class IdleWork(Protocol):
    """What an engine thread does bit by bit, while no engine of this process has anything else to
    do.

    urgent: whether to go on beside other engines, and beside several requests: a bit follows rounds
    that have taken ROUNDS_OVER_WORK times as long as the last one. A lone request is not held
    up."""

    @property
    def urgent(self) -> bool:
        """See above."""
        ...

    def step(self) -> bool:
        """Do a bit, which requests may have to wait for; false if nothing is left."""


class EngineThread:
    """The one thread in which the rounds of an engine run, and of those that share its weights.

    It starts with the first job, and ends with this object. observers: are told of all rounds.
    All methods may be called from any thread. A child that is forked once it runs has no such
    thread: jobs raise EngineStoppedError.
    """

    def __init__(self) -> None:
        self.inbox = Inbox()
        self.observers = Observers()
        self._idle_work: list[IdleWork] = []
        self._thread: threading.Thread | None = None
        self._process = 0  # in which it runs
        self._starting = threading.Lock()

    def start(self) -> None:
        """Do not wait for the first job."""
        self._require_process()
        with self._starting:
            if self._thread is None:
                self._start()

    def work_before(self, work: Callable[[], object]) -> bool:
        """Do some work as long as there is no thread, which then wait to start; whether there was
        none."""
        self._require_process()
        with self._starting:
            if self._thread is not None:
                return False
            work()
            return True

    def add_idle_work(self, work: IdleWork) -> None:
        """To be done once the thread has started; see `IdleWork`."""
        self._idle_work.append(work)
        self.inbox.wake()

    def still_does(self, work: IdleWork) -> bool:
        """Return whether this work is still to be done; it is not if it raised."""
        return work in self._idle_work

    def require_another(self) -> None:
        """Raise ConfigError in the engine thread itself, which cannot wait for what it does."""
        if threading.current_thread() is self._thread:
            raise ConfigError("on_step cannot ask the model: it would wait for itself")

    def _require_process(self) -> None:
        """Raise EngineStoppedError in a forked child. Locks that were held by another thread while
        it was forked are held for ever there."""
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
        """Ends a job before the next round, if it has not ended, and frees its slots. Then None is
        delivered; false if it is not, as no thread runs."""
        runs_here = self._thread is not None and os.getpid() == self._process
        return runs_here and self.inbox.abort(job)

    def results(self, job: Job) -> Generator[Chunk, None, None]:
        """Runs a job: its chunks as rounds yield them. The job is over when this is.

        Raises what its asks or its `on_round` raised, EngineStoppedError, and ConfigError in the
        engine thread itself."""
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
            # A generator may be collected in any thread, the engine's too: it waits for nobody.
            if left and self.cancel(job) and threading.current_thread() is not self._thread:
                while all(delivery.content is not None for delivery in box.get()):
                    pass

    def stop(self, timeout: float = LONGEST_ROUND) -> None:
        """End the thread after its present round; what still runs gets EngineStoppedError."""
        self.inbox.stop()
        if self._thread is not None:
            _join(self._thread, timeout)

    def _start(self) -> None:
        given = (self.inbox, self.observers, self._idle_work)
        thread = threading.Thread(target=_main, args=given, name="smart-engine", daemon=True)
        self._process = os.getpid()
        self._thread = thread  # before it runs: its first round may ask whose it is
        try:
            thread.start()
        except BaseException:
            self._thread = None
            raise
        weakref.finalize(self, _end, self.inbox, thread)


def _end(inbox: Inbox, thread: threading.Thread) -> None:
    """No thread is in the kernels when the process ends."""
    inbox.stop()
    _join(thread, LONGEST_ROUND)


def _join(thread: threading.Thread, timeout: float) -> None:
    if thread is not threading.current_thread():
        thread.join(timeout)


def _main(inbox: Inbox, observers: Observers, idle_work: list[IdleWork]) -> None:
    reason = "the engine has been shut down"
    rounds = Rounds(inbox, observers, idle_work)
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


class Rounds:
    """Owns the engines and the jobs in them; nothing here is called from another thread.

    Engines that share weights and KV memory take turns: a job waits until no other engine has
    requests, and those that come later wait behind it. An idle thread holds no engine.
    """

    def __init__(self, inbox: Inbox, observers: Observers, idle_work: list[IdleWork]) -> None:
        self.owners: dict[Request, Job] = {}
        self._engine: Engine | None = None
        self._inbox = inbox
        self._observers = observers
        self._idle_work = idle_work
        self._queue: deque[Job] = deque()  # jobs that are not in an engine yet
        self._waiting: list[Job] = []  # jobs in the engine of which no answer had begun
        self._shown: list[Job] = []  # jobs in the engine that are called after each round
        self._outbox: list[Delivery] = []
        self._isolation = Isolation(self)
        self._ran = False  # a round, just now
        self._owed = 0.0  # seconds of rounds before the next bit of idle work

    @property
    def engine(self) -> Engine:
        """The one that has requests."""
        assert self._engine is not None
        return self._engine

    @property
    def _busy(self) -> bool:
        return self._engine is not None and self._engine.has_unfinished_requests

    def run(self) -> None:
        """Rounds until the inbox says stop. Raises what breaks the engine itself."""
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
        """Tell every job that is still here why it ends."""
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
        self._owed -= time.perf_counter() - began

    def step(self, arrived: Callable[[], Collection[str]] = tuple) -> bool:
        """Return one round; whether any request has gained by it. arrived: clients that wait for
        its end."""
        self._observers.tell(lambda observer: observer.before(self.engine))
        touched = self.engine.step(arrived)
        self._observers.tell(lambda observer: observer.after(self.engine, touched))
        self._show(touched)
        for request in touched:
            self.emit(request)
        return bool(touched)

    def emit(self, request: Request) -> None:
        """Put out what a request has gained; ends it if that raises."""
        try:
            self._emit(request)
            if request.error is not None and request in self.owners:
                raise request.error
        except Exception as error:  # its own: the others have nothing to do with it
            self.fail(request, error)

    def fail(self, request: Request, error: Exception) -> None:
        """End the job of a request that raised, and tell its caller."""
        self.engine.abort(request.id)
        job = self.owners.get(request)
        if job is not None:
            self._end(job, error)

    def _has_time(self) -> bool:
        """Return whether some idle work may be done now."""
        if self._busy:
            due = self._idle_work[0].urgent and self._owed <= 0
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
        self._owed = ROUNDS_OVER_WORK * (time.perf_counter() - began)

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
        """Return seconds that an idle thread waits for commands. Who has just got an answer often
        asks again, or asks another engine."""
        if not self._idle_work:
            return math.inf
        others = bool(_AT_WORK) and not self._idle_work[0].urgent
        return IDLE_AFTER if self._ran or others else 0.0

    def _add(self, job: Job) -> None:
        self._engine = job.engine
        try:
            for place, ask in enumerate(job.asks):
                name = f"{job.id}-{place}"
                asked = (ask.tokens, ask.params, ask.media, job.client, job.cache_salt)
                for request in job.engine.add_request(name, *asked):
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
        """Take a job out, its slots with it; `error` goes to its caller."""
        for request in job.answers:
            if self.owners.pop(request, None) is not None:
                self.engine.abort(request.id)
                self._tell_ended(request, "error" if error else "abort")
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
        """For a job that does not stream, only at its end. Before an error comes its text."""
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
            self._tell_ended(request, reason or "abort")
        self._outbox.append(Delivery(job, chunk, int(ended)))

    def _tell_ended(self, request: Request, reason: str) -> None:
        self._observers.tell(lambda observer: observer.ended(request, reason))

    def _flush(self) -> None:
        """One call for all that goes the same way."""
        outbox = self._outbox
        self._outbox = []
        for deliver in dict.fromkeys(delivery.job.deliver for delivery in outbox):
            deliver([delivery for delivery in outbox if delivery.job.deliver == deliver])


class Isolation:
    """Runs the requests of a failed round alone. Those that raise again end, the others go on.

    Tokens do not depend on the batch, so the survivors' answers are the same as without the
    failure. failures: in a row, that no request survived.
    """

    def __init__(self, rounds: Rounds) -> None:
        self.failures = 0
        self._rounds = rounds

    def after_failed_round(self, error: Exception) -> None:
        """Raise `error` if the engine itself is to blame."""
        log.info("a round has failed; trying its requests one by one", exc_info=error)
        engine = self._rounds.engine
        queue = engine.scheduler.waiting
        suspects = engine.suspend() or list(queue)  # it may have failed before it took one
        others = [request for request in queue if request not in suspects]
        survivors = []
        for suspect in suspects:
            queue.clear()
            if suspect.finished:  # in the very round that failed, or with another answer of its job
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
        """Runs it alone, through a round of each kind: its prompt's, and a decoding one."""
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
        """After failures in a row, which may have been the requests' own: tries what must work."""
        try:
            warm_up(self._rounds.engine)
        except Exception:
            raise error from None
        self.failures = 0


def warm_up(engine: Engine) -> None:
    """One short answer, in this thread: the first client does not pay for compilation and first
    touches of memory.

    Raises ConfigError if not even that fits in.
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
        engine.abort(request.id)  # of no effect if it is over
