"""Turn texts of requests into tokens, and try their grammars, in processes that may be killed.

This is the server's side; `server.preparation_process` is the program of such a process."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import IO, TYPE_CHECKING, Any, TypeAlias, TypeVar

from smart_decoding.errors import CapacityError, ConfigError
from smart_decoding.models.text import bounds
from smart_decoding.models.text.grammar_source import library
from smart_decoding.models.text.grammars import Compiled, Grammars, stand_back
from smart_decoding.server import preparation_process
from smart_decoding.server.errors import ApiError, shutting_down
from smart_decoding.server.lane import SHORT, Lane, Lanes
from smart_decoding.server.preparation_process import (
    HEAD,
    LARGEST,
    framed,
    unframed,
    unpacked,
)

if TYPE_CHECKING:
    from smart_decoding.engine.structured import StructuredOutputsParams
    from smart_decoding.llm import LLM

log = logging.getLogger("smart.server")
T = TypeVar("T")
_Streams: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]
SHORT_SECONDS = 0.25  # of a processor for a short task; a usual chat takes some thousandths
SECONDS = 2.0  # of a processor for a long task, or a short one that took over SHORT_SECONDS
PATIENCE = 30.0  # seconds by the clock for a task, on a busy machine
SLOW = 5.0  # seconds for which a client that broke a short limit uses the long process alone
START = 120.0  # seconds by the clock for the start of a process
LAST_WORDS = 0.5  # seconds from the end of a process's output to its exit status
NICE = 10  # priority of long tasks, not of starts: rounds of the engine go first
WAITING = 16  # grammars of one client that wait or are compiled
GRAMMAR_SIZE = 2**18  # characters; a mask of a long literal takes a microsecond for each
_THREADS = {"MALLOC_ARENA_MAX": "1", "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}


class TooLargeError(ConfigError):
    """A task that breaks a limit."""


class TooSlowError(TooLargeError):
    """A task that takes longer than it may."""


class OverdueError(ApiError):
    """A task that took too long by the clock, on a machine that may be busy."""

    def __init__(self) -> None:
        message = f"preparing it took more than {PATIENCE:g} s here: try again later"
        super().__init__(503, message, "overloaded")


class EndedError(RuntimeError):
    """A process that ended for an unknown reason. status: its exit status; said: for the log."""

    def __init__(self, status: int, said: str) -> None:
        self.status = status
        self.said = f"a preparation process ended with status {status}: {said}"
        super().__init__(self.said)


class FailedError(RuntimeError):
    """A task that failed as none may. said: the traceback, for the log."""

    def __init__(self, said: str) -> None:
        super().__init__("a preparation process failed")
        self.said = said


class Process:
    """One preparation process. The first task starts it; another one replaces it when it dies.

    setup: awaits the first frame; nice: priority; seconds: of a processor for each task."""

    def __init__(self, setup: Callable[[], Awaitable[bytes]], nice: int, seconds: float) -> None:
        self.child: subprocess.Popen[bytes] | None = None
        self._setup = setup
        self._nice = nice
        self._seconds = seconds
        self._log: IO[bytes] | None = None
        self._ready: asyncio.Task[_Streams] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._stopped = False

    def start(self) -> None:
        """Start the process, unless it runs."""
        if self._ready is not None and self._ready.done() and not self._lives():
            self._forget()  # it died while it had no task
        if self._ready is None and not self._stopped:
            self._ready = asyncio.create_task(self._begin())

    def stop(self) -> None:
        """End the process for good. Waiting tasks raise ApiError: the server ends."""
        self._stopped = True
        if self._ready is not None:
            self._ready.cancel()  # of no effect if it is ready
        if self._writer is not None:
            self._writer.close()
        self._end()

    async def answer(self, task: bytes) -> Any:
        """Do one task; return its result. Only one may run at a time.

        Raises TooLargeError if the task breaks a limit, ConfigError or CapacityError if it is
        refused, ApiError if the server ends, the task is overdue or its process is killed twice."""
        try:
            return await self._answer(task)
        except EndedError as error:
            if error.status >= 0:  # a defect; else it was killed, as where there is no memory
                raise
        try:
            return await self._answer(task)
        except EndedError as error:
            log.error(error.said)
            message = "the process that prepares it was killed: try again later"
            raise ApiError(503, message, "overloaded") from error

    async def _answer(self, task: bytes) -> Any:
        self.start()
        if self._ready is None:
            raise shutting_down()
        try:
            reader, writer = await asyncio.shield(self._ready)
        except asyncio.CancelledError:
            if self._stopped:
                raise shutting_down() from None
            raise
        try:
            async with asyncio.timeout(PATIENCE):
                writer.write(HEAD.pack(len(task), round(1000 * self._seconds)))
                writer.write(task)
                found = await _body(reader)
        except asyncio.CancelledError:
            await self._died(True)
            raise
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError) as error:
            raise await self._died(isinstance(error, TimeoutError)) from error
        return _result(await _in_thread(unframed, found))

    async def _begin(self) -> _Streams:
        """Start the process and wait until it is ready. Raises RuntimeError."""
        ours, theirs = socket.socketpair()
        try:
            self._log = _new_log()
            options = ["-P", "-X", "utf8", "-m", preparation_process.__name__]
            self.child = subprocess.Popen(
                [sys.executable, *options, str(self._nice)],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=self._log or subprocess.DEVNULL,
                env={**bounds.environment(), **_THREADS},
                process_group=0,  # Ctrl-C is the server's
            )
        except OSError as error:
            ours.close()
            raise RuntimeError(f"no preparation process can be started: {error}") from error
        finally:
            theirs.close()
        reader, self._writer = await asyncio.open_connection(sock=ours)
        setup = await self._setup()
        try:
            async with asyncio.timeout(START):
                self._writer.write(setup)
                await _body(reader)
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError) as error:
            raise await self._ended(LAST_WORDS) from error
        return reader, self._writer

    async def _died(self, late: bool) -> Exception:
        """End the process and start another; return the error of its task. late: it was overdue."""
        ended = await self._ended(0 if late else LAST_WORDS)
        status = ended.status
        self._forget()
        self.start()
        if self._stopped or self._ready is None:
            return shutting_down()
        await asyncio.wait([self._ready])  # at this client's cost
        if late:
            return OverdueError()
        if status == bounds.OVER_TIME:
            return TooSlowError(f"preparing it takes more than {self._seconds:g} s of a processor")
        if status in bounds.OVER_MEMORY:
            size = f"{bounds.MEMORY >> 20} MiB of memory"
            return TooLargeError(f"preparing it takes more than {size}, or it is nested too deep")
        return ended

    async def _ended(self, seconds: float) -> EndedError:
        """Wait so long for the process to end, then kill it; return how it ended."""
        status = await asyncio.to_thread(self._end, seconds)
        return EndedError(status, self._said())

    def _lives(self) -> bool:
        return self.child is not None and self.child.poll() is None

    def _forget(self) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._log is not None:
            self._log.close()
        self._log = None
        self.child = None
        self._writer = None
        self._ready = None

    def _end(self, seconds: float = 0) -> int:
        """Wait so long for the process to end, then kill it; return its exit status."""
        if self.child is None:
            return 0
        with suppress(subprocess.TimeoutExpired):
            return self.child.wait(seconds)
        self.child.kill()
        return self.child.wait()

    def _said(self) -> str:
        """Return the end of the log, which has the process's output before it was ready."""
        if self._log is None:
            return ""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-2000:]


