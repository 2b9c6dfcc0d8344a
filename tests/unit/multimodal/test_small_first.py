"""Pictures are made small before they are floats: the processors' bits, at a fraction of memory."""

from __future__ import annotations

import io
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from smart_decoding.errors import ConfigError
from smart_decoding.multimodal.images import Limits, header_size, open_image
from smart_decoding.multimodal.pixels import DynamicReader, FixedReader, PixelReader

CLIP: dict[str, Any] = {"crop_size": {"height": 56, "width": 56}}
PROCESSORS: dict[str, Callable[[], Any]] = {
    "clip": lambda: CLIPImageProcessorPil(size={"shortest_edge": 56}, **CLIP),
    "clip, to a square": lambda: CLIPImageProcessorPil(size={"height": 56, "width": 56}, **CLIP),
    "clip, both edges": lambda: CLIPImageProcessorPil(
        size={"shortest_edge": 60, "longest_edge": 90}, **CLIP
    ),
    "llava, padded": lambda: LlavaImageProcessorPil(
        size={"shortest_edge": 56}, do_pad=True, **CLIP
    ),
    "qwen2-vl": lambda: Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=112 * 112),
    "qwen2-vl, larger": lambda: Qwen2VLImageProcessorPil(min_pixels=300 * 300),
}


def reader_of(name: str) -> tuple[Any, PixelReader]:
    processor = PROCESSORS[name]()
    if name.startswith("qwen"):
        config = SimpleNamespace(image_token_id=1, video_token_id=2)
        return processor, DynamicReader(processor, config)
    vision = SimpleNamespace(patch_size=14, model_type="clip_vision_model")
    config = SimpleNamespace(
        vision_config=vision, image_token_index=1, vision_feature_select_strategy="default"
    )
    return processor, FixedReader(processor, config)


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    shape = (height, width, 4)
    values = np.random.default_rng(width).integers(0, 256, shape, np.uint8)
    return Image.fromarray(values).convert(mode)


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", [(41, 30), (30, 77), (300, 200), (56, 56), (9, 200), (64, 64)])
def test_two_steps_have_the_bits_of_one(name: str, size: tuple[int, int]) -> None:
    processor, reader = reader_of(name)
    image = noise(*size)
    expected = processor(images=image, return_tensors="np")
    found = reader.image(image)
    values = expected["pixel_values"] if name.startswith("qwen") else expected["pixel_values"][0]
    np.testing.assert_array_equal(found.values, values)
    assert found.values.dtype == np.float32
    assert found.frames.dtype == np.uint8
    room = reader.room("image", *size)
    assert (room.length, room.bytes) == (found.length, found.frames.nbytes)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "CMYK"])
def test_all_modes_and_orientations(mode: str, orientation: int) -> None:
    processor, reader = reader_of("qwen2-vl")
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    noise(50, 120, mode).save(buffer, "JPEG" if mode == "CMYK" else "PNG", exif=exif)
    content = buffer.getvalue()
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGBA")
    plain = Image.alpha_composite(Image.new("RGBA", turned.size, "white"), turned).convert("RGB")
    np.testing.assert_array_equal(open_image(content, Limits()), plain)
    expected = processor(images=plain, return_tensors="np")
    found = reader.image(open_image(content, Limits()))
    np.testing.assert_array_equal(found.values, expected["pixel_values"])
    assert [list(found.grid)] == expected["image_grid_thw"].tolist()
    width, height = header_size(content, Limits())
    assert reader.room("image", width, height).length == found.length


@pytest.mark.parametrize("name", ["clip", "llava, padded", "qwen2-vl"])
def test_shapes_that_would_become_huge_are_refused_by_their_header(name: str) -> None:
    _, reader = reader_of(name)
    with pytest.raises(ConfigError, match="an image of 2 x 900 pixels cannot be used"):
        reader.room("image", 2, 900)
    if name == "llava, padded":
        with pytest.raises(ConfigError, match="its sides are too unlike"):
            reader.room("image", 100, 10_000)


def saved(mode: str, size: tuple[int, int], kind: str, turned: bool = False, **more: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6 if turned else 1
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind, exif=exif, **more)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "given",
    [
        {"kind": "WEBP", "share": 4},
        {"kind": "JPEG", "progressive": True},
        {"kind": "JPEG", "mode": "CMYK"},
        {"kind": "JPEG", "turned": True},
        {"kind": "PNG", "mode": "RGBA"},
        {"kind": "PNG", "mode": "LA"},
    ],
)
def test_what_needs_more_memory_has_fewer_pixels(given: dict[str, Any]) -> None:
    given = dict(given)
    share = given.pop("share", 2)
    content = saved(**{"mode": "RGB", "size": (100, 60), **given})
    limits = Limits(pixels=share * 6000, turned=2)
    assert open_image(content, limits).size in ((100, 60), (60, 100))
    words = f"exceeds the limit of 5999 .1/{share} of max_image_pixels={share * 6000 - 1}"
    with pytest.raises(ConfigError, match=f"100 x 60 pixels {words}"):
        open_image(content, Limits(pixels=share * 6000 - 1, turned=2))


def test_a_turned_photo_has_all_of_the_pixels_outside_of_a_server() -> None:
    content = saved("RGB", (100, 60), "JPEG", turned=True)
    assert open_image(content, Limits(pixels=6000)).size == (60, 100)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_plain_pictures_have_all_of_the_pixels(mode: str) -> None:
    assert open_image(saved(mode, (100, 60), "PNG"), Limits(pixels=6000)).size == (100, 60)


def test_a_header_costs_nothing() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (7000, 7000)).save(buffer, "PNG")
    tracemalloc.start()
    assert header_size(buffer.getvalue(), Limits()) == (7000, 7000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000


@pytest.mark.parametrize(
    ("side", "given"),
    [
        (7071, {"kind": "PNG"}),
        (7071, {"kind": "PNG", "mode": "P"}),
        (7071, {"kind": "JPEG"}),
        (5000, {"kind": "JPEG", "progressive": True}),
        (5000, {"kind": "JPEG", "turned": True}),
        (5000, {"kind": "PNG", "mode": "RGBA"}),
        (5000, {"kind": "PNG", "mode": "LA"}),
        (3535, {"kind": "WEBP"}),
    ],
)
def test_the_largest_picture_costs_less_than_256_mebibytes(
    side: int, given: dict[str, Any]
) -> None:
    """Beside what is there before."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs Linux")
    _, reader = reader_of("qwen2-vl")
    content = saved(**{"mode": "RGB", "size": (side, side), **given})
    assert len(content) < 2**20
    reader.image(open_image(noise(100, 100), Limits()))  # imports
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
    before = _kilobytes("VmRSS")
    reader.image(open_image(content, Limits()))
    assert (_kilobytes("VmHWM") - before) / 1024 < 256


def _kilobytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def test_the_key_tells_pictures_apart() -> None:
    _, reader = reader_of("qwen2-vl")
    keys = {reader.image(noise(*size)).key for size in ((60, 60), (61, 60), (60, 60))}
    assert len(keys) == 2
