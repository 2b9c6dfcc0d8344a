"""Work on requests beside the event loop: one piece at a time, of each waiting client in turn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeVar
from weakref import WeakValueDictionary

from smart_decoding.server.errors import gone

if TYPE_CHECKING:
    from fastapi import Request

T = TypeVar("T")
SHORT = 16_384  # bytes of a body whose texts are not worth a wait for long ones


class Turns:
    """One piece of work at a time, so that rounds of the engine keep the processors.

    A client stands in line once, however many pieces it has: nobody waits for two pieces of another
    client. threads: do the work, by default the event loop's."""

    def __init__(self, threads: Executor | None = None) -> None:
        self._threads = threads
        self._line = asyncio.Lock()
        self._own: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def turn(self, client: str) -> AsyncIterator[None]:
        """Wait for the client's turn, which lasts as long as the context."""
        async with self._own.setdefault(client, asyncio.Lock()), self._line:
            yield

    async def run(self, client: str, work: Callable[[], T]) -> T:
        """Do `work` in a thread at the client's turn; return its result. A cancelled caller waits
        for the end of work that has begun: threads cannot be stopped."""
        async with self.turn(client):
            working = asyncio.get_running_loop().run_in_executor(self._threads, work)
            try:
                return await asyncio.shield(working)
            except asyncio.CancelledError:
                await asyncio.wait([working])
                raise
            finally:
                del working  # else an error would keep itself, and the whole request, alive


class Texts:
    """Read long requests and write long answers.

    A piece holds Python's lock, so many at once would hold up all small requests. `Gate` bounds
    the bytes of the bodies that wait here."""

    def __init__(self) -> None:
        self._requests = Turns()
        self._answers = Turns()

    async def read(self, request: Request, work: Callable[[], T]) -> T:
        """Do `work` on a request at its client's turn. Raises ApiError if the client hangs up."""
        return await unless_gone(request, self._requests.run(request.state.client, work))

    async def checked(self, request: Request, work: Callable[[], T]) -> T:
        """Do `work` as `read` does, or at once where the body is short."""
        long = len(await request.body()) > SHORT
        return await self.read(request, work) if long else work()

    async def write(self, request: Request, work: Callable[[], T]) -> T:
        """Do `work` on a long answer at its client's turn."""
        return await self._answers.run(request.state.client, work)


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
