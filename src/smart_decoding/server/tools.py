"""Tools: their form in requests, their description for the model, and the grammar of calls.

All models call in one form, Hermes', on which Qwen2.5 and Qwen3 were trained:

    <tool_call>
    {"name": "f", "arguments": {...}}
    </tool_call>

A chat template that explains this form is given the tools; for any other, a plain text goes into
the system message.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from smart_decoding.models.text.grammar_source import json_grammar
from smart_decoding.server.body import Body, Text, check_json

Json = dict[str, Any]
OPENING = "<tool_call>"
CLOSING = "}\n</tool_call>"
MAX_CALLS = 16  # in one answer
MAX_TOOLS = 128  # in one request
_NOTHING: Json = {"type": "object", "properties": {}, "additionalProperties": False}
_EXPLANATION = """You can call functions. These are described in JSON, one a line:
{tools}

To call a function, answer in this form, once for each call:
<tool_call>
{{"name": <name of the function>, "arguments": <arguments as a JSON object>}}
</tool_call>"""


class Function(Body):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: Text | None = None
    parameters: Json | None = Field(
        None, description="A JSON schema of an object; none without it."
    )
    strict: bool | None = Field(
        None, description="Whether keywords of the schema that cannot be kept to are refused."
    )

    @model_validator(mode="after")
    def _takes_an_object(self) -> Function:
        if (self.parameters or {}).get("type", "object") != "object":
            raise ValueError("parameters must be the schema of an object")
        check_json(self.parameters)
        return self

    @property
    def takes(self) -> str:
        """The schema of its arguments, in a grammar's form. Unless it is strict, unsupported
        keywords are left out: agents offer tools with any schema, and call few of them."""
        schema = _NOTHING if self.parameters is None else {"type": "object", **self.parameters}
        return json_grammar(schema, lenient=not self.strict)


class Tool(Body):
    """A function, as a request offers it."""

    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    """A function that must be called."""

    name: Text


class NamedTool(Body):
    """`tool_choice` with a name."""

    type: Literal["function"]
    function: NamedFunction


class CalledFunction(Body):
    """A call in an earlier answer."""

    name: Text
    arguments: Text = Field(description="A JSON object, as text; as far as it came.")

    def parsed(self) -> Json | str:
        """Return the arguments: an object, or their text if it is none, as in an answer that was
        cut. Agents send answers back unchanged."""
        try:
            found = json.loads(self.arguments.strip() or "{}")
            check_json(found)
        except (ValueError, RecursionError):
            return self.arguments
        return found if isinstance(found, dict) else self.arguments


class ToolCall(Body):
    """A call with its id."""

    id: Text
    type: Literal["function"]
    function: CalledFunction

    def plain(self) -> Json:
        """Return the call for chat templates: whole arguments are an object."""
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": self.function.name, "arguments": self.function.parsed()},
        }


@dataclass(frozen=True, slots=True)
class Offer:
    """The tools that the model may call. must: it has to call; many: more than once."""

    tools: Sequence[Tool]
    must: bool
    many: bool

    def grammar(self, schema: Json | None) -> str:
        """Return Lark for calls and, unless they are a must, for text instead of or before them.

        schema: of a JSON text, which then stands instead of calls, not before them."""
        more = f'("\\n{OPENING}" body){{0,{MAX_CALLS - 1}}}' if self.many else ""
        functions = " | ".join(
            f'{json.dumps(json.dumps(tool.function.name) + ", ")} "\\"arguments\\": " %json '
            + tool.function.takes
            for tool in self.tools
        )
        body = f'body: "\\n{{\\"name\\": " ({functions}) {json.dumps(CLOSING)}\n'
        if self.must:
            return f'start: "{OPENING}" body {more}\n{body}'
        if schema is not None:
            start = f'start: answer | "{OPENING}" body {more}\n'
            return f"{start}answer: %json {json_grammar(schema)}\n{body}"
        start = f"start: TEXT | opening body {more}\nTEXT: /(.|\\n)*/\n"
        return f'{start}opening[lazy]: TEXT "{OPENING}"\n{body}'


def speaks_our_form(template: str | None) -> bool:
    """Return whether a chat template itself describes tools in the form that is parsed here."""
    return (
        template is not None
        and "tools" in template
        and OPENING in template
        and "<function=" not in template
    )


def explained(messages: Sequence[Mapping[str, Any]], tools: Sequence[Json]) -> list[Json]:
    """Return the conversation for a template without tools: tools, calls and results become plain
    text."""
    plain = _as_texts(messages)
    if not tools:
        return plain
    text = _EXPLANATION.format(
        tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    )
    if plain and plain[0]["role"] == "system":
        return [{**plain[0], "content": f"{plain[0]['content']}\n\n{text}"}, *plain[1:]]
    return [{"role": "system", "content": text}, *plain]


def _as_texts(messages: Sequence[Mapping[str, Any]]) -> list[Json]:
    """Join results of tools and the user's next message into one turn: many templates require
    alternating turns."""
    texts: list[Json] = []
    before = ""
    for message in messages:
        text = _as_text(message)
        if before == "tool" and text["role"] == "user":
            text["content"] = f"{texts.pop()['content']}\n{text['content']}"
        texts.append(text)
        before = message["role"]
    return texts


def _as_text(message: Mapping[str, Any]) -> Json:
    if message["role"] == "tool":
        return {
            "role": "user",
            "content": f"<tool_response>\n{message['content']}\n</tool_response>",
        }
    calls = [
        f"{OPENING}\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>"
        for call in message.get("tool_calls", ())
    ]
    content = "\n".join(filter(None, [message.get("content"), *calls]))
    return {key: value for key, value in message.items() if key != "tool_calls"} | {
        "content": content
    }
