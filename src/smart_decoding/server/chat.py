"""From a conversation to the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from smart_decoding.multimodal.messages import has_pictures
from smart_decoding.multimodal.prompts import MediaPrompt
from smart_decoding.server import tools
from smart_decoding.server.errors import ApiError

if TYPE_CHECKING:
    from smart_decoding.llm import LLM
    from smart_decoding.server.schemas import Message


def chat_prompt(
    llm: LLM, messages: Sequence[Message], offered: Sequence[tools.Tool] = ()
) -> MediaPrompt:
    """The prompt of a conversation, with the tools that the model may call.

    Raises ApiError, ConfigError.
    """
    plain = [message.plain() for message in messages]
    with_tools = offered or any(
        "tool_calls" in message or message["role"] == "tool" for message in plain
    )
    if has_pictures(plain) or (llm.supports_images and not with_tools):
        if with_tools:
            message = "tools and pictures are not supported in one conversation"
            raise ApiError(400, message, "invalid_value", "messages")
        return llm.chat_prompt(plain)
    described = [tool.model_dump(exclude_none=True) for tool in offered]
    if not tools.speaks_our_form(llm.tokenizer.template):
        return llm.chat_prompt(tools.explained(plain, described))
    variables: dict[str, Any] = {"tools": described} if described else {}
    text = llm.tokenizer.apply_chat_template(plain, **variables)
    return MediaPrompt(llm.tokenizer.encode_prompt(text))
