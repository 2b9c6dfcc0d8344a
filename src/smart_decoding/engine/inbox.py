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

    ended: why commands are refused, or None; error: the error that broke the engine."""

    def __init__(self) -> None:
        self.stopping = False
        self.error: BaseException | None = None
        self.ended: str | None = None
        self._queue: SimpleQueue[Command | None] = SimpleQueue()  # None only wakes the thread
        self._read: deque[Command | None] = deque()  # out of the queue, but not carried out yet
        # Reentrant: a generator may be collected, which aborts its job, while this thread holds it.
        self._lock = threading.RLock()

    def add(self, job: Job) -> None:
        """Queue a new job. Raises EngineStoppedError if the thread has ended."""
        with self._lock:
            if self.ended is not None:
                raise EngineStoppedError(self.ended)
            self._queue.put(("add", job))

    def abort(self, job: Job) -> bool:
        """Queue the end of a job, begun or not; a delivery of None confirms it. Return False if the
        thread has ended, and the job with it."""
        with self._lock:
            if self.ended is None:
                self._queue.put(("abort", job))
            return self.ended is None

    def stop(self) -> None:
        """Make the thread end after its present round."""
        self.stopping = True
        self.wake()

    def wake(self) -> None:
        """Wake the thread without a command."""
        self._queue.put(None)

    def close(self, reason: str) -> list[Command]:
        """Refuse commands from now on; return the ones that came too late."""
        with self._lock:
            self.ended = reason
        return list(self.commands())

    def commands(self, wait: float = 0.0) -> Iterator[Command]:
        """Yield all queued commands. wait: seconds to wait for the first one, at most."""
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
        """Return the clients of new jobs that were not aborted meanwhile."""
        while not self._queue.empty():
            self._read.append(self._queue.get())
        commands = [command for command in self._read if command is not None]
        left = [job for name, job in commands if name == "abort"]
        return {job.client for name, job in commands if name == "add" and job not in left}
