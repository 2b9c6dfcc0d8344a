"""Request bodies. A field that changes answers elsewhere and is not supported here is refused,
unless its value has no effect. docs/serving.md lists the fields that are accepted without effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, PrivateAttr, model_validator

from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.engine.structured import StructuredOutputsParams
from smart_decoding.server.body import FAST, Body, Text, Token, check_json
from smart_decoding.server.structure import ResponseFormat, StructuredOutputs, schema_of
from smart_decoding.server.tools import MAX_TOOLS, NamedTool, Offer, Tool, ToolCall

MAX_STOPS = 64
MAX_BAD_WORDS = 128
MAX_LOGPROBS = 20
# OpenAI's and vLLM's fields that would change an answer, and values without effect.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "echo": (None, False),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "kv_transfer_params": (None,),
    "length_penalty": (None, 1),
    "logits_processors": (None, []),
    "logprob_token_ids": (None,),
    "priority": (None, 0),
    "prompt_logprobs": (None,),
    "repetition_detection": (None,),
    "return_token_ids": (None, False),
    "return_tokens_as_token_ids": (None, False),
    "spaces_between_special_tokens": (None, True),
    "thinking_token_budget": (None, -1),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": (None, False),
    "vllm_xargs": (None, {}),
    "watermarking": (None, False),
}
# The same of conversations.
TEMPLATE_FIELDS: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (None, True),
    "chat_template": (None,),
    "continue_final_message": (None, False),
}


def _writable(variables: dict[str, Any]) -> dict[str, Any]:
    check_json(variables)
    return variables


# Variables of the chat template, such as Qwen3's enable_thinking.
TemplateVariables = Annotated[dict[str, Any], AfterValidator(_writable)]


class StreamOptions(Body):
    """The content of a stream besides its choices."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(
        None, description="With include_usage: each event holds the token counts so far."
    )


