"""Run the application under uvicorn, until a signal or a model that cannot be loaded ends it."""

from __future__ import annotations

import asyncio
import functools
import gc
import json
import logging
import math
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import uvicorn

from smart_decoding.errors import ConfigError, SmartError
from smart_decoding.server.app import create_app
from smart_decoding.server.connections import Connection, allowed_connections
from smart_decoding.server.live import Live
from smart_decoding.server.metrics import Metrics
from smart_decoding.server.tracebacks import traced
from smart_decoding.server.worker import Worker

if TYPE_CHECKING:
    from types import FrameType

    from smart_decoding.llm import LLM
    from smart_decoding.server.settings import ServerSettings

log = logging.getLogger("smart.server")
MAX_HEAD = 64 * 1024  # bytes of a request
# Connections accepted in one turn of the event loop. Refused ones are closed some turns later, and
# those under way must leave files for others.
AT_ONCE = 16
BACKLOG = 2048  # connections that wait to be accepted
STALLED = 60.0  # seconds after which a client that reads nothing is cut off
READING = 1.0  # seconds at the end for clients to read it
# Seconds after which a thread that runs Python yields to another. A round may wait for so long, and
# so may every step of an answer about health.
SWITCH = 0.001
_EXTRA = ("request_id", "status", "seconds", "model", "speculation", "address")
# Characters that a terminal obeys, or that end or reverse a line there.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def _harmless(text: str) -> str:
    """Return the text with its control characters spelled out."""
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class JsonLines(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, and what the record adds."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{when}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update({name: record.__dict__[name] for name in _EXTRA if name in record.__dict__})
        if record.exc_info and record.exc_info[1] is not None:
            line["exception"] = traced(record.exc_info[1])
        return _harmless(json.dumps(line, ensure_ascii=False))


class Lines(logging.Formatter):
    """A line for a terminal: time, message, and how long it took or what drafts."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """Return the line, without a traceback."""
        if record.levelno > logging.INFO:
            record.message = f"{record.levelname.lower()}: {record.message}"
        seconds = record.__dict__.get("seconds")
        more = record.__dict__.get("speculation") if seconds is None else f"{seconds:.2f} s"
        return _harmless(super().formatMessage(record) + (f", {more}" if more else ""))

    def formatException(self, ei: Any) -> str:  # noqa: N802
        """Return the traceback, indented."""
        if ei[1] is None:  # logged outside of an except
            return ""
        return "\n".join(f"  {_harmless(line)}" for line in traced(ei[1]).split("\n"))


class Server(uvicorn.Server):
    """uvicorn that ends within a deadline: running requests then get an error, and clients that do
    not read it are cut off. uvicorn itself would break their streams, with tracebacks."""

    def __init__(self, config: uvicorn.Config, worker: Worker) -> None:
        super().__init__(config)
        self._worker = worker
        self._timeout = worker.settings.shutdown_timeout

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End as uvicorn does, but at once at a second SIGINT: uvicorn would cancel each request
        with a 500 and a traceback."""
        if sig == signal.SIGINT and self._captured_signals:
            os._exit(128 + sig)
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start as uvicorn does."""
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(BACKLOG)  # few are accepted at once, and many may wait for that

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop as uvicorn does, within the deadline."""
        log.info(f"stopping: {self._worker.active} answers have {self._timeout:g} s to end")
        self._worker.drain()  # endless streams must not hold it up
        later = asyncio.get_running_loop().call_later
        later(self._timeout, self._worker.stop, 0.0)
        later(self._timeout + READING, self._cut_off)
        await super().shutdown(sockets)

    def _cut_off(self) -> None:
        for connection in self.server_state.connections:
            connection.transport.abort()


def set_up_logging(level: str) -> None:
    """Log to standard error, for our loggers and uvicorn's: JSON lines, or text on a terminal."""
    handler = logging.StreamHandler()
    handler.setFormatter(Lines() if sys.stderr.isatty() else JsonLines())
    logging.getLogger().handlers = [handler]  # for asyncio and all other libraries
    for name in ("smart", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(level.upper())
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, logging.getLogger("smart").level))


def make_server(load: Callable[[], LLM], settings: ServerSettings) -> tuple[Server, Worker]:
    """Return a server that has not been started."""
    metrics = Metrics(settings.model_name)
    live = Live(settings.model_name)
    worker = Worker(load, settings, (metrics, live))
    metrics.shared = worker.gauges
    most = allowed_connections(settings.max_connections)
    config = uvicorn.Config(
        create_app(worker, metrics, live),
        log_config=None,
        access_log=False,
        loop="asyncio",
        backlog=AT_ONCE,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=cast(int, settings.head_timeout),  # it may be a fraction
        # later than our own deadline
        timeout_graceful_shutdown=math.ceil(settings.shutdown_timeout + 2 * READING),
        lifespan="on",
        ws="none",
        http=cast(type[Connection], functools.partial(Connection, max_connections=most)),
        h11_max_incomplete_event_size=MAX_HEAD,
    )
    server = Server(config, worker)
    worker.failed = functools.partial(setattr, server, "should_exit", True)
    return server, worker


def serve(load: Callable[[], LLM], settings: ServerSettings) -> int:
    """Serve until SIGINT or SIGTERM; running answers then have until the deadline to end.

    Raises ConfigError for an address that cannot be had, SmartError or OSError if the model cannot
    be loaded."""
    set_up_logging(settings.log_level)

    def loaded() -> LLM:
        return _settled(load())

    server, worker = make_server(loaded, settings)
    with bind(settings.host, settings.port) as listener:
        host, port = listener.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        log.info(f"listening on {url}")
        if sys.stderr.isatty():
            print(welcome(settings, url), file=sys.stderr, flush=True)
        server.run(sockets=[listener])
    if isinstance(worker.error, SmartError | OSError):
        raise worker.error
    return 1 if worker.error is not None else 0


def welcome(settings: ServerSettings, url: str) -> str:
    """Return a short guide to the server, for people. url: where it listens."""
    url = url.replace("//0.0.0.0:", "//localhost:").replace("//[::]:", "//localhost:")
    key = " -H 'Authorization: Bearer KEY'" if settings.api_keys else ""
    message = {"role": "user", "content": "Count from 1 to 20."}
    body = json.dumps({"model": settings.model_name, "messages": [message]}, ensure_ascii=False)
    quoted = body.replace("'", "'\\''")
    return f"""
  page      {url}/  (ask there, and watch; also while the model loads)
  API       {url}/v1  (OpenAI's; metrics at {url}/metrics)
  example   curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' \\
              -d '{quoted}'
  end       Ctrl-C
"""


def _settled(llm: LLM) -> LLM:
    """Set up Python for a server. Loaded objects stay: searching them for garbage again would hold
    up rounds."""
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(SWITCH)
    return llm


def bind(host: str, port: int) -> socket.socket:
    """Return a bound socket, taken before the model is loaded. Raises ConfigError if it is not
    free."""
    listener = None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        family, kind, protocol, _, address = found
        # asyncio sets TCP_NODELAY only where the protocol is given
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux has it
            stalled = round(1000 * STALLED)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, stalled)
        listener.bind(address)
    except (OSError, UnicodeError) as error:  # a name may be no name at all
        if listener is not None:
            listener.close()
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot listen on {host} port {port}: {reason}") from error
    return listener
