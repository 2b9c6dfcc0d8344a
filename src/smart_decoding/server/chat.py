"""From a conversation to the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from smart_decoding.multimodal.messages import has_pictures
from smart_decoding.multimodal.prompts import PlannedPrompt
from smart_decoding.multimodal.text_prompts import template_options
from smart_decoding.server import tools
from smart_decoding.server.errors import ApiError

if TYPE_CHECKING:
    from smart_decoding.llm import LLM
    from smart_decoding.server.schemas import Message


def chat_prompt(
    llm: LLM,
    messages: Sequence[Message],
    offered: Sequence[tools.Tool] = (),
    variables: Mapping[str, Any] | None = None,
) -> PlannedPrompt:
    """The prompt of a conversation, with the tools that the model may call; its pictures are still
    to be decoded. variables: of the chat template.

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
        return llm.plan_chat(plain, chat_template_kwargs=variables)
    described = [tool.model_dump(exclude_none=True) for tool in offered]
    if not tools.speaks_our_form(llm.tokenizer.template):
        told = tools.explained(plain, described)
        return llm.plan_chat(told, chat_template_kwargs=variables)
    given = template_options(llm.tokenizer.template, None, True, described, variables)
    text = llm.tokenizer.apply_chat_template(plain, **given)
    return PlannedPrompt(llm.tokenizer.encode_prompt(text))
