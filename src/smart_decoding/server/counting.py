"""How much a body holds, before it is read: reading cannot be interrupted."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from smart_decoding.server.errors import ApiError

MAX_VALUES = 200_000  # in a body: numbers, texts, ...
MAX_NAMED = 50_000  # in a body: values that have names, which take ten times as long to read
MAX_NESTED = 10_000  # in a body: objects and lists, which take fifty times as long to check


def check_count(raw: bytes) -> None:
    """Raises ApiError for a JSON body of so many values that reading it would hold up others.

    Counts outside of texts, which may be as long as the body."""
    if _few(raw):
        return
    if b"\0" in raw:  # as in UTF-16, whose texts could not be told from the rest
        raise ApiError(400, "the body is not UTF-8")
    plain = raw.replace(rb"\\", b"").replace(rb"\"", b"")
    if plain.count(b'"') <= 2 * MAX_VALUES and _few(b"".join(plain.split(b'"')[::2])):
        return
    most = f"{MAX_VALUES} values, {MAX_NAMED} named ones or {MAX_NESTED} objects and lists"
    raise ApiError(400, f"the body holds more than {most}: send fewer at a time")


def _few(raw: bytes) -> bool:
    nested = raw.count(b"[") + raw.count(b"{")
    named = raw.count(b":")
    return raw.count(b",") < MAX_VALUES and named <= MAX_NAMED and nested <= MAX_NESTED


class CountedRoute(APIRoute):
    """A route whose bodies are counted before they are read."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's, behind the count."""
        handle = super().get_route_handler()

        async def counted(request: Request) -> Response:
            try:
                check_count(await request.body())
            except ClientDisconnect:
                raise ApiError(499, "the client has gone") from None
            return await handle(request)

        return counted
