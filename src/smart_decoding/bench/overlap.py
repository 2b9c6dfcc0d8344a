"""Whether training text contains benchmark prompts: shared runs of eight words."""

from __future__ import annotations

import re

_WORD = re.compile(r"[\w']+")


def ngrams(text: str, n: int = 8) -> set[tuple[str, ...]]:
    """All runs of `n` words of a text, lower case."""
    words = _WORD.findall(text.lower())
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}
