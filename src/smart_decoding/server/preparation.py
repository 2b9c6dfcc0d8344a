"""Turn texts of requests into tokens, and try their grammars, in a process whose children may be
killed.

This is the server's side; `server.preparation_process` is the program of the process."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakValueDictionary

from smart_decoding.errors import CapacityError, ConfigError
from smart_decoding.models.text import bounds
from smart_decoding.models.text.grammar_source import library
from smart_decoding.models.text.grammars import Compiled, Grammars, stand_back
from smart_decoding.server import preparation_process
from smart_decoding.server.errors import ApiError, shutting_down
from smart_decoding.server.preparation_process import (
    HEAD,
    LARGEST,
    LIMITS,
    NICENESS,
    READY,
    framed,
    unframed,
)
from smart_decoding.server.turns import SHORT, Turns

if TYPE_CHECKING:
    from smart_decoding.engine.structured import StructuredOutputsParams
    from smart_decoding.llm import LLM

log = logging.getLogger("smart.server")
_Streams: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]
SHORT_SECONDS = 0.1  # of a processor for a short task; a usual chat takes some thousandths
SECONDS = 2.0  # of a processor for a long task, or a short one that took over SHORT_SECONDS
PATIENCE = 30.0  # seconds by the clock for a task, on a busy machine
START = 120.0  # seconds by the clock for the start of the process
LAST_WORDS = 0.5  # seconds from the end of the process's output to its exit status
NICE = 10  # priority of long tasks: rounds of the engine go first
GRAMMAR_SIZE = 2**18  # characters; a mask of a long literal takes a microsecond for each
_THREADS = {"MALLOC_ARENA_MAX": "1", "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}


class TooLargeError(ConfigError):
    """A task that breaks a limit."""


class TooSlowError(TooLargeError):
    """A task that takes longer than it may."""


class FailedError(RuntimeError):
    """A task, or a start of the process, that failed as none may. said: for the log."""

    def __init__(self, said: str) -> None:
        super().__init__("the preparation process failed")
        self.said = said


class Process:
    """The preparation process. The first task starts it; another one replaces it when it dies.

    setup: awaits the first frame."""

    def __init__(self, setup: Callable[[], Awaitable[bytes]]) -> None:
        self.child: subprocess.Popen[bytes] | None = None
        self._setup = setup
        self._control: socket.socket | None = None
        self._ready: asyncio.Task[socket.socket] | None = None
        self._free: dict[int, _Streams] = {}  # niceness -> to a child that has no task
        self._stopped = False

    def start(self) -> None:
        """Start the process, unless it runs."""
        lives = self.child is not None and self.child.poll() is None
        if not self._stopped and (self._ready is None or (self._ready.done() and not lives)):
            self._end()
            self._ready = asyncio.create_task(self._begin())

    def stop(self) -> None:
        """End the process for good. Waiting tasks raise ApiError: the server ends."""
        self._stopped = True
        if self._ready is not None:
            self._ready.cancel()  # of no effect if it is ready
        for _, writer in self._free.values():
            writer.transport.abort()
        self._end()

    async def answer(self, task: bytes, seconds: float, nice: int = 0) -> Any:
        """Do one task in a child; return its result. seconds: of a processor; nice: the child's
        priority.

        Raises TooLargeError if the task breaks a limit, ConfigError or CapacityError if it is
        refused, ApiError if the server ends, the task is overdue or its child is killed twice."""
        limits = LIMITS.pack(round(1000 * seconds), round(1000 * PATIENCE))
        for _ in range(2):
            answer = await self._answer(limits + HEAD.pack(len(task)) + task, nice)
            status = answer.get("ended")
            if status is None:
                return _result(answer)
            if status == bounds.OVER_TIME:
                raise TooSlowError(f"preparing it takes more than {seconds:g} s of a processor")
            if status in bounds.OVER_MEMORY:
                size = f"{bounds.MEMORY >> 20} MiB of memory"
                raise TooLargeError(
                    f"preparing it takes more than {size}, or it is nested too deep"
                )
            if status == -signal.SIGALRM:
                message = f"preparing it took more than {PATIENCE:g} s here: try again later"
                raise ApiError(503, message, "overloaded")
            if status >= 0:
                raise FailedError(f"its child ended with status {status}")
        log.error(f"a preparation process ended with status {status} twice")
        message = "the process that prepares it was killed: try again later"
        raise ApiError(503, message, "overloaded")

    async def _answer(self, task: bytes, nice: int) -> dict[str, Any]:
        """Return what a child answers, or how it ended. task: with its limits."""
        free = self._free.pop(nice) if nice in self._free else await self._fork(nice)
        reader, writer = free
        found: dict[str, Any] = {"ended": -signal.SIGKILL}  # with the process itself
        try:
            writer.write(task)
            found = unframed(await _body(reader))
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            if "ended" in found:
                writer.transport.abort()  # which ends the child, if it still works
            else:
                self._free[nice] = reader, writer
        return found

    async def _fork(self, nice: int) -> _Streams:
        """Return the streams of a new child."""
        self.start()
        if self._ready is None or self._stopped:
            raise shutting_down()
        try:
            control = await asyncio.shield(self._ready)
        except asyncio.CancelledError:
            if self._stopped:
                raise shutting_down() from None
            raise
        ours, theirs = socket.socketpair()
        streams = await asyncio.open_connection(sock=ours)
        with theirs, suppress(OSError):  # then the child's end is closed, which its task finds
            socket.send_fds(control, [NICENESS.pack(nice)], [theirs.fileno()])
        return streams

    async def _begin(self) -> socket.socket:
        """Start the process; return its socket when it is ready. Raises FailedError."""
        self._control, theirs = socket.socketpair()
        self._control.setblocking(False)
        try:
            with theirs:
                self.child = subprocess.Popen(
                    [sys.executable, "-P", "-X", "utf8", "-m", preparation_process.__name__],
                    stdin=theirs.fileno(),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    env={**bounds.environment(), **_THREADS},
                    process_group=0,  # Ctrl-C is the server's
                )
        except OSError as error:
            raise FailedError(f"no preparation process can be started: {error}") from error
        setup = await self._setup()
        loop = asyncio.get_running_loop()
        ready = b""
        with suppress(TimeoutError, OSError):
            async with asyncio.timeout(START):
                await loop.sock_sendall(self._control, setup)
                ready = await loop.sock_recv(self._control, len(READY))
        if not ready:
            status, said = await asyncio.to_thread(self._said)
            raise FailedError(f"the preparation process ended with status {status}: {said}")
        return self._control

    def _said(self) -> tuple[int, str]:
        """Wait for the end, which may have begun; return the exit status and the last words."""
        assert self.child is not None
        assert self.child.stdout is not None
        with suppress(subprocess.TimeoutExpired):
            self.child.wait(LAST_WORDS)
        self._kill(self.child)
        said = self.child.stdout.read().decode(errors="replace")
        return self.child.wait(), said[-2000:]

    def _end(self) -> None:
        """End the process and its children, if there are any."""
        if self._control is not None:
            self._control.close()
        if self.child is not None:
            self._kill(self.child)
            with self.child:  # waits, and closes what it wrote to
                pass

    def _kill(self, child: subprocess.Popen[bytes]) -> None:
        if child.poll() is None:
            with suppress(OSError):  # macOS refuses where it has just ended
                os.killpg(child.pid, signal.SIGKILL)


class Preparation:
    """Make tokens and grammars of requests. Call all methods but `know` in the event loop.

    Short tasks do not wait for long ones. One that takes too long for a short one is done again as
    a long one."""

    def __init__(self) -> None:
        self.process = Process(self._tokenizer)
        self._short = Turns()
        self._long = Turns()
        threads = ThreadPoolExecutor(2, "smart-grammars", stand_back, (NICE,))
        self._compiling_short = Turns(threads)
        self._compiling_long = Turns(threads)
        # Held while a grammar is tried and compiled, so that equal ones are once.
        self._locks: WeakValueDictionary[StructuredOutputsParams, asyncio.Lock] = (
            WeakValueDictionary()
        )
        self._setup = b""
        self._known = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Start the process."""
        self._loop = asyncio.get_running_loop()
        self.process.start()

    def know(self, llm: LLM) -> None:
        """Take the model, once it is loaded. May be called in any thread."""
        self._setup = framed(setup_of(llm))
        if self._loop is not None:
            with suppress(RuntimeError):  # it is closed: the server has ended
                self._loop.call_soon_threadsafe(self._known.set)

    def stop(self) -> None:
        """End the process, as the server ends."""
        self.process.stop()

    async def tokens(self, client: str, task: bytes) -> list[list[int]]:
        """Return token ids by a task `chat` or `encode`. Raises as `Process.answer` does."""
        tokens: list[list[int]] = await self._answer(client, task)
        return tokens

    async def text(self, client: str, task: bytes) -> str:
        """Return the text by a task `decode`. Raises as `Process.answer` does."""
        return str(await self._answer(client, task))

    async def compiled(
        self, grammars: Grammars, params: StructuredOutputsParams, client: str
    ) -> Compiled:
        """Try a grammar in a child, then compile it here on the model's tokens, once for all equal
        ones. Raises ConfigError for a grammar that is wrong or too large, and as `Process.answer`
        does."""
        size = _size(params)
        async with self._locks.setdefault(params, asyncio.Lock()):
            found = grammars.known(params)
            if found is None:
                library()  # raises ConfigError without llguidance
                source = await self._answer(client, task("grammar", **vars(params)))
                work = partial(grammars.compiled, params, source)
                line = self._compiling_short if size <= SHORT else self._compiling_long
                found = await line.run(client, work)
        return found

    async def _answer(self, client: str, task: bytes) -> Any:
        """See `Process.answer`."""
        if len(task) <= SHORT:
            with suppress(TooSlowError):
                async with self._short.turn(client):
                    return await self.process.answer(task, SHORT_SECONDS)
        async with self._long.turn(client):
            return await self.process.answer(task, SECONDS, NICE)

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


async def _body(reader: asyncio.StreamReader) -> bytes:
    (length,) = HEAD.unpack(await reader.readexactly(HEAD.size))
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
