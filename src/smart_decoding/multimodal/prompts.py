"""Prompts with pictures: placeholders expanded to the positions that each picture takes, pictures
with their places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NotRequired, TypeAlias, TypedDict

import numpy as np

from smart_decoding.engine.media import Media, Picture
from smart_decoding.errors import ConfigError
from smart_decoding.multimodal import messages as parts
from smart_decoding.multimodal.images import MODALITIES, Limits, open_image
from smart_decoding.multimodal.messages import Message, PictureSource

if TYPE_CHECKING:
    from smart_decoding.core.tree import IntArray
    from smart_decoding.models.tokenizer import Tokenizer
    from smart_decoding.multimodal.pixels import PixelReader, Pixels

_MARKER = "smart-marker"  # a text that no template contains


@dataclass(frozen=True, slots=True)
class MediaPrompt:
    """Token ids, each picture's positions filled with its placeholder, and the pictures (None:
    there are none)."""

    tokens: list[int]
    media: Media | None = None
    text: str | None = None


class TextPrompt(TypedDict):
    """vLLM's form of a text with pictures."""

    prompt: str
    multi_modal_data: NotRequired[Mapping[str, Any]]


class TokensPrompt(TypedDict):
    """vLLM's form of token ids with pictures."""

    prompt_token_ids: Sequence[int]
    multi_modal_data: NotRequired[Mapping[str, Any]]


Prompt: TypeAlias = str | Sequence[int] | MediaPrompt | TextPrompt | TokensPrompt


class PromptBuilder:
    """Builds prompts for one vision-language model. mrope: whether it has three rotary
    positions."""

    def __init__(
        self, tokenizer: Tokenizer, reader: PixelReader, limits: Limits, mrope: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._reader = reader
        self._limits = limits
        self._mrope = mrope
        self._reads_lists: bool | None = None

    def chat(self, messages: Sequence[Message], **given: Any) -> MediaPrompt:
        """A conversation with content parts, through the model's template. given: as to
        `Tokenizer.apply_chat_template`. Raises ConfigError."""
        told, pictures = parts.split(messages)
        self._check_counts(pictures)
        if not self._takes_lists():
            kinds = self._reader.placeholders.items()
            texts = {name: self._tokenizer.decode([token], False) for name, token in kinds}
            told = parts.as_text(told, texts)
        text = self._tokenizer.apply_chat_template(told, **given)
        # As transformers' processors do: the beginning token is added where it is not written yet.
        return self._build(self._tokenizer.encode_prompt(text, True), pictures, text)

    def prompt(self, prompt: str | Sequence[int], media: Mapping[str, Any]) -> MediaPrompt:
        """A text or token ids with one placeholder a picture. media: image and video, each one or a
        list.

        Raises ConfigError, too, if there are more pictures than placeholders or the other way
        round."""
        unknown = [name for name in media if name not in MODALITIES]
        if unknown:
            raise ConfigError(
                f"multi_modal_data has {unknown[0]!r}; supported: {', '.join(MODALITIES)}"
            )
        text = prompt if isinstance(prompt, str) else None
        tokens = [int(t) for t in prompt] if text is None else self._tokenizer.encode(text)
        lists = {name: _as_list(name, given) for name, given in media.items() if given is not None}
        pictures = [PictureSource(name, source) for name in lists for source in lists[name]]
        self._check_counts(pictures)
        return self._build(tokens, pictures, text)

    def _build(
        self, tokens: Sequence[int], sources: Sequence[PictureSource], text: str | None
    ) -> MediaPrompt:
        """Expands the placeholders, which must be as many as the pictures of their kind, in the
        same order."""
        kinds = {token: name for name, token in self._reader.placeholders.items()}
        places = [kinds[token] for token in tokens if token in kinds]
        for name in MODALITIES:
            _check_places(
                name, places.count(name), sum(source.modality == name for source in sources)
            )
        by_kind = {name: iter([s for s in sources if s.modality == name]) for name in MODALITIES}
        expanded: list[int] = []
        pictures: list[Picture] = []
        grids = []
        for token in tokens:
            if token not in kinds:
                expanded.append(token)
                continue
            pixels = self._pixels(next(by_kind[kinds[token]]))
            pictures.append(Picture(len(expanded), pixels.length, pixels.key, pixels))
            grids.append(pixels.grid)
            expanded += [token] * pixels.length
        if not pictures:
            return MediaPrompt(expanded, None, text)
        if not self._mrope:
            return MediaPrompt(expanded, Media(pictures), text)
        rotary, shift = rotary_positions(len(expanded), pictures, grids, self._reader.merge)
        return MediaPrompt(expanded, Media(pictures, rotary, shift), text)

    def _pixels(self, source: PictureSource) -> Pixels:
        if source.modality == "image":
            return self._reader.image(open_image(source.source, self._limits))
        if len(source.source) > self._limits.frames:
            raise ConfigError(
                f"a video of {len(source.source)} frames exceeds the limit of {self._limits.frames}"
            )
        return self._reader.video([open_image(frame, self._limits) for frame in source.source])

    def _check_counts(self, pictures: Sequence[PictureSource]) -> None:
        for name in MODALITIES:
            count = sum(picture.modality == name for picture in pictures)
            limit = self._limits.per_prompt.get(name, 0)
            if count and name not in self._reader.placeholders:
                raise ConfigError(f"this model does not read a {name}")
            if count > limit:
                raise ConfigError(
                    f"{count} {name}s in one prompt: "
                    f"at most {limit} are allowed (limit_mm_per_prompt)"
                )

    def _takes_lists(self) -> bool:
        """Whether the template reads content as a list of parts; some know texts only."""
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


def rotary_positions(
    length: int, pictures: Sequence[Picture], grids: Sequence[tuple[int, int, int]], merge: int
) -> tuple[IntArray, int]:
    """M-RoPE (Qwen2-VL): [length, 3] positions in time, height and width, and what they lag behind
    afterwards.

    A text's three positions are equal. A picture's follow its grid from the next position on, and
    the text behind it goes on after the largest of them, as in the paper (arXiv 2409.12191);
    transformers 5 leaves a video's time out of that, which only differs for videos of more time
    steps than rows and columns."""
    rotary = np.empty((length, 3), np.int64)
    at = now = 0
    for picture, grid in zip(pictures, grids, strict=True):
        text = picture.first - at
        rotary[at : picture.first] = now + np.arange(text)[:, None]
        now += text
        time = grid[0]
        height = grid[1] // merge
        width = grid[2] // merge
        at = picture.first + picture.length
        rotary[picture.first : at] = now + np.indices((time, height, width)).reshape(3, -1).T
        now += max(time, height, width)
    rotary[at:] = now + np.arange(length - at)[:, None]
    return rotary, int(rotary.max()) + 1 - length


def _check_places(modality: str, places: int, pictures: int) -> None:
    if places != pictures:
        few = "many" if pictures > places else "few"
        raise ConfigError(
            f"{pictures} {modality}s for a prompt of {places} {modality} placeholders: too {few}"
        )


def _as_list(modality: str, given: Any) -> list[Any]:
    if modality == "image":
        return list(given) if isinstance(given, list | tuple) else [given]
    if not isinstance(given, list | tuple):
        raise ConfigError("a video must be its frames: a list of images")
    is_one = given and not isinstance(given[0], list | tuple)
    return [given] if is_one else list(given)
