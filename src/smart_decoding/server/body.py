"""What all parts of a request body share: they are strict, and text is text."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Coroutine, Mapping
from contextvars import ContextVar
from typing import Annotated, Any, ClassVar

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from starlette.requests import ClientDisconnect

from smart_decoding.server.errors import ApiError


def _whole_characters(text: str) -> str:
    """JSON can spell half of a surrogate pair, which is no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it holds a lone surrogate, which is no character") from None
    return text


MAX_DEPTH = 64
MAX_VALUES = 200_000  # in a body: numbers, texts, ...
MAX_NESTED = 10_000  # in a body: objects and lists, which take fifty times as long to check
MAX_IGNORED = 16  # names that an answer's header tells of
# Of the request that is being answered: the names of fields that nobody knows.
ignored: ContextVar[set[str]] = ContextVar("ignored")
Token = Annotated[int, Field(ge=0)]
# Of lists: one error is enough, and a body of nulls would make a million.
FAST = Field(fail_fast=True)
Text = Annotated[str, AfterValidator(_whole_characters)]


def check_count(raw: bytes) -> None:
    """Raises ApiError for a JSON body of so many values that reading it would hold up others.

    Counts outside of texts, which may be as long as the body."""
    if raw.count(b",") < MAX_VALUES and raw.count(b"[") + raw.count(b"{") <= MAX_NESTED:
        return
    if b"\0" in raw:  # as in UTF-16, whose texts could not be told from the rest
        raise ApiError(400, "the body is not UTF-8")
    plain = raw.replace(rb"\\", b"").replace(rb"\"", b"")
    if plain.count(b'"') <= 2 * MAX_VALUES:
        outside = b"".join(plain.split(b'"')[::2])
        nested = outside.count(b"[") + outside.count(b"{")
        if nested <= MAX_NESTED and outside.count(b",") < MAX_VALUES:
            return
    most = f"{MAX_VALUES} values or {MAX_NESTED} objects and lists"
    raise ApiError(400, f"the body holds more than {most}: send fewer at a time")


class CountedRoute(APIRoute):
    """A route whose bodies are counted before they are read: reading cannot be interrupted."""

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


def check_json(value: Any) -> None:
    """Raises ValueError for JSON that cannot be written out again: too deep, infinite, no text."""
    level = [value]
    depth = 0
    while level:
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        below = [
            each.values() if isinstance(each, dict) else each
            for each in level
            if isinstance(each, dict | list)
        ]
        level = [child for children in below for child in children]
        depth += 1
    _whole_characters(json.dumps(value, ensure_ascii=False, allow_nan=False))


class Body(BaseModel):
    """A JSON object. Unknown fields are left out and noted in `ignored`.

    _NEUTRAL: fields that are known and not supported, with the values that ask for nothing; any
    other value is refused.
    """

    model_config = ConfigDict(
        extra="forbid",  # of what is left then: names in _NEUTRAL
        strict=True,
        populate_by_name=True,
        json_schema_extra=lambda schema: schema.pop("additionalProperties", None),
    )

    _NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        known = _names(cls)
        if data.keys() <= known:
            return data
        unknown = data.keys() - known - cls._NEUTRAL.keys()
        noted = ignored.get(set())
        noted.update(list(unknown)[: MAX_IGNORED - len(noted)])
        return {
            name: value
            for name, value in data.items()
            if name in known or (name not in unknown and value not in cls._NEUTRAL[name])
        }


@functools.cache
def _names(body: type[Body]) -> frozenset[str]:
    fields = body.model_fields.items()
    return frozenset(name for key, field in fields for name in (key, field.alias) if name)
