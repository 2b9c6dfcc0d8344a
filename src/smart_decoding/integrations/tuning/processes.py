"""Servers that are started here: their ends, their last words, and how they are asked.

A server gets a process group of its own, so that Ctrl-C reaches us alone, and ends with us, also
where we are killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from smart_decoding.errors import ModelError
from smart_decoding.integrations.tuning import huge_pages
from smart_decoding.kernels import children

ASKING = 5.0  # seconds until a server that says nothing is asked again whether it is ready
ENDING = 20.0  # seconds that a server has to end by itself
# A line that tells an error: llama-server's log at its level, or in words.
_ERROR = re.compile(r"^(?:\d[\d.]* E )|\b(?:error|Error|failed)\b")
_TIME = re.compile(r"^\d[\d.]* [EWID] (?:\S+\s+)?")
_RUNNING: set[ServerProcess] = set()


class TimeUpError(Exception):
    """The time limit came in the middle of something."""


class ServerProcess:
    """A server on a port of this machine. Raises ModelError with its reason if it does not start or
    fails; nothing of it is left running then."""

    def __init__(
        self,
        command: Sequence[str],
        port: int,
        environment: Mapping[str, str] | None = None,
        loading: float = 300.0,
    ) -> None:
        """command: all its words, and `huge_pages.VARIABLE` among them; loading: seconds until it
        is given up. Returns when GET /health answers."""
        if huge_pages.VARIABLE in command:
            command = [word for word in command if word != huge_pages.VARIABLE]
            name, _, value = huge_pages.VARIABLE.partition("=")
            environment = {**(environment or children.environment()), name: value}
        self.name, self._port = Path(command[0]).name, port
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        try:
            with _signals_later():
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=self._log,
                    stderr=subprocess.STDOUT,
                    env=environment or children.environment(),
                    start_new_session=True,
                    preexec_fn=children.end_with_parent,
                )
                _RUNNING.add(self)
        except OSError as error:
            self._log.close()
            raise ModelError(f"{command[0]} cannot be started: {error.strerror}") from error
        try:
            self._wait_until_loaded(loading)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The number of its process."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self._process.poll() is not None

    def ask(self, path: str, body: Mapping[str, Any] | None, seconds: float) -> Any:
        """Return the JSON that it answers. Raises ModelError with its reason, if it fails or says
        nothing for so many seconds."""
        try:
            return self._ask(path, body, seconds)
        except urllib.error.HTTPError as error:
            said = " ".join(error.read().decode(errors="replace").split())[:300]
            raise ModelError(f"{self.name} refused a request: {said}") from error
        except (OSError, ValueError) as error:
            raise ModelError(f"{self.name} did not answer: {self._reason(str(error))}") from error

    def close(self) -> None:
        """End its group, by force if it does not end by itself."""
        for number in (signal.SIGCONT, signal.SIGTERM):
            self.signal(number)
        try:
            self._process.wait(timeout=ENDING)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self.signal(signal.SIGKILL)  # what it started, too
            self._process.wait()
            children.wait_for_group(self._process.pid, ENDING)
            self._log.close()
            _RUNNING.discard(self)

    def signal(self, number: int) -> None:
        """Send its group a signal."""
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, number)

    def _wait_until_loaded(self, seconds: float) -> None:
        stop = time.monotonic() + seconds
        while time.monotonic() < stop:
            if self.ended:
                raise ModelError(self._reason(""))
            try:
                self._ask("/health", None, ASKING)
                return
            except ValueError:  # an empty answer is one
                return
            except OSError:  # nobody listens yet, or 503: it loads
                time.sleep(0.02)
        raise ModelError(f"{self.name} was not ready within {seconds:.0f} s: {self._reason('')}")

    def _ask(self, path: str, body: Mapping[str, Any] | None, seconds: float) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}{path}", data, {"Content-Type": "application/json"}
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=seconds) as answer:
            return json.load(answer)

    def _reason(self, error: str) -> str:
        """Return how it ended, and what it said of it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1.0)  # one that dies closes its connections first
        code = self._process.poll()
        if code is None:
            return error or reason_in(self.log())
        return f"{self.name} ended with {code}: {reason_in(self.log())}"

    def log(self) -> str:
        """Return what it has printed."""
        size = os.fstat(self._log.fileno()).st_size
        # Not read(): the process writes at the position that it would move.
        return os.pread(self._log.fileno(), size, 0).decode(errors="replace")


def reason_in(text: str) -> str:
    """Return the first line of a log that tells an error, else its last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.search(line)]
    line = (errors or lines[-1:] or ["it said nothing"])[0]
    return _TIME.sub("", line)[:200].strip()


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def ending_with_us() -> Iterator[None]:
    """Exit on SIGTERM and SIGHUP; leave no server behind, wherever a signal came between."""

    def leave(number: int, _: object) -> None:
        sys.exit(128 + number)

    try:
        with _handling((signal.SIGTERM, signal.SIGHUP), leave):
            yield
    finally:
        for server in list(_RUNNING):
            server.close()


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Leave the block of `with` when the time is up, whatever the main thread waits for."""

    def late(_: int, __: object) -> None:
        raise TimeUpError

    with _handling((signal.SIGALRM,), late):
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
        try:
            with contextlib.suppress(TimeUpError):
                yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)


@contextmanager
def _signals_later() -> Iterator[None]:
    """Hold signals that end us back: a server that is just started is not known yet."""
    if threading.current_thread() is not threading.main_thread():  # signals are the main one's
        yield
        return
    came: list[int] = []
    try:
        all_ = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)
        with _handling(all_, lambda number, _: came.append(number)):
            yield
    finally:
        for number in came[:1]:
            signal.raise_signal(number)


@contextmanager
def _handling(
    numbers: Sequence[signal.Signals], handler: Callable[[int, object], None]
) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, each in before.items():
            signal.signal(number, each)
