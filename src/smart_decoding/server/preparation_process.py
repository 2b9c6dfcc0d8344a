"""The preparation process: `python -m smart_decoding.server.preparation_process NICE`.

The process renders chat templates, tokenises and tries grammars: work that a stranger's input can
make slow or large. The operating system bounds its processor time and its memory, in native code,
too. A process that exceeds a bound dies, and `server.preparation` starts another one. The tokenizer
comes first on standard input, then one task after another; answers go to standard output. A frame
is its length, the milliseconds of a processor that its task may take (0: any), and JSON.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import json
import os
import signal
import struct
import sys
import traceback
from array import array
from collections.abc import Mapping, Sequence
from importlib import import_module
from types import SimpleNamespace
from typing import IO, Any

import tokenizers

from smart_decoding.errors import CapacityError, ConfigError, SmartError
from smart_decoding.models.text import bounds
from smart_decoding.models.text.grammar_source import library, tried
from smart_decoding.models.text.tokenizer import Tokenizer
from smart_decoding.multimodal.messages import Conversations
from smart_decoding.server.tracebacks import traced

HEAD = struct.Struct(">II")
LARGEST = 16 * 2**20  # bytes of an answer
_PR_SET_PDEATHSIG = 1
_ENCODING = ("utf-8", "surrogatepass")


def framed(content: Any, milliseconds: int = 0) -> bytes:
    """Return the frame of a value as JSON."""
    body = json.dumps(content, ensure_ascii=False).encode(*_ENCODING)
    return HEAD.pack(len(body), milliseconds) + body


def unframed(body: bytes) -> Any:
    """Return the value of a frame's body."""
    return json.loads(body.decode(*_ENCODING))


def packed(ids: Sequence[int]) -> str:
    """Return token ids as one text, which JSON reads at once."""
    return base64.b64encode(array("i", ids).tobytes()).decode()


def unpacked(text: str) -> list[int]:
    """Return the token ids of `packed`."""
    return array("i", base64.b64decode(text)).tolist()


class Tasks:
    """The tasks: each method's arguments and result are JSON.

    backend: a tokenizer as its library writes it; without one there are grammars only. options: the
    other arguments of `Tokenizer`. placeholders: see `Conversations`."""

    def __init__(
        self,
        backend: str | None = None,
        placeholders: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        import_module("jinja2.sandbox")  # not in a task's time
        import_module("jinja2.ext")
        with contextlib.suppress(ConfigError):  # reported for a request with a grammar
            library()
        if backend is None:
            return
        self._tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(backend), **options)
        self._texts = Conversations(self._tokenizer)
        self._pictures = Conversations(self._tokenizer, placeholders)

    def chat(
        self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], pictures: bool
    ) -> list[str]:
        """Return the tokens of a conversation, as a list of one. variables: see
        `Tokenizer.apply_chat_template`. pictures: whether the model takes pictures."""
        conversations = self._pictures if pictures else self._texts
        tokens, _ = conversations.tokens(messages, **variables)
        return [packed(tokens)]

    def encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[str]:
        """Return the tokens of each text."""
        return [packed(self._tokenizer.encode(text, add_special_tokens)) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens."""
        return self._tokenizer.decode(ids, False)

    def grammar(self, **params: Any) -> str:
        """Try the grammar of StructuredOutputsParams once; return its source."""
        found: Any = SimpleNamespace(**params)
        return tried(found)


def answer(tasks: Tasks, body: bytes) -> bytes:
    """Do the task in a frame's body; return the frame that answers it. The process ends if Python
    has no memory."""
    try:
        task = unframed(body)
        result = getattr(tasks, task.pop("task"))(**task)
        found = framed({"result": result})
        return found if len(found) <= LARGEST else framed({"too_large": len(found)})
    except MemoryError:
        os._exit(bounds.NO_MEMORY)
    except CapacityError as error:
        return framed({"over_capacity": str(error)})
    except SmartError as error:
        return framed({"refused": str(error)})
    except BaseException as error:  # a panic of native code is no Exception
        return framed({"failed": traced(error)})


def _die_with_parent() -> None:
    """Have Linux kill this process with its parent, even during a task. Between tasks, and on other
    systems, the end of the input ends it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _read(stream: IO[bytes]) -> bytes | None:
    """Read a frame and start its task's clock; return its body, or None at the input's end."""
    head = stream.read(HEAD.size)
    if len(head) < HEAD.size:
        return None
    length, milliseconds = HEAD.unpack(head)
    bounds.limit_time(milliseconds / 1000)
    body = stream.read(length)
    return body if len(body) == length else None


def main() -> None:
    """Do tasks until the input ends. A broken limit has an exit status of its own."""
    try:
        _answer_all()
    except MemoryError:
        os._exit(bounds.NO_MEMORY)
    except BaseException:  # a panic of native code is no Exception
        traceback.print_exc()
        os._exit(1)


def _answer_all() -> None:
    _die_with_parent()
    # The answers have a copy of standard output: what libraries print must not get between.
    with open(os.dup(1), "wb", buffering=0) as out, open(0, "rb") as stream:
        os.dup2(2, 1)
        tasks = Tasks(**unframed(_read(stream) or b"{}"))
        bounds.limit_memory()
        os.nice(int(sys.argv[1]))  # only now: a start is never held up by other work
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        ready = framed({})
        while True:
            _write(out, ready)
            body = _read(stream)
            if body is None:
                return
            ready = answer(tasks, body)
            bounds.limit_time(0)


def _write(out: IO[bytes], frame: bytes) -> None:
    left = memoryview(frame)
    while left:
        left = left[out.write(left) :]


if __name__ == "__main__":
    main()
