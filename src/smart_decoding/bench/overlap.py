"""Whether training text contains benchmark prompts: shared runs of eight words."""

from __future__ import annotations

import re
from collections.abc import Iterable

_WORD = re.compile(r"[\w']+")


def ngrams(text: str, n: int = 8) -> set[tuple[str, ...]]:
    """All runs of `n` words of a text, lower case."""
    words = _WORD.findall(text.lower())
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def shared(prompts: Iterable[str], texts: Iterable[str], n: int = 8) -> set[tuple[str, ...]]:
    """Runs of `n` words that occur in a prompt and in a text."""
    wanted: set[tuple[str, ...]] = set().union(*(ngrams(prompt, n) for prompt in prompts))
    return set().union(*(ngrams(text, n) & wanted for text in texts))
