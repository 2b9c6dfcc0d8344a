"""Work on texts, one piece after another. The client that has sent least is next."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TypeVar

from smart_decoding.engine.fairness import ClientQueues, VirtualTokenCounter

T = TypeVar("T")


@dataclass(eq=False, slots=True)
class _Place:
    client: str
    size: int
    called: asyncio.Event = field(default_factory=asyncio.Event)


class Lanes:
    """Two lanes, so that short pieces do not wait for long ones. short: the size up to which a
    piece is short; threads: in which they are done, the event loop's by default."""

    def __init__(self, short: int, threads: Executor | None = None) -> None:
        self._size = short
        self._short = Lane(threads)
        self._long = Lane(threads)

    async def run(self, client: str, size: int, work: Callable[[], T]) -> T:
        """Do a piece of that size in its lane: see `Lane.run`."""
        lane = self._short if size <= self._size else self._long
        return await lane.run(client, size, work)


class Lane:
    """One thread's worth of work at a time, so that rounds keep their processors."""

    def __init__(self, threads: Executor | None = None) -> None:
        self._threads = threads
        self._counter = VirtualTokenCounter()
        self._waiting: ClientQueues[_Place] = ClientQueues()
        self._busy: _Place | None = None

    async def run(self, client: str, size: int, work: Callable[[], T]) -> T:
        """Do `work` in another thread when the client is selected; return what it returns.

        size: bytes or characters, which the client is charged."""
        loop = asyncio.get_running_loop()
        return await self.take(client, size, lambda: loop.run_in_executor(self._threads, work))

    async def take(self, client: str, size: int, begin: Callable[[], Awaitable[T]]) -> T:
        """Call `begin` when the client is selected; return what comes of it."""
        place = _Place(client, size)
        self._counter.arrive(client, self._waiting.clients)
        self._waiting.append(place)
        self._call_next()
        try:
            await place.called.wait()
        except asyncio.CancelledError:
            if self._busy is place:
                self._end()
            else:
                self._waiting.remove(place)
            raise
        working = asyncio.ensure_future(begin())
        working.add_done_callback(self._done)
        try:
            return await asyncio.shield(working)  # it cannot be stopped: it keeps its place
        finally:
            del working  # else an error would hold itself, and all that was read

    def _done(self, work: asyncio.Future[T]) -> None:
        if not work.cancelled():
            work.exception()  # or it is logged where nobody waits for it any more
        self._end()

    def _end(self) -> None:
        self._busy = None
        self._call_next()

    def _call_next(self) -> None:
        if self._busy is None and self._waiting:
            client = self._counter.select(self._waiting.clients)
            self._busy = self._waiting.popleft(client)
            self._counter.charge(client, 1 + self._busy.size)
            self._busy.called.set()
