"""The gate of every request: id, API key, host, the body's size and pace; and the log."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import time
import uuid
from collections import Counter
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from smart_decoding.server.body import ignored
from smart_decoding.server.errors import ApiError
from smart_decoding.server.settings import ServerSettings, is_loopback, network_of

log = logging.getLogger("smart.access")

# Served without a key: they hold nothing of any client. HEAD is answered as GET is.
OPEN = ("/", "/health", "/health/live", "/version", "/openapi.json")
PAGE = "/page/"  # what lies below it, too
LARGEST = 16  # largest bodies that one client's requests may hold, or as many bytes
WARNINGS = 64  # different ones that are logged: each has 2,000 characters at most
OF_ALL = 4  # clients that may hold so many at once
_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
_VIEWER = re.compile(r"[\w-]{16,64}", re.ASCII)  # too long to be guessed


@dataclass(slots=True)
class _Body:
    """The part of a request's body that has arrived. size: bytes."""

    size: int = 0


class Gate:
    """Plain ASGI: nothing is buffered, and streams stay streams."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self.app = app
        self.settings = settings
        self._keys = [key.encode() for key in settings.api_keys]
        self._held: Counter[str] = Counter()  # bytes of bodies, whole or not, by client
        self._warnings: set[str] = set()  # logged ones

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or pass on one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        own_id = headers.get("x-request-id", "")
        request_id = own_id if _ID.fullmatch(own_id) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        state["client"] = self._client(scope, headers)
        state["viewer"] = self._viewer(state["client"], headers)
        started = time.monotonic()
        status = 0
        unknown: set[str] = set()
        ignored.set(unknown)
        body = _Body()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                sent = MutableHeaders(scope=message)
                sent["x-request-id"] = request_id
                if unknown:
                    sent["warning"] = f'299 - "{self._told(unknown, request_id)}"'
            await send(message)

        try:
            refusal = self._refusal(scope["path"], headers, state["client"])
            if refusal is not None:
                await refusal.response(scope, receive, send_with_id)
            else:
                if scope["method"] == "HEAD" and _is_read(scope["path"]):
                    scope = {**scope, "method": "GET"}  # the server leaves out the body
                await self.app(scope, self._limited(receive, state["client"], body), send_with_id)
        finally:
            self._held[state["client"]] -= body.size
            self._held += Counter()  # without clients that hold none any more
            _log_access(scope, request_id, status, time.monotonic() - started)

    def _client(self, scope: Scope, headers: Headers) -> str:
        """Return the client that takes turns with others: the number of its key, or without keys
        its address, of IPv6 the /64. Empty without a valid key."""
        if self._keys:
            return self._fitting_key(headers.get("authorization", ""))
        address = scope.get("client")
        return network_of(address[0]) if address else "unknown"

    def _viewer(self, client: str, headers: Headers) -> str:
        """Return who may see a request's text on the live page: its client, if that is one user.
        Of users that share an address it is the holder of the request's token; empty for nobody."""
        if self._keys or self.settings.local_names_only:
            return client
        viewer = headers.get("x-viewer", "")
        return viewer if _VIEWER.fullmatch(viewer) else ""

    def _refusal(self, path: str, headers: Headers, client: str) -> ApiError | None:
        if self.settings.local_names_only and not is_loopback(_host_of(headers.get("host", ""))):
            return ApiError(
                403, "only localhost is served here: set an API key or start with --no-api-key"
            )
        if not client and not _is_open(path):
            return ApiError(
                401, "no valid API key in the header 'Authorization: Bearer KEY'", "invalid_api_key"
            )
        if "content-length" in headers and "transfer-encoding" in headers:
            message = "Content-Length and Transfer-Encoding contradict each other: send one"
            refusal = ApiError(400, message, "invalid_http")
            refusal.headers["Connection"] = "close"  # who knows where the next request begins
            return refusal
        length = headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length) > self.settings.max_body:
            return self._too_big()
        return None

    def _fitting_key(self, authorization: str) -> str:
        scheme, _, token = authorization.partition(" ")
        key = token.strip().encode("utf-8", "replace")
        # Compare with all keys, always: the time must not show which one fits.
        fits = [hmac.compare_digest(key, each) for each in self._keys]
        good = scheme.lower() == "bearer" and any(fits)
        return f"key {fits.index(True)}" if good else ""

    def _limited(self, receive: Receive, client: str, body: _Body) -> Receive:
        """`receive` that refuses a body too big, too slow in coming, or one too many."""
        complete = False
        deadline = time.monotonic() + self.settings.body_timeout

        async def limited() -> Message:
            nonlocal complete
            if complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                reason = f"the body took longer than {self.settings.body_timeout:g} s"
                raise HTTPException(408, reason) from None
            size = len(message.get("body", b""))
            body.size += size
            self._held[client] += size
            complete = not message.get("more_body", False)
            if body.size > self.settings.max_body:
                raise HTTPException(413, self._too_big().message)
            if size and self._is_full(client):
                reason = "too many bytes of your requests are here: try again later"
                raise ApiError(429, reason, "queue_full")
            return message

        return limited

    def _is_full(self, client: str) -> bool:
        """Return whether a client's requests hold more than its limit, or more than its share while
        all together hold too much."""
        mine = self._held[client]
        most = LARGEST * self.settings.max_body
        room = OF_ALL * most
        full = self._held.total() > room and mine > room // len(self._held)
        return mine > most or full

    def _told(self, unknown: set[str], request_id: str) -> str:
        """Return the warning of ignored fields. It is logged once: an editor sends the same ones
        with every key."""
        warning = _warning(unknown)
        if warning not in self._warnings and len(self._warnings) < WARNINGS:
            self._warnings.add(warning)
            log.warning(warning, extra={"request_id": request_id})
        return warning

    def _too_big(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self.settings.max_body} bytes")


def _is_open(path: str) -> bool:
    return path in OPEN or path.startswith(PAGE)


def _is_read(path: str) -> bool:
    return _is_open(path) or path in ("/metrics", "/v1/models")


def _warning(unknown: set[str]) -> str:
    """Return what names ignored fields."""
    names = sorted(re.sub(r"[^\w.-]", "?", name, flags=re.ASCII)[:64] for name in unknown)
    return f"unknown fields were ignored: {', '.join(names)}"


def _log_access(scope: Scope, request_id: str, status: int, seconds: float) -> None:
    # Health checks come every second.
    level = logging.DEBUG if scope["path"].startswith("/health") else logging.INFO
    extra = {"request_id": request_id, "status": status, "seconds": round(seconds, 4)}
    log.log(level, f"{scope['method']} {scope['path']} {status}", extra=extra)


def _host_of(header: str) -> str:
    """Return the name in a Host header, without the port."""
    match: Any = re.fullmatch(r"(\[[^\]]*\]|[^:]*)(:\d+)?", header)
    return match[1] if match else ""
