"""The body of /v1/responses, which is read as a chat: messages, tools and limits are the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, PrivateAttr, Tag, ValidationError, model_validator

from smart_decoding.server.body import FAST, Body, Text
from smart_decoding.server.schemas import (
    MAX_LOGPROBS,
    TEMPLATE_FIELDS,
    UNSUPPORTED,
    ChatRequest,
    Sampling,
    TemplateVariables,
)
from smart_decoding.server.structure import NamedSchema, PlainFormat
from smart_decoding.server.tools import MAX_TOOLS, CalledFunction, Function, NamedFunction

Json = dict[str, Any]
LOGPROBS = "message.output_text.logprobs"


class Chat(ChatRequest):
    """The same request as a chat, whose errors name the fields that were sent."""

    prompt_field: ClassVar[str] = "input"

    @property
    def limit_field(self) -> str:
        """The field that says how many tokens may come."""
        return "max_output_tokens"

    @property
    def structured_by(self) -> str:
        """The field with the required form of the text."""
        named = super().structured_by
        return "text" if named == "response_format" else named


class _Item(Body):
    """An item with fields of answers that clients send back, without effect."""

    id: Text | None = None
    status: Text | None = None


class InputText(Body):
    """A text in a message; `output_text` is one of an earlier answer."""

    type: Literal["input_text", "output_text"]
    text: Text
    logprobs: list[Any] | None = Field(None, description="Of an earlier answer, without effect.")

    _NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {"annotations": (None, [])}

    def plain(self) -> Json:
        """Return the same in the form of a chat."""
        return {"type": "text", "text": self.text}


class InputImage(Body):
    """A picture in a message, by its address or data."""

    type: Literal["input_image"]
    image_url: Text
    detail: Literal["auto", "low", "high"] | None = Field(None, description="Changes nothing.")

    _NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {"file_id": (None,)}

    def plain(self) -> Json:
        """Return the same in the form of a chat."""
        return {"type": "image_url", "image_url": {"url": self.image_url}}


InputPart = Annotated[InputText | InputImage, Field(discriminator="type")]


class InputMessage(_Item):
    """One turn of a conversation."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Text | Annotated[list[InputPart], FAST]

    def plain(self) -> Json:
        """Return the same in the form of a chat."""
        content = self.content
        parts = content if isinstance(content, str) else [part.plain() for part in content]
        return {"role": self.role, "content": parts}


class InputCall(_Item, CalledFunction):
    """A call in an earlier answer."""

    type: Literal["function_call"]
    call_id: Text

    def plain(self) -> Json:
        """Return the same in the form of a chat."""
        function = {"name": self.name, "arguments": self.arguments}
        call = {"id": self.call_id, "type": "function", "function": function}
        return {"role": "assistant", "tool_calls": [call]}


class CallOutput(_Item):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: Text
    output: Text | Annotated[list[InputText], FAST]

    def plain(self) -> Json:
        """Return the same in the form of a chat."""
        output = self.output
        text = output if isinstance(output, str) else "\n".join(part.text for part in output)
        return {"role": "tool", "tool_call_id": self.call_id, "content": text}


class InputReasoning(_Item):
    """Reasoning of an earlier answer, which is left out: templates drop it, too."""

    type: Literal["reasoning"]
    summary: list[Any] | None = None
    content: list[Any] | None = None
    encrypted_content: Text | None = None


def _kind(item: Any) -> Any:
    fields = item if isinstance(item, Mapping) else vars(item) if isinstance(item, Body) else {}
    return fields.get("type", "message")


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[CallOutput, Tag("function_call_output")]
    | Annotated[InputReasoning, Tag("reasoning")],
    Discriminator(_kind),
]


