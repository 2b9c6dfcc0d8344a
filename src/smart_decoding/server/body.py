"""What all parts of a request body share: they are strict, and text is text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def _whole_characters(text: str) -> str:
    """JSON can spell half of a surrogate pair, which is no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it holds a lone surrogate, which is no character") from None
    return text


MAX_DEPTH = 64
Token = Annotated[int, Field(ge=0)]
# Of lists: one error is enough, and a body of nulls would make a million.
FAST = Field(fail_fast=True)
Text = Annotated[str, AfterValidator(_whole_characters)]


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
    """A JSON object without unknown fields.

    _NEUTRAL: values of unsupported fields that change nothing.
    """

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)

    _NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or not cls._NEUTRAL:
            return data
        return {k: v for k, v in data.items() if k not in cls._NEUTRAL or v not in cls._NEUTRAL[k]}