class ProcessPair:
    """A process for short tasks, and one for long tasks and for short ones that took too long.

    Each does one task after another, of the client served least. A client whose short task breaks
    a limit uses the long process alone for a while: each death holds up all short tasks."""

    def __init__(self, setup: Callable[[], Awaitable[bytes]]) -> None:
        self.short = Process(setup, 0, SHORT_SECONDS)
        self.long = Process(setup, NICE, SECONDS)
        self._short_lane = Lane()
        self._long_lane = Lane()
        self._slow: dict[str, float] = {}  # client -> second in which its short task broke a limit

    async def answer(self, client: str, task: bytes) -> Any:
        """See `Process`."""
        size = len(task)
        if size <= SHORT:
            short = partial(self._answer_soon, client, task)
            with suppress(TooSlowError, OverdueError):
                return await self._short_lane.take(client, size, short)
        return await self._long_lane.take(client, size, partial(self.long.answer, task), stops=True)

    async def _answer_soon(self, client: str, task: bytes) -> Any:
        latest = time.monotonic() - SLOW
        self._slow = {each: since for each, since in self._slow.items() if since > latest}
        if client in self._slow:
            raise TooSlowError("a task of this client was too slow just now")
        try:
            return await self.short.answer(task)
        except TooLargeError:
            self._slow[client] = time.monotonic()
            raise

    def stop(self) -> None:
        """See `Process`."""
        self.short.stop()
        self.long.stop()


@dataclass(eq=False, slots=True)
class _Compilation:
    """A grammar that is compiled, or will be. waiting: requests that wait for it."""

    task: asyncio.Task[Compiled]
    waiting: int = 0


