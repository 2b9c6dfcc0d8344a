"""The base of all parts of a request body: strict types, and text in whole characters."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def _whole_characters(text: str) -> str:
    """Return the text. Raises ValueError for half of a surrogate pair, which JSON can spell."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it holds a lone surrogate, which is no character") from None
    return text


MAX_DEPTH = 64
MAX_IGNORED = 16  # names in an answer's header
# Names of unknown fields in the request that is being answered.
ignored: ContextVar[set[str]] = ContextVar("ignored")
Token = Annotated[int, Field(ge=0)]
# Of lists: one error is enough, and a body of nulls would make a million.
FAST = Field(fail_fast=True)
Text = Annotated[str, AfterValidator(_whole_characters)]


def check_json(value: Any) -> None:
    """Raise ValueError for JSON that cannot be written out again: too deep, infinite, no text."""
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

    _NEUTRAL: known fields without support, with the values that have no effect; any other value is
    refused.
    """

    model_config = ConfigDict(
        extra="forbid",  # the fields of _NEUTRAL with other values
        strict=True,
        populate_by_name=True,
        json_schema_extra=lambda schema: schema.pop("additionalProperties", None),
    )

    _NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: Any) -> Any:
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
