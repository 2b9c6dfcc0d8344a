"""Commands to the engine thread: the only mutable state that it shares with its callers."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterator
from queue import Empty, SimpleQueue
from typing import Literal, TypeAlias

from smart_decoding.engine.jobs import Job
from smart_decoding.errors import EngineStoppedError

Command: TypeAlias = tuple[Literal["add", "abort"], Job]


class Inbox:
    """A queue of commands; `stopping` ends the engine thread after its present round.

    ended: why no command is taken any more, None while they are; error: what broke the engine."""

    def __init__(self) -> None:
        self.stopping = False
        self.error: BaseException | None = None
        self.ended: str | None = None
        self._queue: SimpleQueue[Command | None] = SimpleQueue()  # None only wakes the thread
        self._read: deque[Command | None] = deque()  # out of the queue, but not carried out yet
        self._lock = threading.RLock()  # a generator that is collected aborts, wherever that is

    def add(self, job: Job) -> None:
        """The job is to be taken in. Raises EngineStoppedError if the thread has ended."""
        with self._lock:
            if self.ended is not None:
                raise EngineStoppedError(self.ended)
            self._queue.put(("add", job))

    def abort(self, job: Job) -> bool:
        """The job is to end, whether it has begun or not; a delivery of None then says that it has.
        False if the thread has ended, and the job with it."""
        with self._lock:
            if self.ended is None:
                self._queue.put(("abort", job))
            return self.ended is None

    def stop(self) -> None:
        """The thread is to end."""
        self.stopping = True
        self.wake()

    def wake(self) -> None:
        """The thread is to look around."""
        self._queue.put(None)

    def close(self, reason: str) -> list[Command]:
        """No more commands from now on. Returns those that came too late."""
        with self._lock:
            self.ended = reason
        return list(self.commands())

    def commands(self, wait: float = 0.0) -> Iterator[Command]:
        """Return all that has come in. wait: seconds until something does, at most."""
        while wait or self._read or not self._queue.empty():
            command = self._read.popleft() if self._read else self._next(wait)
            wait = 0.0
            if command is not None:
                yield command

    def _next(self, wait: float) -> Command | None:
        try:
            return self._queue.get(timeout=None if wait == math.inf else wait)
        except Empty:
            return None

    def arrived(self) -> set[str]:
        """Clients of jobs that wait to be taken in and have not left again."""
        while not self._queue.empty():
            self._read.append(self._queue.get())
        commands = [command for command in self._read if command is not None]
        left = [job for name, job in commands if name == "abort"]
        return {job.client for name, job in commands if name == "add" and job not in left}
