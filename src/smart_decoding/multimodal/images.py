"""Pictures of prompts: data URLs, files within an allowed folder, bytes, PIL images.

Before a picture is decoded its size in bytes, its format, and the pixels in its header are checked.
"""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from smart_decoding.errors import ConfigError
from smart_decoding.files import expanded

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MODALITIES = ("image", "video")
_ORIENTATION = 0x0112  # in EXIF
_BAND = (
    256  # rows that are put on white at once, as a copy of all would take as much as the picture
)
_PLAIN = ("1", "L", "P", "RGB")  # modes that are RGB, or become it in little more memory


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a prompt's pictures. per_prompt: pictures by modality; folder: of local files, None
    for no files; pixels, bytes: of one picture; frames: of one video.

    A file that needs more memory may have fewer pixels: a WebP a quarter; a progressive JPEG, or a
    picture with transparency or other colours than RGB, half. turned: a picture to be turned
    upright, which is in memory twice, may have one in so many of the pixels."""

    per_prompt: Mapping[str, int] = field(default_factory=lambda: {"image": 16, "video": 1})
    folder: Path | None = None
    pixels: int = 50_000_000
    bytes: int = 32 * 2**20
    frames: int = 64
    turned: int = 1

    def __post_init__(self) -> None:
        for name, count in self.per_prompt.items():
            if name not in MODALITIES or not isinstance(count, int) or count < 0:
                raise ConfigError(
                    f"limit_mm_per_prompt: {name!r}: {count!r} is not allowed; "
                    "it maps image, video to counts"
                )
        if self.pixels < 1:
            raise ConfigError(
                f"max_image_pixels={self.pixels} is not allowed: it must be at least 1"
            )
        if self.folder is not None and not self.folder.is_dir():
            raise ConfigError(f"allowed_local_media_path: {self.folder} is not a folder")


def open_image(source: Any, limits: Limits) -> Image:
    """Return the picture in RGB, upright. source: URL, bytes or PIL image.

    Raises ConfigError for another type, a damaged picture, or one that exceeds the limits."""
    image = _opened(source, limits)
    from PIL import ImageOps

    is_open = image is source
    try:
        image.load()
        turned = image.getexif().get(_ORIENTATION, 1) != 1
        if turned and not is_open:
            _check_pixels(image, "a picture that must be turned", limits, limits.turned)
        # Without a copy where there is nothing to do: it may be large.
        return _in_rgb(ImageOps.exif_transpose(image) if turned else image)
    except ConfigError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and more
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"an image is corrupt or truncated: {reason}") from error


def _in_rgb(image: Image) -> Image:
    """Return the picture in RGB: 16 bits scaled to 8, transparent pixels on white."""
    pil = _pil()
    if image.mode.startswith("I;16"):  # Pillow's own conversion cuts them off at 255
        import numpy as np  # imported late: options need its limits alone

        image = pil.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    white: Image = pil.new("RGB", image.size, "white")
    for top in range(0, image.height, _BAND):
        box = (0, top, image.width, min(top + _BAND, image.height))
        band = image.crop(box).convert("RGBA")
        white.paste(band, box, band)
    return white


def header_size(source: Any, limits: Limits) -> tuple[int, int]:
    """Return the width and height in a picture's header, not turned upright. Raises ConfigError as
    `open_image` does, except for damage behind the header."""
    return _opened(source, limits).size


def _opened(source: Any, limits: Limits) -> Image:
    """Return the picture with only its header read."""
    pil = _pil()
    if isinstance(source, pil.Image):
        return _check_pixels(source, "an image", limits)
    content = source if isinstance(source, bytes) else _read(source, limits)
    if len(content) > limits.bytes:
        raise ConfigError(
            f"an image of {len(content)} bytes exceeds the limit of {limits.bytes} bytes"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures: ours is the limit
            return _check_file(pil.open(io.BytesIO(content), formats=FORMATS), limits)
    except pil.DecompressionBombError as error:
        raise ConfigError(
            f"an image exceeds the limit of {limits.pixels} pixels (max_image_pixels)"
        ) from error
    except ConfigError:
        raise
    except Exception as error:  # whatever a decoder raises for a damaged header
        known = ", ".join(FORMATS)
        raise ConfigError(
            f"an image is corrupt or of an unsupported type; supported: {known}"
        ) from error


def _check_file(image: Image, limits: Limits) -> Image:
    """Return the picture of a file, if its pixels are within the limits."""
    if image.format == "WEBP":
        return _check_pixels(image, "a WebP", limits, 4)
    if image.info.get("progressive"):
        return _check_pixels(image, "a progressive JPEG", limits, 2)
    if image.mode not in _PLAIN:
        return _check_pixels(image, f"an image in {image.mode}", limits, 2)
    return _check_pixels(image, "an image", limits)


def _check_pixels(image: Image, kind: str, limits: Limits, part: int = 1) -> Image:
    width, height = image.size
    most = limits.pixels // part
    if width * height > most:
        share = f"1/{part} of " if part > 1 else ""
        raise ConfigError(
            f"{kind} of {width} x {height} pixels exceeds the limit of {most} "
            f"({share}max_image_pixels={limits.pixels})"
        )
    return image


def _read(source: Any, limits: Limits) -> bytes:
    if not isinstance(source, str | Path):
        raise ConfigError(
            f"an image must be a URL, bytes or a PIL image, not {type(source).__name__}"
        )
    text = str(source)
    scheme = text.partition(":")[0].lower() if ":" in text else ""
    if scheme == "data":
        return _from_data_url(text, limits)
    if scheme in ("http", "https"):
        raise ConfigError(
            "image URLs of http and https are not fetched: send the picture itself as a data URL"
        )
    if scheme not in ("", "file"):
        raise ConfigError(f"image URLs of {scheme} are not supported: send a data URL")
    return _from_file(text, bool(scheme), limits)


def _from_data_url(url: str, limits: Limits) -> bytes:
    header, comma, data = url.partition(",")
    if not comma or not header.endswith(";base64") or not header.startswith("data:image/"):
        raise ConfigError("an image's data URL must begin with data:image/TYPE;base64,")
    if len(data) > limits.bytes * 4 // 3 + 4:
        raise ConfigError(
            f"an image's data URL of {len(data)} characters "
            f"exceeds the limit of {limits.bytes} bytes"
        )
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ConfigError(f"an image's data URL is not valid base64: {error}") from error


def read_file(path: Path, limits: Limits) -> bytes:
    """Return the file's content. Raises ConfigError for devices and for more than `limits.bytes`,
    OSError for a file that cannot be read."""
    if path.exists() and not path.is_file():
        raise ConfigError("an image must be a file")
    size = path.stat().st_size
    if size > limits.bytes:
        raise ConfigError(f"an image of {size} bytes exceeds the limit of {limits.bytes} bytes")
    return path.read_bytes()


def _from_file(name: str, is_url: bool, limits: Limits) -> bytes:
    """Return a file's content. Links are followed before the folder is checked."""
    if limits.folder is None:
        raise ConfigError(
            "local image files are not allowed here: set allowed_local_media_path to their folder"
        )
    try:
        path = expanded(unquote(urlsplit(name).path) if is_url else name).resolve()
        if not path.is_relative_to(limits.folder.resolve()):
            raise ConfigError(f"the image {path.name} does not lie within allowed_local_media_path")
        if not path.is_file():
            raise ConfigError(f"there is no image file {path}")
        return read_file(path, limits)
    except ConfigError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"cannot read an image: {error}") from error


def _pil() -> Any:
    try:
        import PIL.Image
    except ModuleNotFoundError as error:
        raise ConfigError("images need pillow: in the clone, pip install -e '.[vision]'") from error
    return PIL.Image
