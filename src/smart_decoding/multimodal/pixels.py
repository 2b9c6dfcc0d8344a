"""From a picture to the input of a vision tower: transformers' own image processors, in two steps.

The first step makes an image small, in bytes. The second, just before the tower, makes floats of
them, a dozen times as many bytes. Both together have the processor's bits. Of transformers' two
forms the PIL one is always used, so that an answer does not depend on other installed packages.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from smart_decoding.engine.media import Pixels
from smart_decoding.errors import ConfigError
from smart_decoding.files import reading
from smart_decoding.progress import quiet_transformers

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PADDED = 1 << 24  # pixels of the square that some processors pad an image to
# Options of a processor: to stop while values are bytes, and to go on from there.
_AS_BYTES = {"do_rescale": False, "do_normalize": False}
_FROM_BYTES = {"do_convert_rgb": False, "input_data_format": "channels_first"}


@dataclass(frozen=True, slots=True)
class Room:
    """The room that a picture takes. length: positions; bytes: as `Pixels`."""

    length: int
    bytes: int


class FixedReader:
    """LLaVA: every image is scaled to one size, and all take the same number of positions."""

    merge = 1

    def __init__(self, processor: Any, config: Any) -> None:
        vision = config.vision_config
        self._processor = processor
        self.placeholders: Mapping[str, int] = {"image": int(config.image_token_index)}
        self._patch = int(vision.patch_size)
        has_class_token = vision.model_type == "clip_vision_model"
        self._more = has_class_token - (config.vision_feature_select_strategy == "default")
        self._room: Room | None = None

    def room(self, modality: str, width: int, height: int, frames: int = 1) -> Room:
        """Return the room of a picture of this size. Raises ConfigError for a shape that the model
        cannot take."""
        if modality != "image":
            raise ConfigError("this model reads images, not videos")
        side = max(width, height)
        if side > 200 * min(width, height) or (self._processor.do_pad and side**2 > MAX_PADDED):
            raise _unusable(width, height, "its sides are too unlike")
        if self._room is None:  # the same for all
            grey = np.full((64, 64, 3), 127, np.uint8)
            pixels = self._pixels(self._processed(images=grey, **_AS_BYTES)["pixel_values"][0])
            self._room = Room(pixels.length, pixels.frames.nbytes)
        return self._room

    def image(self, image: Image) -> Pixels:
        """Raise ConfigError for a shape that the model cannot take."""
        self.room("image", *image.size)
        size = _plain_size(self._processor, *image.size)
        if size is None:
            values = self._processed(images=image, **_AS_BYTES)["pixel_values"][0]
        else:
            resized = image.resize(size, self._processor.resample)
            values = self._processed(images=resized, do_resize=False, **_AS_BYTES)["pixel_values"][
                0
            ]
        return self._pixels(values)

    def video_steps(self, frames: Iterable[Image]) -> Iterator[Pixels | None]:
        """Raise ConfigError."""
        raise ConfigError("this model reads images, not videos")

    def _pixels(self, values: NDArray[Any]) -> Pixels:
        rows, columns = (size // self._patch for size in values.shape[-2:])
        length = rows * columns + self._more
        return _pixels("image", values[None], (1, rows, columns), length, self._values)

    def _values(self, frames: NDArray[Any]) -> NDArray[np.float32]:
        done = {"do_resize": False, "do_center_crop": False, "do_pad": False}
        out = self._processed(images=frames[0], **done, **_FROM_BYTES)
        return np.asarray(out["pixel_values"][0], np.float32)

    def _processed(self, **options: Any) -> Mapping[str, Any]:
        return self._processor(return_tensors="np", **options)  # type: ignore[no-any-return]


class DynamicReader:
    """Qwen2-VL: an image keeps about its size, and takes one position for each 2 x 2 patches of 14
    x 14 pixels.

    A video's frames go two by two into the patches of one time step, where an image goes in
    twice."""

    def __init__(self, processor: Any, config: Any) -> None:
        self._processor = processor
        self.placeholders: Mapping[str, int] = {
            "image": int(config.image_token_id),
            "video": int(config.video_token_id),
        }
        self.merge = int(processor.merge_size)
        self._depth = int(processor.temporal_patch_size)
        self._side = int(processor.patch_size)

    def room(self, modality: str, width: int, height: int, frames: int = 1) -> Room:
        """Return the room of a picture of this size, turned or not. Raises ConfigError for a shape
        that the model cannot take."""
        new_width, new_height = self._size(width, height)
        steps = -(-frames // self._depth) if modality == "video" else 1
        patches = (new_width // self._side) * (new_height // self._side)
        return Room(steps * patches // self.merge**2, 3 * frames * new_width * new_height)

    def image(self, image: Image) -> Pixels:
        """Raise ConfigError for a shape that the model cannot take."""
        return self._pixels("image", self._resized(image)[None], 1, self._image_values)

    def video(self, frames: Iterable[Image]) -> Pixels:
        """Raise ConfigError for shapes that the model cannot take."""
        *_, pixels = self.video_steps(frames)
        assert pixels is not None
        return pixels

    def video_steps(self, frames: Iterable[Image]) -> Iterator[Pixels | None]:
        """Yield None after each frame, then the video. If `frames` is lazy, each step decodes one
        frame. Raises ConfigError as `video` does."""
        resized = []
        sizes = set()
        for frame in frames:
            sizes.add(frame.size)
            if len(sizes) > 1:
                raise ConfigError("the frames of a video must all have the same size")
            resized.append(self._resized(frame))
            del frame  # it may be large, and the next step may wait
            yield None
        steps = -(-len(resized) // self._depth)
        yield self._pixels("video", np.stack(resized), steps, self._video_values)

    def _resized(self, image: Image) -> NDArray[np.uint8]:
        """[3, height, width]."""
        resized = image.resize(self._size(*image.size), self._processor.resample)
        return np.moveaxis(np.asarray(resized), -1, 0)

    def _pixels(
        self,
        modality: str,
        frames: NDArray[np.uint8],
        steps: int,
        read: Callable[[NDArray[Any]], NDArray[np.float32]],
    ) -> Pixels:
        height, width = frames.shape[-2:]
        grid = (steps, height // self._side, width // self._side)
        return _pixels(modality, frames, grid, math.prod(grid) // self.merge**2, read)

    def _size(self, width: int, height: int) -> tuple[int, int]:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        if not self._processor.do_resize:
            return width, height
        size = self._processor.size
        lowest, highest = size["shortest_edge"], size["longest_edge"]
        try:
            factor = self._side * self.merge
            new_height, new_width = smart_resize(height, width, factor, lowest, highest)
        except ValueError as error:  # such as an aspect ratio beyond 200
            raise _unusable(width, height, error) from error
        return new_width, new_height

    def _image_values(self, frames: NDArray[Any]) -> NDArray[np.float32]:
        out = self._processor(images=frames[0], do_resize=False, return_tensors="np", **_FROM_BYTES)
        return np.ascontiguousarray(out["pixel_values"], np.float32)

    def _video_values(self, frames: NDArray[Any]) -> NDArray[np.float32]:
        padded = [*frames, *[frames[-1]] * (-len(frames) % self._depth)]
        outs = [self._image_values(frame[None]) for frame in padded]
        count, _ = outs[0].shape
        each = np.stack([out.reshape(count, -1, self._depth, self._side**2) for out in outs])
        steps = each[:, :, :, 0].reshape(-1, self._depth, *each.shape[1:3], each.shape[4])
        values = np.moveaxis(steps, 1, 3).reshape(len(steps) * count, -1)
        return np.ascontiguousarray(values, np.float32)


def _pixels(
    modality: str,
    frames: NDArray[Any],
    grid: tuple[int, int, int],
    length: int,
    read: Callable[[NDArray[Any]], NDArray[np.float32]],
) -> Pixels:
    frames = np.ascontiguousarray(frames)
    digest = hashlib.blake2b(frames.data, digest_size=16)
    digest.update(repr((modality, grid, frames.shape)).encode())
    return Pixels(modality, frames, grid, length, digest.digest(), read)


def _plain_size(processor: Any, width: int, height: int) -> tuple[int, int] | None:
    """Return the width and height of a processor's first resize; None if it pads too, or resizes
    by a rule of its own."""
    from transformers.image_processing_backends import PilBackend
    from transformers.image_transforms import (
        get_resize_output_image_size,
        get_size_with_aspect_ratio,
    )

    plain = type(processor).resize is PilBackend.resize and isinstance(processor.resample, int)
    if not (plain and processor.do_resize) or processor.do_pad:
        return None
    size = dict(processor.size)
    shortest, longest = size.get("shortest_edge"), size.get("longest_edge")
    if shortest and longest:
        new = get_size_with_aspect_ratio((height, width), shortest, longest)
    elif shortest:
        shape = np.broadcast_to(np.uint8(0), (3, height, width))
        new = get_resize_output_image_size(shape, shortest, False, None, "channels_first")
    elif size.get("height") and size.get("width"):
        new = (size["height"], size["width"])
    else:
        return None
    return int(new[1]), int(new[0])


def _unusable(width: int, height: int, reason: object) -> ConfigError:
    return ConfigError(f"an image of {width} x {height} pixels cannot be used: {reason}")


# Prepares pictures for one model. placeholders: their token ids by modality; merge: patches per
# position, along each side.
PixelReader: TypeAlias = FixedReader | DynamicReader


def load_reader(folder: Path, config: Any, options: Mapping[str, Any] | None = None) -> PixelReader:
    """Return the reader of a model's folder. config: transformers'; options: of its image
    processor, such as max_pixels.

    Raises ModelError for a folder without a usable image processor, ConfigError for unknown
    options."""
    with quiet_transformers():
        from transformers import AutoImageProcessor

        with reading(folder / "preprocessor_config.json"):
            load: Any = AutoImageProcessor.from_pretrained
            processor = load(folder, backend="pil", local_files_only=True, trust_remote_code=False)
            processor = _with_options(processor, options or {})
            if config.model_type == "qwen2_vl":
                return DynamicReader(processor, config)
            return FixedReader(processor, config)


def _with_options(processor: Any, options: Mapping[str, Any]) -> Any:
    if not options:
        return processor
    known = ["crop_size", "resample", "size"]
    if hasattr(processor, "merge_size"):
        known = ["max_pixels", "min_pixels"]
    for name in options:
        if name not in known:
            raise ConfigError(
                f"mm_processor_kwargs: {name!r} is unknown; this model has {', '.join(known)}"
            )
    return type(processor)(**{**processor.to_dict(), **options})
