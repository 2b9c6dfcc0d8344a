"""OpenAI's content parts: a conversation's texts as tokens, and its pictures in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smart_decoding.errors import ConfigError

if TYPE_CHECKING:
    from smart_decoding.models.text.tokenizer import Tokenizer

Message = Mapping[str, Any]
_MARKER = "smart-marker"  # a text that no template contains
_IMAGE_TYPES = ("image_url", "image", "image_pil")  # whose sources are under the same names


@dataclass(frozen=True, slots=True)
class PictureSource:
    """A picture that is still unread. modality: image or video. source: an image for `open_image`,
    or a video's list of such frames."""

    modality: str
    source: Any


def check_messages(messages: Any) -> None:
    """Raise ConfigError for other types than a conversation, and for a message of the user or the
    system without content."""
    is_list = isinstance(messages, Sequence) and not isinstance(messages, str)
    if not is_list or not all(isinstance(message, Mapping) for message in messages):
        raise ConfigError(
            "a conversation must be a list of messages such as {'role': 'user', 'content': …}"
        )
    for message in messages:
        if message.get("role") in ("user", "system") and message.get("content") is None:
            raise ConfigError(f"a message of the {message['role']} needs a content")


def has_pictures(messages: Sequence[Message]) -> bool:
    """Return whether any part of any message is not text."""
    parts = (part for message in messages for part in _parts(message.get("content")))
    return any(not isinstance(part, str) and part.get("type") != "text" for part in parts)


def split(messages: Sequence[Message]) -> tuple[list[dict[str, Any]], list[PictureSource]]:
    """Return the messages with every content as a list of {type: text, text}, {type: image} and
    {type: video}, and the pictures. Raises ConfigError for parts that are malformed or of another
    type."""
    pictures: list[PictureSource] = []
    plain = [
        {**each, "content": [_plain(part, pictures) for part in _parts(each.get("content"))]}
        for each in messages
    ]
    return plain, pictures


def as_text(messages: Sequence[Message], placeholders: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return split messages with each content as one string: a placeholder and a new line for every
    picture, and a new line between two texts, as in vLLM."""
    texts = {modality: f"{token}\n" for modality, token in placeholders.items()}
    return [{**each, "content": _joined(each["content"], texts)} for each in messages]


class Conversations:
    """Makes tokens of conversations, through the model's chat template.

    placeholders: the text of each kind of picture; None for a model of text only, or for
    conversations without pictures."""

    def __init__(self, tokenizer: Tokenizer, placeholders: Mapping[str, str] | None = None) -> None:
        self._tokenizer = tokenizer
        self._placeholders = placeholders
        self._reads_lists: bool | None = None

    def tokens(self, messages: Sequence[Message], **options: Any) -> tuple[list[int], str]:
        """Return token ids, one placeholder a picture, and their text. messages: from `split`, or
        with texts for contents. options: of `Tokenizer.apply_chat_template`. Raises ConfigError,
        CapacityError."""
        in_parts = any(isinstance(message.get("content"), list) for message in messages)
        if in_parts and (self._placeholders is None or not self._takes_lists()):
            messages = as_text(messages, self._placeholders or {})
        text = self._tokenizer.apply_chat_template(messages, **options)
        # With pictures, transformers' processors add the beginning token unless it is there.
        begins = self._placeholders is not None or options.get("template") is not None
        return self._tokenizer.encode_prompt(text, begins), text

    def _takes_lists(self) -> bool:
        """Return whether the template reads content as a list of parts; some know texts only."""
        if self._reads_lists is None:
            message = {"role": "user", "content": [{"type": "text", "text": _MARKER}]}
            try:
                text = self._tokenizer.apply_chat_template([message])
                self._reads_lists = (
                    _MARKER in text and "'type'" not in text and '"type"' not in text
                )
            except ConfigError:
                if self._tokenizer.template is None:
                    raise
                self._reads_lists = False
        return self._reads_lists


def _joined(parts: Sequence[Message], texts: Mapping[str, str]) -> str:
    found = []
    before = ""
    for part in parts:
        kind = part["type"]
        if before == kind == "text":
            found.append("\n")
        found.append(part.get("text", texts.get(kind, "")))
        before = kind
    return "".join(found)


def _parts(content: Any) -> list[Any]:
    if content is None:
        return []
    if isinstance(content, str):
        return [content]
    is_list = isinstance(content, Sequence)
    if not is_list or not all(isinstance(part, Mapping | str) for part in content):
        raise ConfigError(
            "a message's content must be a text or a list of parts "
            "such as {'type': 'text', 'text': …}"
        )
    return list(content)


def _plain(part: Any, pictures: list[PictureSource]) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise ConfigError("a content part of type 'text' needs a text")
        return {"type": "text", "text": part["text"]}
    if kind == "video":
        frames = part.get("video")
        if not isinstance(frames, Sequence) or isinstance(frames, str | bytes) or not frames:
            raise ConfigError("a content part of type 'video' needs its frames: a list of images")
        pictures.append(PictureSource("video", list(frames)))
        return {"type": "video"}
    if kind not in _IMAGE_TYPES:
        known = ", ".join(("text", *_IMAGE_TYPES, "video"))
        raise ConfigError(f"a content part of type {kind!r} is not supported; supported: {known}")
    source = part.get(kind)
    source = source.get("url") if isinstance(source, Mapping) else source
    if source is None:
        raise ConfigError(f"a content part of type {kind!r} needs its {kind}")
    pictures.append(PictureSource("image", source))
    return {"type": "image"}
