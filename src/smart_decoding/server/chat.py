"""From a conversation to the prompt's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from smart_decoding.llm import LLM
from smart_decoding.server import tools
from smart_decoding.server.errors import ApiError
from smart_decoding.server.schemas import ImagePart, Message


def chat_tokens(llm: LLM, messages: Sequence[Message], offered: Sequence[tools.Tool] = ()) -> list[int]:
    """Token ids of a conversation, with the tools that the model may call. Raises ApiError, ConfigError."""
    _refuse_images(messages)
    plain = [message.plain() for message in messages]
    described = [tool.model_dump(exclude_none=True) for tool in offered]
    variables: dict[str, Any] = {}
    if tools.speaks_our_form(llm.tokenizer.template):
        variables = {"tools": described} if described else {}
    else:
        plain = tools.explained(plain, described)
    text = llm.tokenizer.apply_chat_template(plain, **variables)
    return llm.tokenizer.encode(text, add_special_tokens=False)


def _refuse_images(messages: Sequence[Message]) -> None:
    """Pictures have their place here once a served model takes them."""
    if any(isinstance(part, ImagePart) for message in messages for part in message.parts):
        raise ApiError(400, "this model takes no images", "invalid_value", "messages")