class Preparation:
    """Make tokens and grammars of requests. Call all methods but `know` in the event loop."""

    def __init__(self) -> None:
        self.texts = ProcessPair(self._tokenizer)
        self.grammars = ProcessPair(_no_tokenizer)
        threads = ThreadPoolExecutor(2, "smart-grammars", stand_back, (NICE,))
        self._compiling = Lanes(SHORT, threads)
        self._works: dict[StructuredOutputsParams, _Compilation] = {}
        self._waiting: Counter[str] = Counter()  # works by client
        self._setup = b""
        self._known = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Start both processes for texts."""
        self._loop = asyncio.get_running_loop()
        self.texts.short.start()
        self.texts.long.start()

    def know(self, llm: LLM) -> None:
        """Take the model, once it is loaded. May be called in any thread."""
        self._setup = framed(setup_of(llm))
        if self._loop is not None:
            with suppress(RuntimeError):  # it is closed: the server has ended
                self._loop.call_soon_threadsafe(self._known.set)

    def stop(self) -> None:
        """End all processes, as the server ends."""
        self.texts.stop()
        self.grammars.stop()

    async def tokens(self, client: str, task: bytes) -> list[list[int]]:
        """Return token ids by a task `chat` or `encode`. Raises as `Process.answer` does."""
        return [await _in_thread(unpacked, each) for each in await self.texts.answer(client, task)]

    async def text(self, client: str, task: bytes) -> str:
        """Return the text by a task `decode`. Raises as `Process.answer` does."""
        return str(await self.texts.answer(client, task))

    async def compiled(
        self, grammars: Grammars, params: StructuredOutputsParams, client: str
    ) -> Compiled:
        """Try a grammar in a process, then compile it here on the model's tokens.

        Equal grammars are compiled once, and none after its last request has gone. Raises
        ConfigError for a grammar that is wrong or too large, ApiError if too many of this client's
        grammars wait."""
        size = _size(params)
        found = grammars.known(params)
        if found is not None:
            return found
        work = self._works.get(params)
        if work is None:
            library()  # raises ConfigError without llguidance
            if self._waiting[client] >= WAITING:
                message = f"{WAITING} of your grammars are waiting to be compiled: try again later"
                raise ApiError(429, message, "queue_full")
            self._waiting[client] += 1
            coming = asyncio.create_task(self._compile(grammars, params, client, size))
            work = self._works[params] = _Compilation(coming)
            coming.add_done_callback(partial(self._compiled, params, client))
        work.waiting += 1
        try:
            return await asyncio.shield(work.task)
        finally:
            work.waiting -= 1
            if not work.waiting:
                if self._works.get(params) is work:
                    del self._works[params]
                work.task.cancel()

    async def _compile(
        self, grammars: Grammars, params: StructuredOutputsParams, client: str, size: int
    ) -> Compiled:
        source = await self.grammars.answer(client, task("grammar", **vars(params)))
        return await self._compiling.run(client, size, partial(grammars.compiled, params, source))

    def _compiled(
        self, params: StructuredOutputsParams, client: str, done: asyncio.Task[Compiled]
    ) -> None:
        self._waiting[client] -= 1
        self._waiting += Counter()  # drop zero counts
        work = self._works.get(params)
        if work is not None and work.task is done:
            del self._works[params]

    async def _tokenizer(self) -> bytes:
        await self._known.wait()
        return self._setup


def setup_of(llm: LLM) -> dict[str, Any]:
    """Return the arguments of `preparation_process.Tasks`."""
    own = llm.tokenizer
    return {
        "backend": own.backend.to_str(),
        "specials": own.specials,
        "template": own.template,
        "template_given": own.template_given,
        "context": own.context,
        "placeholders": llm.prompts.placeholders,
    }


def task(name: str, **arguments: Any) -> bytes:
    """Return the frame's body of a task of `preparation_process.Tasks`."""
    return framed({"task": name, **arguments})[HEAD.size :]


def _new_log() -> IO[bytes] | None:
    """Return a file in memory, since folders may be full or read-only; None where there is none."""
    with suppress(AttributeError, OSError):  # Linux has them
        return open(os.memfd_create("preparation"), "w+b")
    return None


async def _no_tokenizer() -> bytes:
    return framed({})


async def _body(reader: asyncio.StreamReader) -> bytes:
    length, _ = HEAD.unpack(await reader.readexactly(HEAD.size))
    return await reader.readexactly(length)


def _result(answer: dict[str, Any]) -> Any:
    """Return the result in an answer, or raise the error in it."""
    if "too_large" in answer:
        raise TooLargeError(f"its result of {answer['too_large']} bytes is longer than {LARGEST}")
    if "over_capacity" in answer:
        raise CapacityError(answer["over_capacity"])
    if "refused" in answer:
        raise ConfigError(answer["refused"])
    if "failed" in answer:
        raise FailedError(answer["failed"])
    return answer["result"]


async def _in_thread(work: Callable[[Any], T], content: str | bytes) -> T:
    """Do `work`, in another thread where `content` is long."""
    return await asyncio.to_thread(work, content) if len(content) > SHORT else work(content)


def _size(params: StructuredOutputsParams) -> int:
    """Count the characters of a grammar. Raises ConfigError for too many."""
    text = params.json or params.regex or params.grammar or ""
    size = len(text) + sum(len(each) + 3 for each in params.choice or ())
    if size > GRAMMAR_SIZE:
        raise ConfigError(
            f"structured_outputs: it has {size} characters, and at most {GRAMMAR_SIZE} are "
            "compiled here: make it smaller"
        )
    return size
