"""Required forms of the text: `response_format` (OpenAI's) and `structured_outputs` (vLLM's)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from smart_decoding.engine.structured import StructuredOutputsParams
from smart_decoding.server.body import FAST, Body, Text, check_json


class PlainFormat(Body):
    """Any text, or any JSON object."""

    type: Literal["text", "json_object"]


class NamedSchema(Body):
    """A JSON schema."""

    name: Annotated[Text, Field(min_length=1, max_length=64)]
    description: Text | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(None, description="The schema is kept to in any case.")

    @model_validator(mode="after")
    def _can_be_written_out(self) -> NamedSchema:
        check_json(self.schema_)
        return self


class JsonSchemaFormat(Body):
    """JSON under a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[PlainFormat | JsonSchemaFormat, Field(discriminator="type")]


def schema_of(response_format: PlainFormat | JsonSchemaFormat | None) -> dict[str, Any] | None:
    """Return the JSON schema that a response format means, or None for plain text."""
    if isinstance(response_format, JsonSchemaFormat):
        return response_format.json_schema.schema_
    is_object = response_format is not None and response_format.type == "json_object"
    return {"type": "object"} if is_object else None


class StructuredOutputs(Body):
    """Exactly one of these."""

    json_: str | dict[str, Any] | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: Text | None = None
    choice: Annotated[list[Text], FAST] | None = None
    grammar: Text | None = Field(
        None, description="In llguidance's dialect of Lark, from `start`; or GBNF, from `root`."
    )

    _NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "disable_additional_properties": (None, False),
        "disable_any_whitespace": (None, False),
        "structural_tag": (None,),
        "whitespace_pattern": (None,),
    }

    def params(self) -> StructuredOutputsParams:
        """Return the engine's parameters. Raises ConfigError."""
        return StructuredOutputsParams(
            self.json_, self.json_object, self.regex, self.choice, self.grammar
        )
