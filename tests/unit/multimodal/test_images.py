"""Pictures in and errors out: every kind of source, every limit, one line each."""

from __future__ import annotations

import base64
import io
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from smart_decoding.errors import ConfigError, ModelError
from smart_decoding.multimodal.images import FORMATS, Limits, open_image
from smart_decoding.multimodal.messages import as_text, has_pictures, split
from smart_decoding.progress import quiet_transformers

SMALL = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))


def encoded(image: Image.Image = SMALL, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def data_url(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


@pytest.mark.parametrize("kind", FORMATS)
def test_all_formats_open_as_rgb(kind: str) -> None:
    image = open_image(encoded(kind=kind), Limits())
    assert (image.mode, image.size) == ("RGB", (30, 20))
    if kind in ("PNG", "BMP"):
        assert np.array_equal(np.asarray(image), np.asarray(SMALL))


def test_data_urls_files_and_pil_images_are_the_same_picture(tmp_path: Path) -> None:
    (tmp_path / "a b.png").write_bytes(encoded())
    limits = Limits(folder=tmp_path)
    path = tmp_path / "a b.png"
    for source in (
        data_url(encoded()),
        path,
        str(path),
        path.as_uri(),
        encoded(),
        SMALL,
        SMALL.convert("RGBA"),
    ):
        assert np.array_equal(np.asarray(open_image(source, limits)), np.asarray(SMALL))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_are_white(mode: str) -> None:
    """Black letters are read on white, as a page shows them. The height is of several bands."""
    alpha = Image.fromarray(np.tile(np.array([0, 255, 51], np.uint8), (600, 1)))
    image = Image.new(mode, alpha.size)
    image.putalpha(alpha)
    found = np.asarray(open_image(encoded(image), Limits()))
    np.testing.assert_array_equal(found, 255 - np.repeat(np.asarray(alpha)[..., None], 3, axis=2))


def test_a_transparent_colour_of_a_palette_is_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 9, 9, 9])
    image.putpixel((1, 0), 1)
    found = np.asarray(open_image(encoded(image, transparency=0), Limits()))
    assert found.tolist() == [[[255, 255, 255], [9, 9, 9]]]


def test_sixteen_bits_are_scaled_to_eight() -> None:
    grey = np.linspace(0, 65535, 256 * 20).astype(np.uint16).reshape(20, 256)
    found = np.asarray(open_image(encoded(Image.fromarray(grey)), Limits()))
    np.testing.assert_array_equal(found, np.repeat((grey >> 8)[..., None], 3, axis=2))


def test_pictures_are_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    assert open_image(encoded(kind="JPEG", exif=exif), Limits()).size == (20, 30)


def bomb() -> bytes:
    """A file of a few kilobytes that unpacks to 400 million pixels."""
    content = bytearray(encoded(Image.new("1", (64, 64))))
    content[16:24] = (20_000).to_bytes(4, "big") * 2  # the header's width and height
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


def damaged(kind: bytes, body: bytes) -> bytes:
    """A PNG with one more chunk behind its header, which Pillow reads as it opens the file."""
    whole = encoded(kind="PNG")
    chunk = len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
    return whole[:33] + chunk + whole[33:]


