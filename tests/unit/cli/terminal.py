"""A command in a terminal of its own."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]")
SCRIPTED = [sys.executable, str(Path(__file__).with_name("scripted_chat.py"))]


class Terminal:
    """Runs a program whose standard streams are a terminal of some columns."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], columns: int = 80
    ) -> None:
        self._ours, theirs = pty.openpty()
        size = struct.pack("HHHH", 24, columns, 0, 0)
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, size)
        taken = ("COLUMNS", "LINES")
        inherited = {name: value for name, value in os.environ.items() if name not in taken}
        self._process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**inherited, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", **environment},
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(theirs)
        self._output = ""

    @property
    def shows_keys(self) -> bool:
        """Whether it writes what is typed, where no program reads it."""
        return bool(termios.tcgetattr(self._ours)[3] & termios.ECHO)

    def send(self, text: str) -> None:
        """Type a text."""
        os.write(self._ours, text.encode())

    def until(self, text: str, seconds: float = 60) -> str:
        """Wait for a text; return the output since the last call, without escapes."""
        end = time.monotonic() + seconds
        while text not in (shown := self._shown()):
            if not self._read(end - time.monotonic()):
                raise AssertionError(f"{text!r} is missing behind {shown!r}")
        before, found, rest = shown.partition(text)
        self._output = rest
        return before + found

    def end(self, seconds: float = 30) -> int:
        """Wait for the program's end; return its exit code."""
        end = time.monotonic() + seconds
        while self._read(end - time.monotonic()):
            pass
        return self._process.wait(max(0.1, end - time.monotonic()))

    def close(self) -> None:
        """End the program, if it still runs."""
        self._process.kill()
        self._process.wait()
        os.close(self._ours)

    def _shown(self) -> str:
        shown = self._output.replace("\b\x1b[2C", " ")  # a blank, as prompt_toolkit writes it
        return _ESCAPES.sub("", shown).replace("\r\n", "\n")

    def _read(self, seconds: float) -> bool:
        if not select.select([self._ours], [], [], max(0.0, seconds))[0]:
            return False
        try:
            found = os.read(self._ours, 1 << 16)
        except OSError:  # the program has ended
            return False
        self._output += found.decode(errors="replace")
        return bool(found)


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
