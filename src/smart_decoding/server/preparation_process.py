"""The preparation process: `python -m smart_decoding.server.preparation_process`.

The process renders chat templates, tokenises and tries grammars: work that a stranger's input can
make slow or large. It loads the tokenizer once, and forks children, which do one task after
another. The operating system bounds a child's time and memory, in native code, too: a child that
exceeds a bound dies alone. The tokenizer comes first on standard input, a socket, and then a
message with a socket for each child. On that the child gets tasks, each with its limits, and sends
the answers; its parent sends how the child has ended.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import socket
import struct
import traceback
from collections.abc import Iterator, Mapping, Sequence
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

HEAD = struct.Struct(">I")  # of a frame: its length
LIMITS = struct.Struct(">II")  # of the next task: milliseconds of a processor, and of the clock
NICENESS = struct.Struct(">i")  # of a child
READY = b"\0"  # comes when the tokenizer is loaded
LARGEST = 16 * 2**20  # bytes of an answer
_WARM_UP = 0.5  # seconds of a processor to compile the chat template; a usual one takes 0.02
_ENCODING = ("utf-8", "surrogatepass")


def framed(content: Any) -> bytes:
    """Return the frame of a value as JSON."""
    body = json.dumps(content, ensure_ascii=False).encode(*_ENCODING)
    return HEAD.pack(len(body)) + body


def unframed(body: bytes) -> Any:
    """Return the value of a frame's body."""
    return json.loads(body.decode(*_ENCODING))


class Tasks:
    """The tasks: each method's arguments and result are JSON.

    backend: a tokenizer as its library writes it. options: the other arguments of `Tokenizer`.
    placeholders: see `Conversations`."""

    def __init__(
        self, backend: str, placeholders: Mapping[str, str] | None = None, **options: Any
    ) -> None:
        import_module("jinja2.sandbox")  # not in a task's time
        import_module("jinja2.ext")
        with contextlib.suppress(ConfigError):  # reported for a request with a grammar
            library()
        self._tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(backend), **options)
        self._texts = Conversations(self._tokenizer)
        self._pictures = Conversations(self._tokenizer, placeholders)

    def chat(
        self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], pictures: bool
    ) -> list[list[int]]:
        """Return the tokens of a conversation, as a list of one. variables: see
        `Tokenizer.apply_chat_template`. pictures: whether the model takes pictures."""
        conversations = self._pictures if pictures else self._texts
        tokens, _ = conversations.tokens(messages, **variables)
        return [tokens]

    def encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """Return the tokens of each text."""
        return [self._tokenizer.encode(text, add_special_tokens) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens."""
        return self._tokenizer.decode(ids, False)

    def grammar(self, **params: Any) -> str:
        """Try the grammar of StructuredOutputsParams once; return its source."""
        found: Any = SimpleNamespace(**params)
        return tried(found)

    def warm_up(self) -> None:
        """Compile the chat template."""
        with contextlib.suppress(SmartError):  # reported for a conversation
            self.chat([{"role": "user", "content": "hi"}], {}, False)


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


def main() -> None:
    """Answer until the input ends, which also ends all children."""
    try:
        with socket.socket(fileno=0) as control:
            _answer_all(control)
    except BaseException:  # a panic of native code is no Exception
        traceback.print_exc()
        os._exit(1)


def _answer_all(control: socket.socket) -> None:
    with control.makefile("rb") as stream:
        setup = _read(stream)
    if setup is None:
        return
    tasks = Tasks(**unframed(setup))
    bounds.limit_memory()
    _warm_up(tasks)
    gc.freeze()  # children would copy what they search for garbage
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    control.sendall(READY)
    _fork_all(tasks, control)


def _warm_up(tasks: Tasks) -> None:
    """Compile the chat template for all children, once a child has: it is a stranger's program."""
    child = os.fork()
    if not child:
        with _last():
            bounds.limit_time(_WARM_UP)
            tasks.warm_up()
    if os.waitpid(child, 0)[1] == 0:
        tasks.warm_up()


def _fork_all(tasks: Tasks, control: socket.socket) -> None:
    """Fork children until the input ends. Then end all of them."""
    children: dict[int, socket.socket] = {}

    def reap(*_: object) -> None:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                with children.pop(ended[0]) as connection, contextlib.suppress(OSError):
                    status = os.waitstatus_to_exitcode(ended[1])
                    connection.sendall(framed({"ended": status}))

    signal.signal(signal.SIGCHLD, reap)
    while True:
        niceness, files, *_ = socket.recv_fds(control, NICENESS.size, 1)
        if not files:
            os.killpg(0, signal.SIGKILL)
        connection = socket.socket(fileno=files[0])
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        child = os.fork()
        if not child:
            with _last():
                for other in (control, *children.values()):
                    other.close()
                os.nice(*NICENESS.unpack(niceness))
                _do_all(tasks, connection)
        children[child] = connection
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])


def _do_all(tasks: Tasks, connection: socket.socket) -> None:
    """Do one task after another within its limits, and send the answers."""
    import fcntl  # Windows, which has no such processes, imports this module, too

    fcntl.fcntl(connection, fcntl.F_SETOWN, os.getpid())
    with connection.makefile("rb") as stream:
        while len(limits := stream.read(LIMITS.size)) == LIMITS.size:
            processor, clock = LIMITS.unpack(limits)
            signal.setitimer(signal.ITIMER_REAL, clock / 1000)
            body = _read(stream)
            if body is None:
                return
            fcntl.fcntl(connection, fcntl.F_SETFL, os.O_ASYNC)  # at a hang-up SIGIO ends this
            bounds.limit_time(processor / 1000)
            found = answer(tasks, body)
            bounds.limit_time(0)
            fcntl.fcntl(connection, fcntl.F_SETFL, 0)
            connection.sendall(found)
            signal.setitimer(signal.ITIMER_REAL, 0)


@contextlib.contextmanager
def _last() -> Iterator[None]:
    """Do what is inside as the last thing of this process."""
    status = 1
    try:
        yield
        status = 0
    except MemoryError:
        status = bounds.NO_MEMORY
    finally:
        os._exit(status)


def _read(stream: IO[bytes]) -> bytes | None:
    """Read a frame; return its body, or None at the input's end."""
    head = stream.read(HEAD.size)
    if len(head) < HEAD.size:
        return None
    (length,) = HEAD.unpack(head)
    body = stream.read(length)
    return body if len(body) == length else None


if __name__ == "__main__":
    main()
