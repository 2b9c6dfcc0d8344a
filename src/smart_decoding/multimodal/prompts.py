"""Prompts with pictures: placeholders expanded to the positions that each picture takes, pictures
with their places."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, NotRequired, TypeAlias, TypedDict

import numpy as np

from smart_decoding.engine.media import Media, Picture
from smart_decoding.errors import CapacityError, ConfigError
from smart_decoding.multimodal import messages as parts
from smart_decoding.multimodal.images import MODALITIES, Limits, header_size, open_image
from smart_decoding.multimodal.messages import Conversations, Message, PictureSource

if TYPE_CHECKING:
    from smart_decoding.core.tree import IntArray
    from smart_decoding.engine.media import Pixels
    from smart_decoding.models.text.tokenizer import Tokenizer
    from smart_decoding.multimodal.pixels import PixelReader, Room


@dataclass(frozen=True, slots=True)
class MediaPrompt:
    """Token ids, each picture's positions filled with its placeholder, and the pictures (None
    without any)."""

    tokens: list[int]
    media: Media | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True)
class PlannedPicture:
    """A picture whose header was read. first: its first position."""

    source: PictureSource
    first: int
    room: Room


@dataclass(frozen=True, slots=True)
class PlannedPrompt:
    """A prompt that fits into the context, its pictures not decoded yet.

    tokens, text: as `MediaPrompt`; decode: makes the pictures, in the steps of `steps`."""

    tokens: list[int]
    text: str | None = None
    pictures: Sequence[PlannedPicture] = ()
    decode: Callable[[PlannedPrompt, str], Iterator[Media | None]] | None = None

    @property
    def bytes(self) -> int:
        """The bytes of its pictures once they are decoded."""
        return sum(picture.room.bytes for picture in self.pictures)

    def decoded(self, cache_salt: str = "") -> MediaPrompt:
        """Decode the pictures, one after the other. cache_salt: cached embeddings are shared by
        pictures of the same salt. Raises ConfigError for damaged pictures."""
        *_, prompt = self.steps(cache_salt)
        assert prompt is not None
        return prompt

    def steps(self, cache_salt: str = "") -> Iterator[MediaPrompt | None]:
        """Yield None between pictures and after each frame, then the prompt. Raises ConfigError as
        `decoded` does."""
        media = None
        if self.decode and self.pictures:
            for media in self.decode(self, cache_salt):
                if media is None:
                    yield None
        yield MediaPrompt(self.tokens, media, self.text)


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
    """Build prompts for one vision-language model: `split` a conversation, make tokens of it by
    `conversations`, then `plan` its pictures.

    mrope: whether the model has three rotary positions."""

    def __init__(
        self, tokenizer: Tokenizer, reader: PixelReader, limits: Limits, mrope: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._reader = reader
        self._limits = limits
        self._mrope = mrope
        kinds = reader.placeholders.items()
        self.placeholders = {name: tokenizer.decode([token], False) for name, token in kinds}
        self.conversations = Conversations(tokenizer, self.placeholders)

    def bound_turned(self) -> None:
        """Refuse pictures to be turned upright beyond half of the pixels: a server's memory."""
        self._limits = replace(self._limits, turned=2)

    def split(
        self, messages: Sequence[Message]
    ) -> tuple[Sequence[Message], Sequence[PictureSource]]:
        """Return the messages for `conversations`, and their pictures, still unread. Raises
        ConfigError."""
        conversation, pictures = parts.split(messages)
        self._check_counts(pictures)
        return conversation, pictures

    def prompt(self, prompt: str | Sequence[int], media: Mapping[str, Any]) -> MediaPrompt:
        """Return a text or token ids with one placeholder a picture. media: image and video, each
        one or a list.

        Raises ConfigError, too, if there are more pictures than placeholders or the other way
        round."""
        unknown = [name for name in media if name not in MODALITIES]
        if unknown:
            raise ConfigError(
                f"multi_modal_data has {unknown[0]!r}; supported: {', '.join(MODALITIES)}"
            )
        text = prompt if isinstance(prompt, str) else None
        tokens = [int(t) for t in prompt] if text is None else self._tokenizer.encode(text)
        lists = {name: _as_list(name, value) for name, value in media.items() if value is not None}
        pictures = [PictureSource(name, source) for name in lists for source in lists[name]]
        self._check_counts(pictures)
        return self.plan(tokens, pictures, text).decoded()

    def plan(
        self, tokens: Sequence[int], sources: Sequence[PictureSource], text: str | None = None
    ) -> PlannedPrompt:
        """Expand the placeholders of a text's tokens to the positions of their pictures, by the
        pictures' headers.

        The placeholders must be as many as the pictures of their kind, in the same order. Raises
        ConfigError for pictures that cannot be used, CapacityError if the prompt is too long."""
        kinds = {token: name for name, token in self._reader.placeholders.items()}
        places = [kinds[token] for token in tokens if token in kinds]
        for name in MODALITIES:
            _check_places(
                name, places.count(name), sum(source.modality == name for source in sources)
            )
        by_kind = {name: iter([s for s in sources if s.modality == name]) for name in MODALITIES}
        expanded: list[int] = []
        pictures: list[PlannedPicture] = []
        for token in tokens:
            if token not in kinds:
                expanded.append(token)
                continue
            source = next(by_kind[kinds[token]])
            planned = self._planned(source, len(expanded))
            pictures.append(planned)
            expanded += [token] * planned.room.length
        context = self._tokenizer.context
        if pictures and context is not None and len(expanded) >= context:
            raise CapacityError(
                f"the prompt has {len(expanded)} tokens with its pictures, but prompt and answer "
                f"must fit into max_model_len={context}: send smaller or fewer pictures"
            )
        return PlannedPrompt(expanded, text, pictures, self._decoded)

    def _planned(self, source: PictureSource, first: int) -> PlannedPicture:
        frames = [source.source] if source.modality == "image" else source.source
        if len(frames) > self._limits.frames:
            raise ConfigError(
                f"a video of {len(frames)} frames exceeds the limit of {self._limits.frames}"
            )
        sizes = [header_size(frame, self._limits) for frame in frames]
        room = self._reader.room(source.modality, *sizes[0], len(frames))
        return PlannedPicture(source, first, room)

    def _decoded(self, plan: PlannedPrompt, cache_salt: str) -> Iterator[Media | None]:
        pictures: list[Picture] = []
        grids = []
        for planned in plan.pictures:
            if pictures:
                yield None
            pixels = None
            for pixels in self._pixels(planned.source):
                if pixels is None:
                    yield None
            if pixels is None or pixels.length != planned.room.length:
                raise ConfigError("an image has changed while it was read")
            if cache_salt:
                salted = blake2b(pixels.key, digest_size=16, key=_digest(cache_salt)).digest()
                pixels = replace(pixels, key=salted)
            pictures.append(Picture(planned.first, pixels.length, pixels.key, pixels))
            grids.append(pixels.grid)
        if not self._mrope:
            yield Media(pictures)
            return
        rotary, shift = rotary_positions(len(plan.tokens), pictures, grids, self._reader.merge)
        yield Media(pictures, rotary, shift)

    def _pixels(self, source: PictureSource) -> Iterator[Pixels | None]:
        """Yield None after each step, then the result."""
        if source.modality == "image":
            yield self._reader.image(open_image(source.source, self._limits))
            return
        frames = (open_image(frame, self._limits) for frame in source.source)
        yield from self._reader.video_steps(frames)

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


def rotary_positions(
    length: int, pictures: Sequence[Picture], grids: Sequence[tuple[int, int, int]], merge: int
) -> tuple[IntArray, int]:
    """Return M-RoPE's positions (Qwen2-VL) in time, height and width [length, 3], and the shift of
    later ones against their index.

    A text's three positions are equal. A picture's follow its grid from the next position on, and
    the text behind it goes on after the largest of them, as in the paper (arXiv 2409.12191).
    transformers 5 leaves a video's time out of the largest, which only differs for videos of more
    time steps than rows and columns."""
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


def _digest(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=16).digest()


def _check_places(modality: str, places: int, pictures: int) -> None:
    if places != pictures:
        few = "many" if pictures > places else "few"
        raise ConfigError(
            f"{pictures} {modality}s for a prompt of {places} {modality} placeholders: too {few}"
        )


def _as_list(modality: str, value: Any) -> list[Any]:
    if modality == "image":
        return list(value) if isinstance(value, list | tuple) else [value]
    if not isinstance(value, list | tuple):
        raise ConfigError("a video must be its frames: a list of images")
    is_one = value and not isinstance(value[0], list | tuple)
    return [value] if is_one else list(value)
