"""Pictures of a prompt, as the engine sees them.

A picture fills `length` consecutive positions of a prompt. The engine knows a digest of its content
and hands its embeddings to the target, with the rows of the prompt's chunks. Only the backend reads
pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from smart_decoding.engine.kv import PAGE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from smart_decoding.core.tree import IntArray

# (first row, embeddings [rows, hidden])
MultimodalEmbeddings: TypeAlias = Sequence[tuple[int, Any]]


@dataclass(frozen=True, slots=True)
class Pixels:
    """One image or video at the size that the model reads, in bytes until the tower reads it.

    frames: [frames, 3, height, width], uint8; grid: (time, height, width) in patches; length:
    positions that it takes; key: of the content: pictures with the same key have the same
    embeddings; read: makes `values` of frames.
    """

    modality: str
    frames: NDArray[Any]
    grid: tuple[int, int, int]
    length: int
    key: bytes
    read: Callable[[NDArray[Any]], NDArray[np.float32]]

    @property
    def values(self) -> NDArray[np.float32]:
        """The tower's input, made anew each time: LLaVA's [channels, height, width] or Qwen2-VL's
        patches [time * height * width, patch]."""
        return self.read(self.frames)


@dataclass(eq=False, slots=True)
class Picture:
    """An image, or the frames of a video. key: digest of its content; pixels: input of the target's
    `encode_image`; embeddings: [length, hidden] on the backend, from the prompt's prefill until its
    request ends."""

    first: int
    length: int
    key: bytes
    pixels: Any
    embeddings: Any = None


@dataclass(slots=True)
class Media:
    """The pictures of one prompt, in order.

    rotary: [prompt, 3] rotary positions (time, height, width) of models with three, else None.
    Behind the prompt all three are the plain position plus `shift`."""

    pictures: Sequence[Picture]
    rotary: IntArray | None = None
    shift: int = 0
    content_hashes: dict[int, bytes] = field(init=False)

    def __post_init__(self) -> None:
        # page -> hash of its pictures: to prefix caching, equal token ids are not equal content
        self.content_hashes = {}
        for picture in self.pictures:
            last = picture.first + picture.length - 1
            for page in range(picture.first // PAGE, last // PAGE + 1):
                offset = (picture.first - page * PAGE).to_bytes(8, "little", signed=True)
                before = self.content_hashes.get(page, b"")
                self.content_hashes[page] = before + picture.key + offset

    def copy(self) -> Media:
        """Return a copy of the pictures, without embeddings."""
        pictures = [replace(picture, embeddings=None) for picture in self.pictures]
        return Media(pictures, self.rotary, self.shift)

    def visual(self, end: int) -> int:
        """Return the position behind the last picture that begins before `end`, but no more than
        `end`; 0 without such a picture."""
        ends = (min(end, p.first + p.length) for p in self.pictures if p.first < end)
        return max(ends, default=0)

    @property
    def length(self) -> int:
        """Number of all pictures' positions."""
        return sum(picture.length for picture in self.pictures)

    def within(self, start: int, count: int) -> list[Picture]:
        """Return the pictures that have positions in [start, start + count)."""
        return [p for p in self.pictures if p.first < start + count and start < p.first + p.length]

    def to_encode(self, start: int, count: int) -> list[Picture]:
        """Return the pictures in [start, start + count) without embeddings."""
        return [picture for picture in self.within(start, count) if picture.embeddings is None]

    def mm_embeds(self, start: int, count: int) -> MultimodalEmbeddings:
        """Return the embeddings of the positions [start, start + count), each with its offset from
        `start`."""
        parts = []
        for picture in self.within(start, count):
            first = max(start, picture.first)
            end = min(start + count, picture.first + picture.length)
            part = picture.embeddings[first - picture.first : end - picture.first]
            parts.append((first - start, part))
        return parts

    def positions(self, start: int, count: int) -> IntArray | None:
        """Return the rotary positions [count, 3] from position `start` on, or None for plain
        ones."""
        if self.rotary is None:
            return None
        plain = np.arange(start, start + count)
        behind = np.repeat(plain[:, None] + self.shift, 3, axis=1)
        inside = plain < len(self.rotary)
        behind[inside] = self.rotary[plain[inside]]
        return behind

    def release(self) -> None:
        """Drop pixels and embeddings: a caller may hold the ended request for long."""
        for picture in self.pictures:
            picture.pixels = picture.embeddings = None

    def forget(self) -> None:
        """Drop the embeddings. If they are needed again, the target computes them, or still has
        them."""
        for picture in self.pictures:
            picture.embeddings = None
