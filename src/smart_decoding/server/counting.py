"""Reading of bodies: their values are counted first, as reading cannot be interrupted. Long bodies
take turns."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, Any, get_type_hints

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from smart_decoding.server.errors import ApiError, gone, of_validation

if TYPE_CHECKING:
    from smart_decoding.server.turns import Texts

MAX_VALUES = 200_000  # in a body: numbers, texts, ...
MAX_NAMED = 50_000  # in a body: values that have names, which take ten times as long to read
MAX_NESTED = 10_000  # in a body: objects and lists, which take fifty times as long to check


def check_count(raw: bytes) -> None:
    """Raise ApiError for a JSON body of so many values that reading it would hold up others.

    Counts outside of texts, which may be as long as the body."""
    if _few(raw):
        return
    if b"\0" in raw:  # as in UTF-16, where quotes and commas could not be counted
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
    """A route that counts the values of a body before it reads it. Long bodies take turns, by
    `Texts` in the application's state."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler behind one that reads the body."""
        handle = super().get_route_handler()
        model = get_type_hints(self.endpoint).get("body")

        async def counted(request: Request) -> Response:
            if model is not None:
                _check_type(request)
            try:
                raw = await request.body()
            except ClientDisconnect:
                raise gone() from None
            if model is not None and raw:
                # With this request's own `ignored`, in another thread, too.
                read = partial(copy_context().run, _read, model, raw)
                texts: Texts = request.app.state.texts
                found = await texts.checked(request, read)
                if isinstance(found, ApiError):
                    raise found
                request._json = found  # FastAPI takes a model as it is
            return await handle(request)

        return counted


def _check_type(request: Request) -> None:
    """Raise ApiError for a body whose type is not JSON: web pages may send other types, or none, to
    any address without its consent."""
    content_type = request.headers.get("content-type", "").partition(";")[0]
    if content_type.strip().lower() != "application/json":
        message = "the body is not said to be JSON: send Content-Type: application/json"
        raise ApiError(415, message, "unsupported_media_type")


def _read(model: type[BaseModel], raw: bytes) -> BaseModel | ApiError:
    """Return the model, or the error. A raised error would hold the whole body, for the event loop
    to free."""
    check_count(raw)
    try:
        content = json.loads(raw)
    except json.JSONDecodeError as error:
        return ApiError(400, f"the body is not valid JSON: {error.msg}")
    except (ValueError, RecursionError):
        return ApiError(400, "the body is not valid JSON: no UTF-8, or too deep")
    try:
        return model.model_validate(content)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False)
        return of_validation([{**each, "loc": ("body", *each["loc"])} for each in errors])
