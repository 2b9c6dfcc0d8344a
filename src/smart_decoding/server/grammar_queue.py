"""Grammars of requests, compiled before the engine asks for them: each client in turn, and each
first in a process that can be killed (`models.grammar_check`)."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from smart_decoding.errors import ConfigError
from smart_decoding.models import grammar_check
from smart_decoding.models.grammars import Compiled, Grammars, library, one_line
from smart_decoding.server.errors import ApiError, shutting_down
from smart_decoding.server.lane import Lanes

if TYPE_CHECKING:
    from smart_decoding.engine.structured import StructuredOutputsParams

SHORT = 4096  # characters: no wait behind long ones
SIZE = 2**18  # characters: of a long literal, a mask takes a microsecond for each
SECONDS = 2.0  # of a processor
PATIENCE = 30.0  # seconds, on a machine that has others to do
WAITING = 16  # of one client, the one that is compiled among them


@dataclass(eq=False, slots=True)
class Work:
    """A grammar that is compiled, or will be. wanted: by how many requests."""

    wanted: int = 0
    task: asyncio.Task[Compiled] | None = None
    child: subprocess.Popen[str] | None = None
    ended: bool = False

    def end(self) -> None:
        """Nobody waits for it any more."""
        self.ended = True
        if self.task is not None:
            self.task.cancel()
        if self.child is not None:
            self.child.kill()


class GrammarQueue:
    """What stands between requests and `Grammars`. All methods are the event loop's."""

    def __init__(self) -> None:
        threads = ThreadPoolExecutor(2, "smart-grammars", initializer=grammar_check.stand_back)
        self._lanes = Lanes(SHORT, threads)
        self._waiting: Counter[str] = Counter()
        self._works: dict[StructuredOutputsParams, Work] = {}
        self._stopped = False

    async def compiled(
        self, grammars: Grammars, params: StructuredOutputsParams, client: str
    ) -> Compiled:
        """The grammar, once it is its client's turn. If all who wait for it are cancelled, so is
        its compilation. Raises ConfigError for one that is wrong or too large, ApiError if the
        client has too many here or the server ends."""
        size = _size(params)
        found = grammars.known(params)
        if found is not None:
            return found
        work = self._works.get(params)
        if work is None:
            work = self._queued(size, grammars, params, client)
        assert work.task is not None
        work.wanted += 1
        try:
            return await asyncio.shield(work.task)  # others may want the same
        except asyncio.CancelledError:
            if self._stopped:
                raise shutting_down() from None
            raise
        finally:
            work.wanted -= 1
            if not work.wanted and self._works.get(params) is work:
                del self._works[params]
                work.end()

    def stop(self) -> None:
        """The server ends: nobody waits for a grammar any more."""
        self._stopped = True
        for work in self._works.values():
            work.end()

    def _queued(
        self, size: int, grammars: Grammars, params: StructuredOutputsParams, client: str
    ) -> Work:
        if self._waiting[client] >= WAITING:
            message = f"{WAITING} of your grammars are waiting to be compiled: try again later"
            raise ApiError(429, message, "queue_full")
        self._waiting[client] += 1
        work = self._works[params] = Work(ended=self._stopped)
        compile_ = partial(self._compile, grammars, params, work)
        work.task = asyncio.ensure_future(self._lanes.run(client, size, compile_))
        work.task.add_done_callback(lambda _: self._done(params, work, client))
        return work

    def _done(self, params: StructuredOutputsParams, work: Work, client: str) -> None:
        if self._works.get(params) is work:
            del self._works[params]
        self._waiting[client] -= 1
        self._waiting += Counter()  # without those that wait no more

    def _compile(self, grammars: Grammars, params: StructuredOutputsParams, work: Work) -> Compiled:
        """In another thread."""
        found = grammars.known(params)
        if found is None:
            library()  # or nothing of this makes sense
            found = grammars.compiled(params, self._tried(json.dumps(vars(params)), work))
        return found

    def _tried(self, asked: str, work: Work) -> str:
        """What llguidance compiles: nothing of a request is parsed in this process before."""
        options = ["-P", "-X", "utf8", "-m", grammar_check.__name__]
        command = [sys.executable, *options, str(SECONDS)]
        pipe = subprocess.PIPE
        with subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, encoding="utf-8"
        ) as child:
            work.child = child
            if work.ended:  # before this child was known
                child.kill()
            try:
                said, _ = child.communicate(asked, PATIENCE)
            except subprocess.TimeoutExpired:
                said = ""
            finally:
                child.kill()
        if said and child.returncode == 0:
            return said
        if said:
            raise ConfigError(f"structured_outputs: {one_line(said)}")
        raise ConfigError(
            "structured_outputs: it is too large or too deep to be compiled within "
            f"{SECONDS:g} s: make it smaller, with fewer optional properties and references"
        )


def _size(params: StructuredOutputsParams) -> int:
    """Characters. Raises ConfigError for too many."""
    text = params.json or params.regex or params.grammar or ""
    size = len(text) + sum(len(each) + 3 for each in params.choice or ())
    if size > SIZE:
        raise ConfigError(
            f"structured_outputs: it has {size} characters, and at most {SIZE} are compiled here: "
            "make it smaller"
        )
    return size
