"""What fills positions of a prompt that no token id describes: pictures, as the engine knows them.

A picture stands for `length` consecutive positions. The engine knows what identifies its content,
and gives the target the rows of its embeddings with the rows of the prompt's chunks; what it looks
like is the backend's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from smart_decoding.engine.kv import PAGE

if TYPE_CHECKING:
    from smart_decoding.core.tree import IntArray

# (first row, embeddings [rows, hidden])
MultimodalEmbeddings: TypeAlias = Sequence[tuple[int, Any]]


@dataclass(eq=False, slots=True)
class Picture:
    """An image, or the frames of a video. key: digest of its content; pixels: what the target's
    `encode_image` reads; embeddings: [length, hidden] on the backend, there from the prompt's
    prefill until its request ends."""

    first: int
    length: int
    key: bytes
    pixels: Any
    embeddings: Any = None


@dataclass(slots=True)
class Media:
    """The pictures of one prompt, in order.

    rotary: [prompt, 3] rotary positions (time, height, width) of models that have three, else None;
    behind the prompt all three are the plain position plus `shift`."""

    pictures: Sequence[Picture]
    rotary: IntArray | None = None
    shift: int = 0
    content_hashes: dict[int, bytes] = field(init=False)

    def __post_init__(self) -> None:
        # page -> what it holds beside its token ids: prefix caching must tell pictures apart
        self.content_hashes = {}
        for picture in self.pictures:
            last = picture.first + picture.length - 1
            for page in range(picture.first // PAGE, last // PAGE + 1):
                offset = (picture.first - page * PAGE).to_bytes(8, "little", signed=True)
                before = self.content_hashes.get(page, b"")
                self.content_hashes[page] = before + picture.key + offset

    def copy(self) -> Media:
        """Return the same pictures, to be encoded and forgotten on their own."""
        pictures = [replace(picture, embeddings=None) for picture in self.pictures]
        return Media(pictures, self.rotary, self.shift)

    def visual(self, end: int) -> int:
        """Return where the last picture's positions end that begins before `end`, or `end` if that
        lies within it; 0: none."""
        ends = (min(end, p.first + p.length) for p in self.pictures if p.first < end)
        return max(ends, default=0)

    @property
    def length(self) -> int:
        """Positions of all pictures."""
        return sum(picture.length for picture in self.pictures)

    def within(self, start: int, count: int) -> list[Picture]:
        """Return the pictures that have positions in [start, start + count)."""
        return [p for p in self.pictures if p.first < start + count and start < p.first + p.length]

    def to_encode(self, start: int, count: int) -> list[Picture]:
        """Return those among them whose embeddings are still to be computed."""
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
        """[count, 3] rotary positions from position `start` on, or None if they are the plain
        ones."""
        if self.rotary is None:
            return None
        plain = np.arange(start, start + count)
        behind = np.repeat(plain[:, None] + self.shift, 3, axis=1)
        inside = plain < len(self.rotary)
        behind[inside] = self.rotary[plain[inside]]
        return behind

    def release(self) -> None:
        """Drop pixels and embeddings: the request has ended, and may be looked at for long."""
        for picture in self.pictures:
            picture.pixels = picture.embeddings = None

    def forget(self) -> None:
        """Drop the embeddings: the target computes them again, or still has them, if they are
        needed again."""
        for picture in self.pictures:
            picture.embeddings = None
