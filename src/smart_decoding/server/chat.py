"""From a conversation to the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smart_decoding.models.text.harmony import speaks_harmony
from smart_decoding.multimodal.messages import PictureSource, has_pictures
from smart_decoding.multimodal.text_prompts import template_options
from smart_decoding.server import preparation, tools
from smart_decoding.server.errors import ApiError

if TYPE_CHECKING:
    from smart_decoding.llm import LLM
    from smart_decoding.server.schemas import Message


@dataclass(frozen=True, slots=True)
class ChatTask:
    """A conversation to prepare. task: for the preparation process; pictures: of the messages."""

    task: bytes
    pictures: Sequence[PictureSource] = ()


def chat_task(
    llm: LLM,
    messages: Sequence[Message],
    offered: Sequence[tools.Tool] = (),
    variables: Mapping[str, Any] | None = None,
) -> ChatTask:
    """Return the task of a conversation, with the tools that the model may call. variables: of the
    chat template.

    Raises ApiError, ConfigError.
    """
    plain: Sequence[Mapping[str, Any]] = [message.plain() for message in messages]
    with_tools = offered or any(
        "tool_calls" in message or message["role"] == "tool" for message in plain
    )
    template = llm.tokenizer.template
    if has_pictures(plain) or (llm.supports_images and not with_tools):
        if with_tools:
            message = "tools and pictures are not supported in one conversation"
            raise ApiError(400, message, "invalid_value", "messages")
        options = template_options(template, None, True, None, variables)
        conversation, pictures = llm.prompts.split(plain)
        return ChatTask(_task(conversation, options, llm.supports_images), pictures)
    described: list[Any] = [tool.model_dump(exclude_none=True) for tool in offered]
    if not (tools.speaks_our_form(template) or speaks_harmony(template)):
        conversation, _ = llm.prompts.split(tools.explained(plain, described))
        options = template_options(template, None, True, None, variables)
        return ChatTask(_task(conversation, options, llm.supports_images))
    options = template_options(template, None, True, described, variables)
    return ChatTask(_task(plain, options, False))


def _task(
    messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], pictures: bool
) -> bytes:
    return preparation.task("chat", messages=messages, variables=variables, pictures=pictures)
