"""uvicorn's HTTP/1.1 with a time limit for heads, and as many connections as there are files."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from http import HTTPStatus
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from smart_decoding.errors import ConfigError
from smart_decoding.server.errors import ApiError

log = logging.getLogger("smart.server")
SPARE = 160  # files for all but connections: models, caches, and connections that are closed soon


class Connection(H11Protocol):
    """One connection.

    uvicorn's `timeout_keep_alive` also bounds the seconds until a request's head has come whole.
    max_connections: open at a time; beyond, a newcomer takes the place of the oldest idle one.
    Without an idle connection the newcomer gets a 503."""

    def __init__(self, *args: Any, max_connections: int, **named: Any) -> None:
        super().__init__(*args, **named)
        self._max_connections = max_connections
        self._opened = self.loop.time()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request, if need be in place of an idle connection."""
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )
        stay = [
            each
            for each in cast("set[Connection]", self.connections)
            if not each.transport.is_closing()
        ]
        if len(stay) > self._max_connections:
            idle = (each for each in stay if each.idle and each is not self)
            message = "too many connections are open: try again later"
            error = ApiError(503, message, "too_many_connections")
            min(idle, key=lambda each: each._opened, default=self)._give_up(error)

    @property
    def idle(self) -> bool:
        """Whether no request is being answered: none has come whole."""
        return self.cycle is None or self.cycle.response_complete

    def data_received(self, data: bytes) -> None:
        """Take a part of a request. uvicorn's own would stop the timer at a part of a head."""
        self.conn.receive_data(data)
        self.handle_events()

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection without a request."""
        limit = self.timeout_keep_alive
        self._give_up(ApiError(408, f"the request's head took longer than {limit:g} s"))

    def send_400_response(self, msg: str) -> None:
        """Refuse other protocols than HTTP, in the shape of all other errors."""
        self._refuse(ApiError(400, msg, "invalid_http"))

    def _give_up(self, error: ApiError) -> None:
        """Close; a client without an answer so far gets the reason."""
        if self.cycle is None:
            self._refuse(error)
        else:
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        """Send an error, if nothing was sent yet, and close."""
        begun = not self.idle and self.cycle.response_started
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE, h11.ERROR) and not begun:
            body = json.dumps(error.body).encode()
            lines = [
                f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}",
                "content-type: application/json",
                f"content-length: {len(body)}",
                "connection: close",
                *(f"{name}: {value}" for name, value in error.headers.items()),
            ]
            self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self.transport.close()


def allowed_connections(requested: int) -> int:
    """Return how many connections may be open at once, at most `requested`.

    Raises the soft limit of open files to the hard one, as far as needed. Raises ConfigError if
    there is no room for any."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows has no such limit
        return requested
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = requested + SPARE
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return requested
    raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if raised > soft:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
    if soft <= SPARE:
        raise ConfigError(
            f"too many open files: {soft} are allowed, which leaves none for connections: "
            f"allow more, such as ulimit -n {needed}"
        )
    if soft < needed:
        log.warning(
            f"{soft - SPARE} connections at once instead of {requested}: only {soft} files may be "
            f"open; ulimit -n {needed} allows all"
        )
    return min(requested, soft - SPARE)
