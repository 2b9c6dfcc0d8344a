"""Chat templates outside the server, rendered in a process with bounds.

A template is a program that comes with a stranger's model. This is our side, and the program of the
process: `python -m smart_decoding.models.text.rendering`. Tasks and answers are lines of JSON."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from smart_decoding.errors import CapacityError, ConfigError
from smart_decoding.models.text import bounds

SECONDS = 10.0  # of a processor for a conversation; a usual one takes some thousandths
LARGEST = 16 * 2**20  # characters of a prompt


def run(template: str, variables: str | None) -> str:
    """Do what `chat_template.fill` does, within the bounds. Raises ConfigError for a template that
    is malformed, refuses its variables or breaks a bound, CapacityError where the process is
    killed."""
    if bounds.bounded or sys.platform == "win32":  # which has no such bounds
        from smart_decoding.models.text.chat_template import fill  # which needs this module

        return fill(template, variables)
    task = {"template": template, "variables": variables, "seconds": SECONDS}
    return _renderer.answer(json.dumps(task))


class _Renderer:
    """The process. The first task starts it, and the next one where it was ended."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._lock = threading.Lock()
        atexit.register(self._stop)

    def answer(self, line: str) -> str:
        """Do one task. Raises as `run` does."""
        with self._lock:
            status, answer = self._asked(line)
            if status not in (0, bounds.OVER_TIME, *bounds.OVER_MEMORY):
                status, answer = self._asked(line)  # it was killed from outside
        if status == bounds.OVER_TIME or status in bounds.OVER_MEMORY:
            raise ConfigError(
                f"the chat template takes more than {SECONDS:g} s of a processor, or than "
                f"{bounds.MEMORY >> 20} MiB of memory: give another one"
            )
        if status:
            raise CapacityError(
                f"the process for the chat template ended with status {status}: try again"
            )
        found = json.loads(answer)
        if "refused" in found:
            raise ConfigError(found["refused"])
        return str(found["text"])

    def _asked(self, line: str) -> tuple[int, bytes]:
        """Return 0 and the answer, or the exit status and nothing."""
        child = self._running()
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            with suppress(BrokenPipeError):
                child.stdin.write(line.encode() + b"\n")
                child.stdin.flush()
            answer = child.stdout.readline()
        except BaseException:  # Ctrl-C: the next task would get this one's answer
            self._stop()
            raise
        if not answer.endswith(b"\n"):
            self._stop(killed=False)
        return child.returncode or 0, answer

    def begin(self) -> None:
        """Start the process."""
        with self._lock:
            self._running()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._owner != os.getpid():  # after a fork it is the parent's
            self._owner = os.getpid()
            try:
                self._child = subprocess.Popen(
                    [sys.executable, "-P", "-X", "utf8", "-m", __name__],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env=bounds.environment(),
                    process_group=0,  # Ctrl-C is ours
                )
            except OSError as error:
                message = f"no process for the chat template can be started: {error.strerror}"
                raise CapacityError(message) from error
        return self._child

    def _stop(self, killed: bool = True) -> None:
        """End the process, or wait for its end."""
        child, self._child = self._child, None
        if child is None or self._owner != os.getpid():
            return
        if killed:
            child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            with suppress(BrokenPipeError):  # of what was not read
                assert pipe is not None
                pipe.close()


_renderer = _Renderer()


def begin() -> None:
    """Start the process before there is a conversation: it takes a tenth of a second."""
    with suppress(CapacityError):  # a prompt without a template needs none
        if sys.platform != "win32":
            _renderer.begin()


def main() -> None:
    """Do tasks until the input ends. A broken bound has an exit status of its own."""
    from smart_decoding.models.text.chat_template import fill

    fill("", None)  # imports, which take time
    bounds.limit_memory()
    for line in sys.stdin:
        try:
            task = json.loads(line)
            bounds.limit_time(task.pop("seconds"))
            answer = json.dumps(_answer(fill, task))
        except MemoryError:
            os._exit(bounds.NO_MEMORY)
        print(answer, flush=True)
        bounds.limit_time(0)


def _answer(fill: Callable[..., str], task: Mapping[str, Any]) -> dict[str, str]:
    try:
        text = fill(**task)
    except ConfigError as error:
        return {"refused": str(error)}
    if len(text) > LARGEST:
        return {"refused": f"the chat template makes more than {LARGEST} characters"}
    return {"text": text}


if __name__ == "__main__":
    main()
