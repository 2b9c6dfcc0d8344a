"""Request bodies. Nothing is ignored: a field that is not supported is refused, unless its value asks for nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from smart_decoding.engine.sampling_params import SamplingParams

MAX_STOPS, MAX_LOGPROBS = 16, 20
_NEUTRAL: dict[str, tuple[Any, ...]] = {  # values of unsupported fields that change nothing
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "function_call": (None, "none"),
    "functions": (None, []),
    "metadata": (None, {}),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "response_format": (None, {"type": "text"}),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "verbosity": (None,),
    "web_search_options": (None,),
}


def _whole_characters(text: str) -> str:
    """JSON can spell half of a surrogate pair, which is no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it holds a lone surrogate, which is no character") from None
    return text


Token = Annotated[int, Field(ge=0)]
Text = Annotated[str, AfterValidator(_whole_characters)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Body):
    include_usage: bool | None = None


class Sampling(Body):
    """What completions and chat completions share; null means the default."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: Text | Annotated[list[Text], Field(max_length=MAX_STOPS)] | None = None
    seed: int | None = None
    logit_bias: dict[str, float] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    user: str | None = Field(None, description="Names your end user; it goes nowhere.")
    # Beyond OpenAI's, in vLLM's names:
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[Token] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    speculate: bool | None = Field(None, description="false decodes this request plainly; its tokens are the same.")

    _AS_THEY_ARE: ClassVar[tuple[str, ...]] = (
        "n", "temperature", "top_p", "stop", "seed", "presence_penalty", "frequency_penalty", "top_k", "min_p",
        "repetition_penalty", "min_tokens", "stop_token_ids", "ignore_eos", "skip_special_tokens",
        "include_stop_str_in_output", "speculate",
    )  # fmt: skip

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        return {k: v for k, v in data.items() if k in cls.model_fields or k not in _NEUTRAL or v not in _NEUTRAL[k]}

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed with stream=true")
        return self

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def limit(self) -> int | None:
        """The most tokens the request itself asks for, if it does."""
        return self.max_tokens

    def params(self, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """The engine's parameters. Raises ConfigError for a value out of range."""
        given = {name: getattr(self, name) for name in self._AS_THEY_ARE if getattr(self, name) is not None}
        bias = {int(token): value for token, value in self.logit_bias.items()} if self.logit_bias else None
        return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, logit_bias=bias, **given)

    @model_validator(mode="after")
    def _bias_keys_are_token_ids(self) -> Sampling:
        for token in self.logit_bias or ():
            if not (token.isascii() and token.isdigit() and len(token) < 12):
                raise ValueError(f"logit_bias: {token!r} is not a token id")
        return self


class CompletionRequest(Sampling):
    prompt: Text | list[Text] | list[Token] | list[list[Token]]
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None


class TextPart(Body):
    type: Literal["text"]
    text: Text


class ImageUrl(Body):
    url: Text
    detail: Literal["auto", "low", "high"] | None = Field(None, description="Changes nothing.")


class ImagePart(Body):
    type: Literal["image_url"]
    image_url: ImageUrl


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]
    name: Text | None = None

    def plain(self) -> dict[str, Any]:
        """As `LLM.chat` takes it: content of text only is one text; `developer` is the newer word for `system`."""
        content: Any = self.content
        if not isinstance(content, str):
            content = [part.model_dump(exclude_none=True) for part in content]
            if all(part["type"] == "text" for part in content):
                content = "".join(part["text"] for part in content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": content} | ({"name": self.name} if self.name else {})


class ChatRequest(Sampling):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only allowed with logprobs=true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ: give one of them")
        return self


class TokenizeRequest(Body):
    model: str | None = None
    prompt: Text | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _one_of_them(self) -> TokenizeRequest:
        if (self.prompt is None) == (not self.messages):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[Token]
