"""Prompts of callers (texts, token ids, vLLM's dicts, conversations), and their tokens for models
that read text only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

from smart_decoding.errors import ConfigError
from smart_decoding.models.text import chat_template as templates
from smart_decoding.multimodal.messages import (
    Conversations,
    Message,
    PictureSource,
    has_pictures,
    split,
)
from smart_decoding.multimodal.prompts import MediaPrompt, PlannedPrompt, Prompt

if TYPE_CHECKING:
    from pathlib import Path

    from smart_decoding.models.text.tokenizer import Tokenizer

_BYTES = (bytes, bytearray, memoryview)  # sequences of numbers, which are no token ids
# Names with parameters of their own, or that would change more than the template's variables.
_NO_VARIABLES = {
    "self",
    "messages",
    "tools",
    "template",
    "chat_template",
    "tokenize",
    "add_generation_prompt",
    "continue_final_message",
}


class TextPrompts:
    """Build prompts for one model that reads text only, by the methods of `PromptBuilder`. name:
    the model's."""

    placeholders: Mapping[str, str] | None = None

    def __init__(self, tokenizer: Tokenizer, name: str) -> None:
        self._tokenizer = tokenizer
        self._name = name
        self.conversations = Conversations(tokenizer)

    def split(
        self, messages: Sequence[Message]
    ) -> tuple[Sequence[Message], Sequence[PictureSource]]:
        """Return the messages for `conversations`, and no pictures. Raises ConfigError."""
        self._refuse(has_pictures(messages))
        if any(not isinstance(message.get("content"), str) for message in messages):
            messages = split(messages)[0]
        return messages, ()

    def plan(
        self, tokens: Sequence[int], sources: Sequence[PictureSource], text: str | None = None
    ) -> PlannedPrompt:
        """Return the prompt of a text's tokens. Raises ConfigError if there are pictures."""
        self._refuse(bool(sources))
        return PlannedPrompt(list(tokens), text)

    def prompt(self, prompt: str | Sequence[int], media: Mapping[str, Any]) -> MediaPrompt:
        """Return a text or token ids. Raises ConfigError if there are pictures."""
        self._refuse(bool(media))
        if isinstance(prompt, str):
            return MediaPrompt(self._tokenizer.encode(prompt), None, prompt)
        return MediaPrompt(list(prompt))

    def _refuse(self, pictures: bool) -> None:
        if pictures:
            raise ConfigError(
                f"the model {self._name} reads text only: "
                "take one that reads images (docs/vision.md)"
            )


def as_list(prompts: Any) -> list[Prompt]:
    """Return one prompt, or several, as a list; other values as one prompt, for `parts_of` to
    refuse."""
    is_list = hasattr(prompts, "__getitem__") and not isinstance(prompts, (str, Mapping, *_BYTES))
    if not is_list or (len(prompts) and isinstance(prompts[0], Integral)):
        return [prompts]
    return list(prompts)


def parts_of(prompt: Prompt) -> tuple[str | list[int], Mapping[str, Any]]:
    """Return text or token ids, and pictures. Raises ConfigError for other values."""
    fields = prompt if isinstance(prompt, Mapping) else {"prompt": prompt}
    if not fields.keys() <= {"prompt", "prompt_token_ids", "multi_modal_data"}:
        raise ConfigError("a prompt's keys are prompt or prompt_token_ids, and multi_modal_data")
    content: Any = fields.get("prompt", fields.get("prompt_token_ids"))
    pictures: Any = fields.get("multi_modal_data") or {}
    return content if isinstance(content, str) else _token_ids(content), pictures


def template_options(
    own: str | None,
    chat_template: str | Path | None,
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return vLLM's options of a chat for `Tokenizer.apply_chat_template`. own: the model's
    template. Raises ConfigError for tools that the template does not describe, and for variables
    with parameters of their own."""
    taken = sorted(_NO_VARIABLES.intersection(variables or ()))
    if taken:
        raise ConfigError(f"chat_template_kwargs={taken} is not allowed: give other variables")
    template = None if chat_template is None else templates.read(chat_template)
    options = {
        **(variables or {}),
        "template": template,
        "add_generation_prompt": add_generation_prompt,
    }
    if tools:
        if "tools" not in (template or own or ""):
            raise ConfigError("the chat template takes no tools: give one that does, or no tools")
        options["tools"] = list(tools)
    return options


def _token_ids(tokens: Any) -> list[int]:
    """Return the ints of any sequence or array. Raises ConfigError for anything else."""
    if isinstance(tokens, _BYTES):
        raise ConfigError("a prompt must be a text or token ids, not bytes: decode them first")
    ids: list[Any] = list(tokens) if isinstance(tokens, Iterable) else [None]
    if not all(isinstance(token, Integral) for token in ids):
        raise ConfigError("a prompt must be a text or token ids; several are a list of these")
    return [int(token) for token in ids]
