"""What a GGUF file says of itself: the texts under `general.` at the beginning of its header."""

from __future__ import annotations

import struct
from contextlib import suppress
from pathlib import Path

HEAD = "eagle3"  # the architecture of files of draft heads
_READ = 1 << 20  # bytes: what comes before the vocabulary takes a few thousand
_ENTRIES = 1 << 12
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # by kind of value
_TEXT = 8
_ARRAY = 9
_GENERAL = "general."
_VOCABULARY = "tokenizer."  # entries that come last


def own_words(path: Path) -> dict[str, str]:
    """Return the texts under `general.`, such as architecture and name, by the rest of their keys.

    The vocabulary is not read, so that this takes no time. Returns what was found before a damage:
    those who read the file report it."""
    found: dict[str, str] = {}
    with suppress(OSError, ValueError, LookupError, struct.error):
        with path.open("rb") as file:
            header = _Header(file.read(_READ))
        for _ in range(min(header.begin(), _ENTRIES)):
            key = header.text()
            if key.startswith(_VOCABULARY):
                break
            kind = header.number("<I")
            if kind == _TEXT and key.startswith(_GENERAL):
                found[key.removeprefix(_GENERAL)] = header.text()
            else:
                header.skip(kind)
    return found


def is_head_file(path: Path) -> bool:
    """Return whether a file is a GGUF file of a draft head."""
    return own_words(path).get("architecture") == HEAD


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
        return self.number("<Q")

    def number(self, form: str) -> int:
        """Return the next number."""
        (number,) = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return int(number)

    def text(self) -> str:
        """Return the next text."""
        length = self.number("<Q")
        end = self._at + length
        if end > len(self._data):
            raise ValueError("a header that does not end")
        text = self._data[self._at : end].decode()
        self._at = end
        return text

    def skip(self, kind: int) -> None:
        """Go behind a value."""
        if kind == _TEXT:
            self.text()
        elif kind == _ARRAY:
            each, count = self.number("<I"), self.number("<Q")
            if each == _TEXT:
                for _ in range(count):
                    self.text()
            else:
                self._at += _SIZES[each] * count
        else:
            self._at += _SIZES[kind]
