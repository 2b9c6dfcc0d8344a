"""What the user of `smart chat` enters: at a terminal through prompt_toolkit, else line by line.

An entry is a line, a paste of several lines, or a text between triple quotes.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from smart_decoding.cli.prompts import standard_input
from smart_decoding.models.checkpoints.hub import cache_dir

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import History

QUOTES = '"""'
_OPENING = re.compile(rf"\s*(/set\s+system\s+)?{QUOTES}")


def entries() -> Iterator[str]:
    """Yield the user's entries, with their quotes. Bytes of a pipe beyond UTF-8 are replaced.
    Raises ConfigError without a standard input."""
    stream = standard_input()
    if stream.isatty():
        return _typed()
    with suppress(AttributeError, ValueError):
        stream.reconfigure(errors="replace")  # type: ignore[attr-defined]
    return joined(stream)


@contextmanager
def hidden_keys() -> Iterator[None]:
    """Keep a terminal from showing what is typed in the midst of an answer, and from dropping it at
    Ctrl-C: it is the next entry. A pipe has no keys."""
    stream = standard_input()
    if not stream.isatty():
        yield
        return
    import termios  # imported late: Windows has none

    before = termios.tcgetattr(stream)
    hiding = [*before]
    hiding[3] = hiding[3] & ~termios.ECHO | termios.NOFLSH  # the local modes
    try:
        termios.tcsetattr(stream, termios.TCSANOW, hiding)
        yield
    finally:
        termios.tcsetattr(stream, termios.TCSANOW, before)


def is_open(entry: str) -> bool:
    """Return whether an entry begins with quotes that no line's end has closed yet."""
    opening = _OPENING.match(entry)
    return opening is not None and not entry[opening.end() :].rstrip().endswith(QUOTES)


def unquoted(text: str) -> str:
    """Return a text without blanks around it and without its quotes."""
    text = text.strip()
    if not text.startswith(QUOTES):
        return text
    return text.removeprefix(QUOTES).removesuffix(QUOTES).strip("\n")


def joined(lines: Iterable[str]) -> Iterator[str]:
    """Yield lines, those between quotes as one entry. The end closes quotes."""
    entry = ""
    for line in lines:
        entry += line
        if not is_open(entry):
            yield entry
            entry = ""
    if entry:
        yield entry


def _typed() -> Iterator[str]:
    """Yield entries until Ctrl-D or two Ctrl-C in a row. The first one clears the line."""
    session = _session()
    print("/help lists the commands", file=sys.stderr)
    interrupted = False
    while True:
        try:
            entry = session.prompt("> ")
        except EOFError:
            return
        except KeyboardInterrupt:
            if interrupted:
                return
            interrupted = True
            print("(Ctrl-C again, Ctrl-D or /bye leaves)", file=sys.stderr)
            continue
        interrupted = False
        yield entry


def _session() -> PromptSession[str]:
    from prompt_toolkit import PromptSession  # imported late: a pipe does not need it
    from prompt_toolkit.filters import Condition
    from prompt_toolkit.output import create_output

    session: PromptSession[str] = PromptSession(
        history=_history(cache_dir() / "chat-history"),
        multiline=Condition(lambda: is_open(session.default_buffer.text)),
        prompt_continuation=". ",
        enable_suspend=True,
        output=create_output(always_prefer_tty=True),  # standard output may be a pipe
    )
    return session


def _history(path: Path) -> History:
    """Return earlier entries: of a file that only its owner can read, or none where there can be no
    file."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError:
        return InMemoryHistory()

    class ChatHistory(FileHistory):
        """A history that goes on where its file cannot, as on a full disk."""

        def store_string(self, string: str) -> None:
            """Append an entry to the file, if that can be."""
            with suppress(OSError):
                super().store_string(string)

    return ChatHistory(str(path))
