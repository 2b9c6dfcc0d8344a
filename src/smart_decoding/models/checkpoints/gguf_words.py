"""What a GGUF file says of itself at the beginning of its header, before the vocabulary."""

from __future__ import annotations

import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

HEAD = "eagle3"  # the architecture of files of draft heads
_READ = 1 << 20  # bytes: what comes before the vocabulary takes a few thousand
_ENTRIES = 1 << 12
_FORMS = {  # of a value, by its kind
    **{0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i"},
    **{6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"},
}
_TEXT = 8
_ARRAY = 9
_GENERAL = "general."
_MTP = ".nextn_predict_layers"
# What llama.cpp's converter takes from generation_config.json, and the names there
_SAMPLING = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
_VOCABULARY = "tokenizer."  # entries that come last


def own_words(path: Path) -> dict[str, str]:
    """Return the texts under `general.`, such as architecture and name, by the rest of their keys.

    Returns what was found before a damage: those who read the file report it."""
    texts = {key: value for key, value in _entries(path).items() if isinstance(value, str)}
    return {k.removeprefix(_GENERAL): text for k, text in texts.items() if k.startswith(_GENERAL)}


def recommended_sampling(path: Path) -> dict[str, Any]:
    """Return the sampling that a file recommends, in generation_config.json's names. Values may be
    anything."""
    found = _entries(path)
    return {name: _rounded(found[key]) for key, name in _SAMPLING.items() if key in found}


def _rounded(value: str | float) -> str | float:
    """Return what was meant by a number of 32 bits: 0.95, not 0.949999988079071."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def has_mtp(path: Path) -> bool:
    """Return whether a file has layers for multi-token prediction."""
    return any(key.endswith(_MTP) and value for key, value in _entries(path).items())


def is_head_file(path: Path) -> bool:
    """Return whether a file is a GGUF file of a draft head."""
    return own_words(path).get("architecture") == HEAD


def _entries(path: Path) -> dict[str, str | float]:
    """Return texts and numbers before the vocabulary, which is not read, so that this takes no
    time."""
    found: dict[str, str | float] = {}
    with suppress(OSError, ValueError, LookupError, OverflowError, struct.error):
        with path.open("rb") as file:
            header = _Header(file.read(_READ))
        for _ in range(min(header.begin(), _ENTRIES)):
            key = header.text()
            if key.startswith(_VOCABULARY):
                break
            value = header.value(int(header.number("<I")))
            if value is not None:
                found[key] = value
    return found


class _Header:
    """A place in the bytes of a header. Raises ValueError, LookupError or struct.error at their
    end, and for what is no header."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def begin(self) -> int:
        """Return the number of entries."""
        if self._data[:4] != b"GGUF":
            raise ValueError("no GGUF file")
        self._at = 4
        if self.number("<I") not in (2, 3):
            raise ValueError("another version, or order of bytes")
        self.number("<Q")  # tensors
        return int(self.number("<Q"))

    def number(self, form: str) -> float:
        """Return the next number."""
        (number,) = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        found: float = number
        return found

    def text(self) -> str:
        """Return the next text."""
        length = int(self.number("<Q"))
        end = self._at + length
        if end > len(self._data):
            raise ValueError("a header that does not end")
        text = self._data[self._at : end].decode()
        self._at = end
        return text

    def value(self, kind: int) -> str | float | None:
        """Return a value; None for a list, which is left out."""
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            return self.number(_FORMS[kind])
        each, count = int(self.number("<I")), int(self.number("<Q"))
        if each == _TEXT:
            for _ in range(count):
                self.text()
        else:
            self._at += struct.calcsize(_FORMS[each]) * count
        return None