class Sampling(Body):
    """How answers are drawn, the same for every route; null means the default."""

    model: str | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: Text | Annotated[list[Text], Field(max_length=MAX_STOPS)] | None = None
    seed: int | None = None
    logit_bias: dict[str, float] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    user: Text | None = Field(None, description="Names your end user; it goes nowhere.")
    # Beyond OpenAI's, in vLLM's names:
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: Annotated[list[Token], FAST] | None = None
    allowed_token_ids: Annotated[list[Token], FAST] | None = None
    bad_words: Annotated[list[Text], Field(max_length=MAX_BAD_WORDS)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    cache_salt: Annotated[Text, Field(min_length=1)] | None = Field(
        None, description="Cached prefixes are shared by requests of the same salt only."
    )
    speculate: bool | None = Field(
        None, description="false decodes this request plainly; its tokens are the same."
    )

    _NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = UNSUPPORTED

    @model_validator(mode="after")
    def _bias_keys_are_token_ids(self) -> Sampling:
        for token in self.logit_bias or ():
            if not (token.isascii() and token.isdigit() and len(token) < 12):
                raise ValueError(f"logit_bias: {token!r} is not a token id")
        return self


class Completions(Sampling):
    """The fields that completions and chat completions share."""

    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    n_predict: Annotated[int, Field(ge=-1)] | None = Field(
        None, description="llama.cpp's name of max_tokens; -1: to the end of the context."
    )
    n: int | None = None
    response_format: ResponseFormat | None = None

    prompt_field: ClassVar[str]
    usual_limit: ClassVar[int | None] = None  # of an answer's tokens; None: the context's end

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Completions:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed with stream=true")
        return self

    @model_validator(mode="after")
    def _one_structure(self) -> Completions:
        if self.structured_outputs is not None and schema_of(self.response_format) is not None:
            raise ValueError(
                "response_format and structured_outputs exclude each other: give one of them"
            )
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether each event of a stream holds the token counts so far."""
        options = self.stream_options
        return bool(options and options.include_usage and options.continuous_usage_stats)

    @property
    def limit(self) -> int | None:
        """The most tokens of an answer, if the request sets a limit. 0 means 1: to read the prompt
        takes a round, and the round yields a token."""
        if self.n_predict is None:
            return self.max_tokens
        return None if self.n_predict < 0 else max(1, self.n_predict)

    @property
    def limit_field(self) -> str:
        """The field that says so."""
        return "max_tokens" if self.n_predict is None else "n_predict"

    def params(
        self, max_tokens: int | None, logprobs: int | None, defaults: Mapping[str, Any]
    ) -> SamplingParams:
        """Return the engine's parameters. defaults: of fields that the request leaves open. Raises
        ConfigError for a value out of range."""
        names = [
            each.name for each in fields(SamplingParams) if each.name in type(self).model_fields
        ]
        own = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        bias = None
        if self.logit_bias:
            bias = {int(token): value for token, value in self.logit_bias.items()}
        fixed = {
            "max_tokens": max_tokens,
            "logprobs": logprobs,
            "logit_bias": bias,
            "structured_outputs": self.structure(),
        }
        return SamplingParams(**{**defaults, **own, **fixed})

    def structure(self) -> StructuredOutputsParams | None:
        """Return the required form of the text, if any. Raises ConfigError."""
        if self.structured_outputs is not None:
            return self.structured_outputs.params()
        schema = schema_of(self.response_format)
        return None if schema is None else StructuredOutputsParams(json=schema)

    @property
    def structured_by(self) -> str:
        """The field with the required form of the text."""
        return "structured_outputs" if self.structured_outputs is not None else "response_format"


class CompletionRequest(Completions):
    """The body of /v1/completions."""

    prompt_field: ClassVar[str] = "prompt"
    usual_limit: ClassVar[int | None] = 16  # OpenAI's
    _NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = UNSUPPORTED | {
        "add_special_tokens": (None, True),
        "prompt_embeds": (None,),
    }

    prompt: (
        Text
        | Annotated[list[Text], FAST]
        | Annotated[list[Token], FAST]
        | Annotated[list[Annotated[list[Token], FAST]], FAST]
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    suffix: Text | None = Field(
        None, description="The text behind the answer, for models that fill in."
    )


class ExtraText(Body):
    """A text beside the one with the gap, such as another file."""

    text: Text
    filename: Text = "tmp"
    time: Any = Field(None, description="Changes nothing. Vim's has two numbers.")


class InfillRequest(Completions):
    """The body of /infill, as llama.cpp has it."""

    prompt_field: ClassVar[str] = "input_prefix"
    _NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = UNSUPPORTED | {"logprobs": (None, False)}

    input_prefix: Text = ""
    input_suffix: Text = ""
    input_extra: Annotated[list[ExtraText], FAST] | None = None
    prompt: Text = Field("", description="It comes behind input_prefix.")
    n: Literal[1] | None = None
    t_max_predict_ms: int | None = Field(
        None, description="After so long the answer ends, if it has a whole line."
    )
    response_fields: list[Text] | None = Field(
        None, description="Only these, such as content and timings/predicted_n."
    )

    def params(
        self, max_tokens: int | None, logprobs: int | None, defaults: Mapping[str, Any]
    ) -> SamplingParams:
        """See `Completions`. Defaults are no model's, which are for chats: the likeliest code."""
        return super().params(max_tokens, logprobs, {"temperature": 0.0})


class TextPart(Body):
    """A text in a message."""

    type: Literal["text"]
    text: Text


class ImageUrl(Body):
    """The address of a picture."""

    url: Text
    detail: Literal["auto", "low", "high"] | None = Field(None, description="Changes nothing.")


class ImagePart(Body):
    """A picture in a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[Part], FAST] | None = None
    name: Text | None = None
    tool_calls: Annotated[list[ToolCall], FAST] | None = None
    tool_call_id: Text | None = None

    # Fields of answers that clients send back.
    _NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "annotations": (None, []),
        "audio": (None,),
        "function_call": (None,),
        "refusal": (None,),
    }

    @model_validator(mode="after")
    def _fits_its_role(self) -> Message:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only an assistant's message may have tool_calls")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError(
                "tool_call_id belongs to messages of the role 'tool', and these need it"
            )
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing")
        return self

    def plain(self) -> dict[str, Any]:
        """Return the message for `LLM.chat`: texts are joined; `developer` means `system`."""
        content: Any = self.content
        if isinstance(content, list):
            content = [part.model_dump(exclude_none=True) for part in content]
            if all(part["type"] == "text" for part in content):
                content = "\n".join(part["text"] for part in content)
        calls = [call.plain() for call in self.tool_calls] if self.tool_calls else None
        role = "system" if self.role == "developer" else self.role
        found = {
            "role": role,
            "content": content,
            "name": self.name,
            "tool_calls": calls,
            "tool_call_id": self.tool_call_id,
        }
        return {key: value for key, value in found.items() if value is not None}


class ChatRequest(Completions):
    """The body of /v1/chat/completions."""

    prompt_field: ClassVar[str] = "messages"
    _NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = (
        UNSUPPORTED
        | TEMPLATE_FIELDS
        | {
            "add_special_tokens": (None, False),
            "audio": (None,),
            "documents": (None, []),
            "function_call": (None, "none"),
            "functions": (None, []),
            "media_io_kwargs": (None, {}),
            "mm_processor_kwargs": (None, {}),
            "modalities": (None, ["text"]),
            "web_search_options": (None,),
        }
    )

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    # Checked here: the engine's own check calls it max_tokens.
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Text | None = Field(None, description="A variable of the chat template.")
    chat_template_kwargs: TemplateVariables | None = None

    _has_channels: bool = PrivateAttr(False)

    @property
    def variables(self) -> dict[str, Any]:
        """The variables of the chat template."""
        effort = self.reasoning_effort
        variables = {} if effort is None else {"reasoning_effort": effort}
        return variables | (self.chat_template_kwargs or {})

    @property
    def limit(self) -> int | None:
        """The most tokens of an answer, if the request sets a limit."""
        return super().limit if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def limit_field(self) -> str:
        """The field that says so."""
        return (
            super().limit_field if self.max_completion_tokens is None else "max_completion_tokens"
        )

    @property
    def offer(self) -> Offer | None:
        """The tools that the model may call, if any."""
        if not self.tools or self.tool_choice == "none":
            return None
        choice = self.tool_choice
        if isinstance(choice, NamedTool):  # called once, as OpenAI does
            named = [tool for tool in self.tools if tool.function.name == choice.function.name]
            return Offer(named, must=True, many=False)
        return Offer(self.tools, choice == "required", self.parallel_tool_calls is not False)

    def read_channels(self) -> bool:
        """Let the answers keep the special tokens of their channels, and have calls in a form of
        their own; return whether that is done. Calls that must be have our form, and what the
        request says of special tokens holds."""
        must = self.offer is not None and self.offer.must
        if must or self.skip_special_tokens is not None:
            return False
        self.skip_special_tokens = False
        self._has_channels = True
        return True

    def structure(self) -> StructuredOutputsParams | None:
        """Return the required form of the text: with tools, text or calls of them."""
        if self.offer is None or self._has_channels:
            return super().structure()
        return StructuredOutputsParams(grammar=self.offer.grammar(schema_of(self.response_format)))

    @property
    def structured_by(self) -> str:
        """The field with the required form of the text."""
        return super().structured_by if self.offer is None or self._has_channels else "tools"

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is only allowed with logprobs=true")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ: give one of them")
        return self

    @model_validator(mode="after")
    def _check_tools(self) -> ChatRequest:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("tools: two functions have the same name")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice: no tool is called {self.tool_choice.function.name!r}")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice: a call is required, but there are no tools")
        if self.offer is not None and self.structured_outputs is not None:
            raise ValueError("tools and structured_outputs exclude each other: give one of them")
        return self


class TokenizeRequest(Body):
    """The body of /tokenize."""

    model: str | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], FAST] | None = None
    add_special_tokens: bool = True
    chat_template_kwargs: TemplateVariables | None = None

    _NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = TEMPLATE_FIELDS | {
        "return_token_strs": (None, False),
        "tools": (None, []),
    }

    @model_validator(mode="after")
    def _one_of_them(self) -> TokenizeRequest:
        if (self.prompt is None) == (not self.messages):
            raise ValueError("give either prompt or messages")
        if self.chat_template_kwargs and not self.messages:
            raise ValueError("chat_template_kwargs is only allowed with messages")
        return self


class DetokenizeRequest(Body):
    """The body of /detokenize."""

    model: str | None = None
    tokens: Annotated[list[Token], FAST]
