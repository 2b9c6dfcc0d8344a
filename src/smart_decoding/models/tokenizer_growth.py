"""By how much a tokenizer.json can lengthen a text, counted before the file is used.

The tokenizers library ends the process where its memory ends: 40 replacements of a letter by two
make 10^12 letters of one. What the file's parts can do at worst is counted here: each by itself,
and parts that follow each other multiply.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

# Bytes of a text for one that is given. Published models reach 1500 at worst, and 3 in truth.
_MOST_ENCODED = 10_000.0
_MOST_DECODED = 100.0
_MOST_TOKENS = 1000  # for one, or added to a text, by what adds a beginning and an end
_SEQUENCES = ("normalizers", "pretokenizers", "decoders", "processors")
# The longest that Unicode makes of a character, and what stands for a byte in byte-level encodings.
_FACTORS = {"NFC": 3, "NFD": 3, "NFKC": 11, "NFKD": 11, "Lowercase": 2, "ByteLevel": 4}
_METASPACE = 4  # a mark of three bytes before a word


def check_growth(content: Mapping[str, Any]) -> float:
    """Bytes that encoding can make of a byte of text, by the contents of a tokenizer.json.

    Raises ValueError for a file that multiplies without a sensible bound, and any error for one
    that is malformed."""
    encoded = _growth(content.get("normalizer")) * _growth(content.get("pre_tokenizer"))
    decoded = _growth(content.get("decoder"))
    tokens = _growth(content.get("post_processor"))
    if encoded > _MOST_ENCODED or decoded > _MOST_DECODED or tokens > _MOST_TOKENS:
        raise ValueError("it multiplies texts without bound")
    return encoded


def _growth(part: Any) -> float:
    """Of a part with all that is in it. Old files leave out its type: its entries tell, too."""
    if not isinstance(part, Mapping):
        return 1.0
    return prod(_factors(part), start=1.0)


def _factors(part: Mapping[str, Any]) -> Iterator[float]:
    for name in _SEQUENCES:
        yield from map(_growth, part.get(name) or ())
    if "trim_offsets" in part:
        yield _FACTORS["ByteLevel"]
    else:
        yield _FACTORS.get(str(part.get("type")), 1)
    if "pattern" in part and "content" in part:
        yield _replaced(part["pattern"], part["content"])
    if "prepend" in part:
        yield 1 + _bytes(part["prepend"])
    if "replacement" in part:
        yield _METASPACE
    if "precompiled_charsmap" in part:
        yield _longest_of(part["precompiled_charsmap"])
    if "single" in part:
        yield _pieces(part)


def _replaced(pattern: Mapping[str, str], content: str) -> float:
    """A regular expression may match between any two characters."""
    if pattern.get("String"):
        return max(1.0, _bytes(content) / _bytes(pattern["String"]))
    return 1 + _bytes(content)


def _longest_of(charsmap: str) -> float:
    """Of SentencePiece's table: four bytes say how long its index is, then come what characters are
    replaced by, each with a zero at its end."""
    table = base64.b64decode(charsmap)
    index = int.from_bytes(table[:4], "little")
    if index > len(table):
        raise ValueError("precompiled_charsmap is cut")
    return max(1, *map(len, table[4 + index :].split(b"\0")))


def _pieces(part: Mapping[str, Any]) -> float:
    """Tokens of a template: the text's, once for each place, and special ones."""
    added = part.get("special_tokens") or {}
    special = [piece["SpecialToken"]["id"] for piece in part["single"] if "SpecialToken" in piece]
    places = len(part["single"]) - len(special)
    return max(1, places) + sum(len(added[name]["ids"]) for name in special)


def _bytes(text: str) -> int:
    return len(text.encode())
