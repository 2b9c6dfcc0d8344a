"""uvicorn's HTTP/1.1 for strangers: clients with late heads, or that do not read, are cut off."""

from __future__ import annotations

import asyncio
import json
import math
from http import HTTPStatus
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from smart_decoding.server.errors import ApiError
from smart_decoding.server.settings import network_of

MAX_HEAD = 64 * 1024  # bytes
STALLED = 60.0  # seconds in which a client has read nothing of its response


class Connection(H11Protocol):
    """One connection.

    head_timeout: seconds for a request's head, from the connection's or its first byte on;
    max_connections: open at a time; one address may have half of them. Beyond, the address with the
    most connections, if it has more than the newcomer's, loses its oldest idle one. Without an idle
    connection the newcomer gets a 503.
    """

    def __init__(self, *args: Any, head_timeout: float, max_connections: int, **named: Any) -> None:
        super().__init__(*args, **named)
        self._head_timeout = head_timeout
        self._max_connections = max_connections
        self.network = ""
        self._opened = 0.0
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Refuse a new client, or wait for its first request."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # any unsent byte starts the stall timer
        self.network = network_of(self.client[0]) if self.client else ""
        self._opened = self.loop.time()
        if self._has_room():
            self._watch()
        else:
            self._refuse(_too_many())

    def _has_room(self) -> bool:
        """Return whether this connection may stay, if need be in place of an idle one."""
        of_each: dict[str, list[Connection]] = {}
        for each in cast("set[Connection]", self.connections):
            if not each.transport.is_closing():
                of_each.setdefault(each.network, []).append(each)
        most = self._max_connections
        mine = of_each[self.network]
        crowds = [mine]
        if len(mine) <= (most + 1) // 2:
            if sum(map(len, of_each.values())) <= most:
                return True
            crowds += [each for each in of_each.values() if len(each) > len(mine)]
        idle = [
            (-len(crowd), each._opened, each)
            for crowd in crowds
            for each in crowd
            if each.idle and each is not self
        ]
        if idle:
            min(idle, key=lambda found: found[:2])[2]._make_room()
        return bool(idle)

    @property
    def idle(self) -> bool:
        """Whether no request is being answered: none has come whole."""
        return self.cycle is None or self.cycle.response_complete

    def _make_room(self) -> None:
        """Close; a client without an answer so far gets the reason."""
        if self.cycle is None:
            self._refuse(_too_many())
        else:
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        """Take a part of a request."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        for timer in (self._head_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Start the timer of a client that does not read."""
        super().pause_writing()
        if self._stall_timer is None:
            self._watch_reader(math.inf)

    def _watch_reader(self, unsent: float) -> None:
        """Cut off a client that has read nothing since `unsent` bytes were left; else look again
        later."""
        left = self.transport.get_write_buffer_size()
        if left >= unsent:
            self.transport.abort()
        else:
            self._stall_timer = self.loop.call_later(STALLED, self._watch_reader, left)

    def resume_writing(self) -> None:
        """Stop the timer of a client that reads again."""
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def send_400_response(self, msg: str) -> None:
        """Refuse other protocols than HTTP, in the shape of all other errors."""
        self._refuse(ApiError(400, msg, "invalid_http"))

    def _watch(self) -> None:
        """Run the timer of the head while no request is being answered."""
        if not self.idle:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None
        elif self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(self._head_timeout, self._head_is_late)

    def _head_is_late(self) -> None:
        self._refuse(ApiError(408, f"the request's head took longer than {self._head_timeout:g} s"))

    def _refuse(self, error: ApiError) -> None:
        """Send an error, if nothing was sent yet, and close."""
        cycle = self.cycle
        begun = cycle is not None and cycle.response_started and not cycle.response_complete
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


def _too_many() -> ApiError:
    message = "too many connections are open: try again later"
    return ApiError(503, message, "too_many_connections")