BAD = {
    "not an image": (b"hello", "corrupt or of an unsupported type"),
    "unsupported type": (encoded(kind="TIFF"), "unsupported type; supported: PNG, JPEG"),
    "truncated": (encoded(kind="PNG")[:-900], "corrupt or truncated"),
    "bomb": (bomb(), "exceeds the limit"),
    "short animation chunk": (damaged(b"acTL", b"\0"), "corrupt or of an unsupported type"),
    "text bomb": (
        damaged(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**8))),
        "corrupt or of an unsupported type",
    ),
    "many bytes": (bytes(2000), "exceeds the limit of 1500 bytes"),
    "empty": (b"", "corrupt"),
    "many pixels": (Image.new("RGB", (200, 100)), "200 x 100 pixels exceeds the limit of 10000"),
    "http": ("http://127.0.0.1/a.png", "are not fetched"),
    "https": ("HTTPS://example.com/a.png", "are not fetched"),
    "ftp": ("ftp://example.com/a.png", "ftp are not supported"),
    "no base64": ("data:image/png;base64,???", "not valid base64"),
    "no image": ("data:text/plain;base64,aGk=", "must begin with data:image/"),
    "long data": ("data:image/png;base64," + "A" * 4000, "limit of 1500 bytes"),
    "number": (7, "must be a URL, bytes or a PIL image, not int"),
    "no folder": ("/etc/passwd", "set allowed_local_media_path"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_picture_is_one_clear_error(name: str) -> None:
    source, message = BAD[name]
    with pytest.raises(ConfigError, match=message) as caught:
        open_image(
            source,
            Limits(pixels=10_000, bytes=1500 if "long" in name or "bytes" in name else 10**6),
        )
    assert "\n" not in str(caught.value)


def test_files_outside_the_allowed_folder_are_refused(tmp_path: Path) -> None:
    inside = tmp_path / "in"
    outside = tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    (outside / "a.png").write_bytes(encoded())
    (inside / "link.png").symlink_to(outside / "a.png")
    limits = Limits(folder=inside)
    for path in (
        outside / "a.png",
        inside / "link.png",
        inside / ".." / "out" / "a.png",
        "file:///etc/hostname",
    ):
        with pytest.raises(ConfigError, match="does not lie within"):
            open_image(str(path), limits)
    with pytest.raises(ConfigError, match="there is no image file"):
        open_image(inside / "none.png", limits)
    with pytest.raises(ConfigError, match="cannot read an image"):
        open_image("file://[x", limits)
    with pytest.raises(ConfigError, match="not allowed here"):
        open_image("file://[x", Limits())


@pytest.mark.parametrize("given", [{"audio": 1}, {"image": -1}, {"image": "x"}])
def test_limits_that_make_no_sense_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="limit_mm_per_prompt"):
        Limits(given)


def test_allowed_folder_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder"):
        Limits(folder=tmp_path / "none")


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": list(parts)}]


def test_content_parts_are_split_in_order() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:1", "detail": "low"}}
    rest = {"type": "image_pil", "image_pil": SMALL}, {"type": "video", "video": [SMALL, SMALL]}
    messages, pictures = split(user({"type": "text", "text": "a"}, image, "b", *rest))
    assert [part["type"] for part in messages[1]["content"]] == [
        "text",
        "image",
        "text",
        "image",
        "video",
    ]
    assert [(p.modality, p.source) for p in pictures] == [
        ("image", "data:1"),
        ("image", SMALL),
        ("video", [SMALL, SMALL]),
    ]
    texts = as_text(messages, {"image": "<image>", "video": "<video>"})
    assert [m["content"] for m in texts] == ["Be brief.", "a<image>\nb<image>\n<video>\n"]
    assert has_pictures(user(image))
    assert not has_pictures(user({"type": "text", "text": "a"}, "b"))


def test_texts_of_a_message_are_lines() -> None:
    image = {"type": "image", "image": SMALL}
    messages, _ = split(user("a", {"type": "text", "text": "b"}, image, "c", "d"))
    assert as_text(messages, {"image": "<image>"})[1]["content"] == "a\nb<image>\nc\nd"


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            {"type": "input_audio"},
            "type 'input_audio' is not supported; supported: text, image_url",
        ),
        ({"type": "text"}, "needs a text"),
        ({"type": "image_url", "image_url": {}}, "needs its image_url"),
        ({"type": "video", "video": []}, "needs its frames"),
        ({}, "type None is not supported"),
        (3, "must be a text or a list of parts"),
    ],
)
def test_malformed_parts_are_refused(part: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split(user(part))


def test_what_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("PIL", "transformers"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with (
                pytest.raises(ModelError, match=r"pip install -e '\.\[vision\]'"),
                quiet_transformers(),
            ):
                pass
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(
        ConfigError, match=r"images need pillow: in the clone, pip install -e '\.\[vision\]'"
    ):
        open_image(b"", Limits())
