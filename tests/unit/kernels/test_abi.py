"""What Python and the kernels exchange is described once, in abi.h, and both sides agree about
it."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest

from smart_decoding.errors import ConfigError
from smart_decoding.kernels import abi, library


@pytest.fixture
def header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of abi.h that a test may change. What was read of the real one is forgotten for a
    while."""
    copy = tmp_path / "abi.h"
    copy.write_text(abi.HEADER.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(abi, "HEADER", copy)
    monkeypatch.setattr(abi, "_bodies", abi._bodies.__wrapped__)
    monkeypatch.setattr(abi, "structure", abi.structure.__wrapped__)
    return copy


def change(header: Path, old: str, new: str) -> None:
    text = header.read_text(encoding="utf-8")
    assert text.count(old) == 1
    header.write_text(text.replace(old, new), encoding="utf-8")


def opened() -> ctypes.CDLL:
    """The library that runs, its functions not declared yet."""
    variant = next(variant for variant in library.variants() if variant.name == library.chosen())
    return ctypes.CDLL(str(variant.path))


def test_the_compilers_list_is_that_of_the_header() -> None:
    assert abi.LAYOUT.read_text(encoding="utf-8") == abi.layout_source()


def test_every_structure_and_field_of_the_header_is_compared() -> None:
    """Counted in the text itself, without the parser."""
    text = re.sub(r"//.*", "", abi.HEADER.read_text(encoding="utf-8"))
    bodies = re.findall(r"^struct \w+ \{(.*?)\};", text, re.MULTILINE | re.DOTALL)
    source = abi.layout_source()
    assert source.count("STRUCT(") == len(bodies) > 5
    assert source.count("FIELD(") == sum(body.count(";") + body.count(",") for body in bodies)


def test_every_function_of_the_header_is_in_every_library() -> None:
    declared = set(
        re.findall(
            r"\bsmart_\w+(?=\()", re.sub(r"//.*", "", abi.HEADER.read_text(encoding="utf-8"))
        )
    )
    assert len(declared) > 10
    assert declared == {name for _, name, _ in abi._FUNCTION.findall(abi._text())}
    runs = library.runnable()
    assert runs, library.unavailable()
    for name in runs:
        loaded = library.load(name)
        for function in declared:
            assert getattr(loaded, function).argtypes is not None


def test_an_unchanged_header_is_accepted(header: Path) -> None:
    abi.declare(opened())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("int32_t rows, requests;", "int64_t rows, requests;"),  # another size
        ("int32_t rows, requests;", "int32_t requests, rows;"),  # the same size in another order
        ("int32_t rows, requests;", "int32_t rows, requests, more;"),
    ],
)
def test_another_layout_is_refused(header: Path, old: str, new: str) -> None:
    change(header, old, new)
    with pytest.raises(
        ConfigError, match=r"lays structures out in another way: .* build the kernels again"
    ):
        abi.declare(opened())


def test_a_function_that_the_library_lacks_is_refused(header: Path) -> None:
    with header.open("a", encoding="utf-8") as file:
        file.write("\nvoid smart_not_there(int32_t count);\n")
    with pytest.raises(ConfigError, match=r"lacks smart_not_there: .* build the kernels again"):
        abi.declare(opened())
