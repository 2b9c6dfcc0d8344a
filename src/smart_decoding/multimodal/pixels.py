"""From a picture to what a vision tower reads: transformers' own image processors, in their PIL
form.

Of the two forms that transformers has, the same one is used whatever else is installed, so that an
answer depends on the picture alone.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from smart_decoding.errors import ConfigError, ModelError
from smart_decoding.files import reading

if TYPE_CHECKING:
    from PIL.Image import Image

NEEDED = (
    "vision-language models need transformers and pillow: in the clone, pip install -e '.[vision]'"
)


@dataclass(frozen=True, slots=True)
class Pixels:
    """One image or video, ready for the tower. values: float32, LLaVA's [channels, height, width]
    or Qwen2-VL's patches [time * height * width, patch]; grid: (time, height, width) in patches;
    length: positions that it takes."""

    modality: str
    values: NDArray[np.float32]
    grid: tuple[int, int, int]
    length: int

    @property
    def key(self) -> bytes:
        """Stands for the content: pictures with the same key have the same embeddings."""
        digest = hashlib.blake2b(np.ascontiguousarray(self.values).data, digest_size=16)
        digest.update(repr((self.modality, self.grid, self.values.shape)).encode())
        return digest.digest()


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

    def image(self, image: Image) -> Pixels:
        """Raises ConfigError for a shape that the model cannot take."""
        values = _processed(self._processor, image)["pixel_values"][0]
        rows, columns = (size // self._patch for size in values.shape[-2:])
        return Pixels("image", values, (1, rows, columns), rows * columns + self._more)

    def video(self, frames: Sequence[Image]) -> Pixels:
        """Raises ConfigError."""
        raise ConfigError("this model reads images, not videos")


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

    def image(self, image: Image) -> Pixels:
        """Raises ConfigError for a shape that the model cannot take."""
        out = _processed(self._processor, image)
        return self._pixels("image", out["pixel_values"], out["image_grid_thw"][0])

    def video(self, frames: Sequence[Image]) -> Pixels:
        """Raises ConfigError for shapes that the model cannot take."""
        if len({frame.size for frame in frames}) > 1:
            raise ConfigError("the frames of a video must all have the same size")
        padded = [*frames, *[frames[-1]] * (-len(frames) % self._depth)]
        outs = [_processed(self._processor, frame) for frame in padded]
        count, _ = outs[0]["pixel_values"].shape
        area = int(self._processor.patch_size) ** 2
        each = np.stack([out["pixel_values"].reshape(count, -1, self._depth, area) for out in outs])
        steps = each[:, :, :, 0].reshape(-1, self._depth, *each.shape[1:3], each.shape[4])
        values = np.moveaxis(steps, 1, 3).reshape(len(steps) * count, -1)
        _, height, width = outs[0]["image_grid_thw"][0]
        return self._pixels("video", values, (len(steps), height, width))

    def _pixels(self, modality: str, values: NDArray[np.float32], grid: Sequence[int]) -> Pixels:
        time, height, width = (int(n) for n in grid)
        values = np.ascontiguousarray(values, np.float32)
        length = time * height * width // self.merge**2
        return Pixels(modality, values, (time, height, width), length)


# What prepares pictures for one model. placeholders: their token ids by modality; merge: patches
# per position, along each side.
PixelReader: TypeAlias = FixedReader | DynamicReader


def load_reader(folder: Path, config: Any, options: Mapping[str, Any] | None = None) -> PixelReader:
    """The reader of a model's folder. config: transformers'; options: of its image processor, such
    as max_pixels.

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


def _processed(processor: Any, image: Image) -> Mapping[str, Any]:
    try:
        return processor(images=image, return_tensors="np")  # type: ignore[no-any-return]
    except ValueError as error:  # such as an aspect ratio beyond 200
        raise ConfigError(
            f"an image of {image.size[0]} x {image.size[1]} pixels cannot be used: {error}"
        ) from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Imports and loads without notices about what else could be installed; ModelError if
    transformers is not."""
    logger = logging.getLogger("transformers")
    level = logger.level
    try:
        import transformers.utils.logging  # noqa: F401  # it sets the level

        level = logger.level
        logger.setLevel(logging.ERROR)
        import PIL  # noqa: F401

        yield
    except ModuleNotFoundError as error:
        if error.name in ("transformers", "PIL"):
            raise ModelError(NEEDED) from error
        raise
    finally:
        logger.setLevel(level)
