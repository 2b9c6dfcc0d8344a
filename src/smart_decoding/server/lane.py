"""Lines of work: one piece after another, of the client that was served least."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from smart_decoding.engine.fairness import ClientQueues, VirtualTokenCounter
from smart_decoding.server.errors import gone

if TYPE_CHECKING:
    from fastapi import Request

T = TypeVar("T")
SHORT = 16_384  # bytes of a body whose texts are not worth a wait for long ones


@dataclass(eq=False, slots=True)
class _Place:
    client: str
    size: int
    called: asyncio.Event = field(default_factory=asyncio.Event)


class Lanes:
    """Two lanes, so that short pieces do not wait for long ones.

    short: largest size of a short piece; threads: do the work, by default the event loop's."""

    def __init__(self, short: int, threads: Executor | None = None) -> None:
        self._size = short
        self._short = Lane(threads)
        self._long = Lane(threads)

    async def run(self, client: str, size: int, work: Callable[[], T]) -> T:
        """Do a piece of that size in its lane: see `Lane.run`."""
        lane = self._short if size <= self._size else self._long
        return await lane.run(client, size, work)


class Lane:
    """One piece of work at a time, so that rounds of the engine keep the processors."""

    def __init__(self, threads: Executor | None = None) -> None:
        self._threads = threads
        self._counter = VirtualTokenCounter()
        self._waiting: ClientQueues[_Place] = ClientQueues()
        self._busy: _Place | None = None

    async def run(self, client: str, size: int, work: Callable[[], T]) -> T:
        """Do `work` in another thread when the client is selected; return what it returns.

        size: bytes or characters. The client is charged the size, or the microseconds if more."""
        loop = asyncio.get_running_loop()
        return await self.take(client, size, lambda: loop.run_in_executor(self._threads, work))

    async def take(
        self, client: str, size: int, begin: Callable[[], Awaitable[T]], stops: bool = False
    ) -> T:
        """Call `begin` when the client is selected; return its result.

        stops: cancel the work when the caller is cancelled; otherwise it goes on, and holds the
        lane, to its end."""
        place = _Place(client, size)
        self._counter.arrive([client], self._waiting.clients)
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
        working.add_done_callback(partial(self._done, place, time.monotonic()))
        try:
            return await asyncio.shield(working)
        except asyncio.CancelledError:
            if stops:
                working.cancel()
            raise
        finally:
            del working  # else an error would keep itself, and the whole request, alive

    def _done(self, place: _Place, began: float, work: asyncio.Future[T]) -> None:
        """Charge the microseconds beyond the size, and go on to the next piece."""
        microseconds = int(1e6 * (time.monotonic() - began))
        self._counter.charge(place.client, max(0, microseconds - place.size))
        if not work.cancelled():
            work.exception()  # asyncio logs errors that are never fetched
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


class Texts:
    """Read requests and write long answers outside the event loop: one piece at a time, the client
    that has sent least first.

    A piece holds Python's lock, so many at once would hold up all small requests. `Gate` bounds
    the bytes of the bodies that wait here."""

    def __init__(self) -> None:
        self._lanes = Lanes(SHORT)
        self._answers = Lane()
        self._waiting = 0  # requests that wait or are read

    @property
    def quiet(self) -> bool:
        """Whether no request waits to be read."""
        return not self._waiting

    async def read(self, request: Request, work: Callable[[], T]) -> T:
        """Do `work` on a request when its client is selected. Raises ApiError if the client hangs
        up."""
        size = len(await request.body())
        return await self.held(request, self._lanes.run(request.state.client, size, work))

    async def held(self, request: Request, work: Awaitable[T]) -> T:
        """Await `work` while the request counts as waiting. Raises ApiError if the client hangs
        up."""
        self._waiting += 1
        try:
            return await unless_gone(request, work)
        finally:
            self._waiting -= 1

    async def checked(self, request: Request, work: Callable[[], T]) -> T:
        """Do `work` as `read` does, or at once where the body is short."""
        long = len(await request.body()) > SHORT
        return await self.read(request, work) if long else work()

    async def write(self, request: Request, size: int, work: Callable[[], T]) -> T:
        """Do `work` on a long answer when its client is selected. size: tokens of the answer."""
        return await self._answers.run(request.state.client, size, work)


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Await `work`. If the client hangs up before, cancel it and raise ApiError."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(disconnect(request))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise gone()
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        del task  # else an error would keep itself, this frame and the whole request alive


async def disconnect(request: Request) -> None:
    """Return when the client hangs up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