class FunctionTool(Function):
    """A function, as a request offers it."""

    type: Literal["function"]

    @model_validator(mode="before")
    @classmethod
    def _is_a_function(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("type") != "function":
            raise ValueError("only tools of the type 'function' are supported")
        return data


class ToolChoiceFunction(NamedFunction):
    """`tool_choice` with a name."""

    type: Literal["function"]


class TextJsonSchema(NamedSchema):
    """JSON under a schema."""

    type: Literal["json_schema"]


class TextConfig(Body):
    """The required form of the text."""

    format: Annotated[PlainFormat | TextJsonSchema, Field(discriminator="type")] | None = None

    def response_format(self) -> Json | None:
        """Return the same in the form of a chat."""
        if not isinstance(self.format, TextJsonSchema):
            return None if self.format is None else {"type": self.format.type}
        schema = self.format.model_dump(exclude={"type"}, exclude_none=True, by_alias=True)
        return {"type": "json_schema", "json_schema": schema}


class Reasoning(Body):
    """How long the model may think, if its template supports that."""

    effort: Text | None = Field(None, description="A variable of the chat template.")
    summary: Text | None = Field(None, description="Changes nothing: answers have no summaries.")

    _NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {"generate_summary": (None,)}


class ResponsesRequest(Sampling):
    """The body of /v1/responses. chat: the same as a chat."""

    input: Text | Annotated[list[InputItem], Field(min_length=1, fail_fast=True)]
    instructions: Text | None = Field(None, description="A system message before the input.")
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    text: TextConfig | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoiceFunction | None = None
    parallel_tool_calls: bool | None = None
    include: list[Text] | None = Field(None, description=f"{LOGPROBS!r}; others have no effect.")
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    metadata: dict[Text, Text] | None = Field(None, description="Comes back with the answer.")
    reasoning: Reasoning | None = None
    chat_template_kwargs: TemplateVariables | None = None

    _NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = (
        UNSUPPORTED
        | TEMPLATE_FIELDS
        | {
            "background": (None, False),
            "conversation": (None,),
            "context_management": (None, []),
            "mm_processor_kwargs": (None, {}),
            "previous_input_messages": (None, []),
            "previous_response_id": (None,),
            "prompt": (None,),
            "truncation": (None, "disabled"),
        }
    )
    _chat: Chat | None = PrivateAttr(None)

    @property
    def chat(self) -> Chat:
        """The same as a chat."""
        assert self._chat is not None
        return self._chat

    def echo(self, defaults: Mapping[str, Any]) -> Json:
        """Return the fields of the request that the answer repeats, with defaults."""
        repeated = {"text", "tool_choice", "tools", "reasoning"}
        as_sent = self.model_dump(include=repeated, by_alias=True, exclude_none=True)
        text = as_sent.get("text", {})
        chosen = self.model_dump(include={"temperature", "top_p"}, exclude_none=True)
        sampling = {"temperature": 1.0, "top_p": 1.0, **defaults, **chosen}
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": as_sent.get("reasoning", {"effort": None, "summary": None}),
            "store": False,
            "temperature": sampling["temperature"],
            "text": {"format": text.get("format", {"type": "text"})},
            "tool_choice": as_sent.get("tool_choice", "auto"),
            "tools": as_sent.get("tools", []),
            "top_logprobs": self.top_logprobs or 0,
            "top_p": sampling["top_p"],
            "truncation": "disabled",
            "user": self.user,
        }

    @model_validator(mode="after")
    def _read_as_chat(self) -> ResponsesRequest:
        if self._chat is not None:  # FastAPI validates a body a second time
            return self
        try:
            self._chat = Chat.model_validate(self._as_chat())
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
        return self

    def _as_chat(self) -> Json:
        sampling = {name: getattr(self, name) for name in Sampling.model_fields}
        with_logprobs = LOGPROBS in (self.include or ())
        choice = self.tool_choice
        if isinstance(choice, ToolChoiceFunction):
            named = {"type": "function", "function": {"name": choice.name}}
        found = {
            **sampling,
            "messages": list(self._messages()),
            "max_completion_tokens": self.max_output_tokens,
            "response_format": self.text and self.text.response_format(),
            "tools": [_nested(tool) for tool in self.tools or ()] or None,
            "tool_choice": named if isinstance(choice, ToolChoiceFunction) else choice,
            "parallel_tool_calls": self.parallel_tool_calls,
            "reasoning_effort": self.reasoning and self.reasoning.effort,
            "chat_template_kwargs": self.chat_template_kwargs,
            "logprobs": with_logprobs or None,
            "top_logprobs": self.top_logprobs if with_logprobs else None,
        }
        return {name: value for name, value in found.items() if value is not None}

    def _messages(self) -> Iterator[Json]:
        """Return the messages of a chat; calls belong to the assistant's message before them."""
        if self.instructions is not None:
            yield {"role": "system", "content": self.instructions}
        if isinstance(self.input, str):
            yield {"role": "user", "content": self.input}
            return
        turn: Json = {}
        for item in self.input:
            if isinstance(item, InputReasoning):
                continue
            message = item.plain()
            if isinstance(item, InputCall) and turn.get("role") == "assistant":
                turn.setdefault("tool_calls", []).extend(message["tool_calls"])
                continue
            if turn:
                yield turn
            turn = message
        if not turn:
            raise ValueError("input: reasoning alone is no conversation")
        yield turn


def _nested(tool: FunctionTool) -> Json:
    function = tool.model_dump(exclude={"type"}, exclude_none=True)
    return {"type": "function", "function": function}
