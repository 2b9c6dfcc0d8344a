"""The header of a GGUF file: what a model says of itself, and where its tensors lie.

A header may be damaged, or made by a stranger: lengths are compared with the file's, and values are
counted. Its format is that of ggml, which describes it in a page gguf.md.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterator, Mapping
from contextlib import suppress
from math import prod
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, NamedTuple

from smart_decoding.errors import ModelError

HEAD = "eagle3"  # the architecture of files of draft heads
# What a header may have: single numbers, and values in arrays. The largest vocabularies have
# 850,000 in arrays: texts, types or scores, and merges.
_READS = 1 << 20
_VALUES = 1 << 21
_NUMBERS = {  # codes of `struct` and `array`, by the kind of a value
    **{0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i"},
    **{6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"},
}
_TEXT, _ARRAY = 8, 9
_GENERAL = "general."
_VOCABULARY = "tokenizer."  # entries that come last
_MTP = ".nextn_predict_layers"
# What llama.cpp's converter takes from generation_config.json, and the names there
_SAMPLING = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}


class StoredTensor(NamedTuple):
    """Where a tensor lies in its file. kind: GGML's name of its type. shape: rows first, as numpy
    has it; the file has columns first. offset, nbytes: bytes."""

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Metadata(Mapping[str, Any]):
    """Values of a header by key. An array of numbers becomes a list when it is read: until
    then it takes no memory but the file's."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        return value.tolist() if isinstance(value, memoryview) else value

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def read_gguf(path: Path) -> tuple[Metadata, dict[str, StoredTensor]]:
    """Return metadata by key, and tensors by name. Raises ModelError for a file that is shorter
    than its header says, or corrupt."""
    try:
        data = _mapped(path)
        header = _Header(data)
        tensor_count, entries = header.begin()
        values: dict[str, Any] = {}
        for _ in range(entries):
            values.setdefault(header.text(), header.value())
        tensors, need = _tensors(header, tensor_count, values.get("general.alignment", 32))
    except (ArithmeticError, LookupError, TypeError, ValueError, struct.error) as error:
        raise ModelError(
            f"{path} is no GGUF file, cut, damaged or of a kind not known here; fetch it again"
        ) from error
    if len(data) < need:
        raise ModelError(f"{path} was cut: {len(data):,} bytes of {need:,}; fetch it again")
    return Metadata(values), tensors


def own_words(path: Path) -> dict[str, str]:
    """Return the texts under `general.`, such as architecture and name, by the rest of their keys.

    Returns what was found before a damage: those who read the file report it."""
    texts = {key: value for key, value in _beginning(path).items() if isinstance(value, str)}
    return {k.removeprefix(_GENERAL): text for k, text in texts.items() if k.startswith(_GENERAL)}


def recommended_sampling(path: Path) -> dict[str, Any]:
    """Return the sampling that a file recommends, in generation_config.json's names. Values may be
    anything."""
    found = _beginning(path)
    return {name: _rounded(found[key]) for key, name in _SAMPLING.items() if key in found}


def has_mtp(path: Path) -> bool:
    """Return whether a file has layers for multi-token prediction."""
    return any(key.endswith(_MTP) and value for key, value in _beginning(path).items())


def is_head_file(path: Path) -> bool:
    """Return whether a file is a GGUF file of a draft head."""
    return own_words(path).get("architecture") == HEAD


def _rounded(value: str | float) -> str | float:
    """Return what was meant by a number of 32 bits: 0.95, not 0.949999988079071."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _beginning(path: Path) -> dict[str, str | float]:
    """Return texts and numbers before the vocabulary, which is not read, so that this takes no
    time."""
    found: dict[str, str | float] = {}
    with suppress(OSError, ValueError, LookupError, OverflowError, struct.error):
        header = _Header(_mapped(path))
        _, entries = header.begin()
        for _ in range(entries):
            key = header.text()
            if key.startswith(_VOCABULARY):
                break
            value = header.value()
            if isinstance(value, str | float | int):
                found[key] = value
    return found


def _mapped(path: Path) -> memoryview:
    with path.open("rb") as file:
        return memoryview(mmap(file.fileno(), 0, access=ACCESS_READ))


class _Header:
    """A place in the bytes of a file. Raises ValueError, LookupError or struct.error at their end,
    and for what is no header."""

    def __init__(self, data: memoryview) -> None:
        self.at = 4
        self._data = data
        self._order = "<"
        self._reads = 0
        self._values = 0

    def begin(self) -> tuple[int, int]:
        """Return the numbers of tensors and of entries."""
        if bytes(self._data[:4]) != b"GGUF":
            raise ValueError("no GGUF file")
        if struct.unpack_from("<I", self._data, self.at)[0] >= 1 << 16:
            self._order = ">"
        if self.number("I") not in (2, 3):
            raise ValueError("another version")
        return self.number("Q"), self.number("Q")

    def number(self, code: str) -> Any:
        """Return the next number of a type of `struct`."""
        self._reads += 1
        if self._reads > _READS:
            raise ValueError("a header that does not end")
        form = self._order + code
        (found,) = struct.unpack_from(form, self._data, self.at)
        self.at += struct.calcsize(form)
        return found

    def text(self) -> str:
        """Return the next text."""
        (found,) = self._texts(1)
        return found

    def value(self) -> Any:
        """Return the next value: a text, a number, or an array. Raises ValueError for arrays of
        arrays."""
        kind = self.number("I")
        if kind == _TEXT:
            return self.text()
        return self._array() if kind == _ARRAY else self.number(_NUMBERS[kind])

    def _array(self) -> list[str] | memoryview[Any]:
        """Return texts, or numbers as a view of the file."""
        kind, count = self.number("I"), self.number("Q")
        self._values += count
        if self._values > _VALUES:
            raise ValueError("a header that does not end")
        if kind == _TEXT:
            return self._texts(count)
        code: Any = _NUMBERS[kind]
        end = self.at + struct.calcsize(code) * count
        if end > len(self._data):
            raise ValueError("a header that does not end")
        numbers: memoryview[Any] = self._data[self.at : end].cast(code)
        self.at = end
        if (self._order == "<") is not (sys.byteorder == "little") and code != "?":
            swapped = array(code, numbers)
            swapped.byteswap()
            return memoryview(swapped)
        return numbers

    def _texts(self, count: int) -> list[str]:
        found = []
        at = self.at
        length_of = struct.Struct(f"{self._order}Q").unpack_from
        for _ in range(count):
            start = at + 8
            at = start + length_of(self._data, at)[0]
            if at > len(self._data):
                raise ValueError("a header that does not end")
            found.append(str(self._data[start:at], "utf-8"))
        self.at = at
        return found


def _tensors(header: _Header, count: int, alignment: Any) -> tuple[dict[str, StoredTensor], int]:
    """Return the tensors by name, and how many bytes the file must have."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType  # imported late: it is slow

    found = {}
    for _ in range(count):
        name = header.text()
        columns_first = [header.number("Q") for _ in range(header.number("I"))]
        kind = GGMLQuantizationType(header.number("I"))
        elements, size = GGML_QUANT_SIZES[kind]
        nbytes = prod(columns_first) // elements * size
        if name in found:
            raise ValueError(f"two tensors {name}")
        shape = (*reversed(columns_first),)
        found[name] = StoredTensor(name, kind.name, shape, header.number("Q"), nbytes)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"an alignment of {alignment!r}")
    start = -(-header.at // alignment) * alignment
    placed = {name: each._replace(offset=start + each.offset) for name, each in found.items()}
    return placed, max((each.offset + each.nbytes for each in placed.values()), default=start)
