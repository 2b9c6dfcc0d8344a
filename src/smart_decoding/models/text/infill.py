"""Filling in the middle: prompts made of the text before and behind a gap, by special tokens that
models for code were trained with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from smart_decoding.models.text.tokenizer import Tokenizer

# Before the prefix, before the suffix, before the middle: by family.
_MARKS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen-Coder, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
    ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>"),  # Code Llama
    ("<PRE>", "<SUF>", "<MID>"),
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),  # GLM
)
_FILES = ("<|file_sep|>", "<|file_separator|>", "<file_sep>")
_REPOSITORIES = ("<|repo_name|>", "<repo_name>", "<reponame>")
_PADDING = ("<|fim_pad|>", "<fim_pad>", "<fim-pad>")
_ENDS = ("<|endoftext|>", "<EOT>", "\u2581<EOT>", "<\uff5cend\u2581of\u2581sentence\uff5c>")


@dataclass(frozen=True, slots=True)
class InfillTokens:
    """The tokens of one vocabulary: those before the three parts; what a text begins with; what
    comes before a repository's name and a file's (None: there are none); what ends an answer."""

    prefix: int
    suffix: int
    middle: int
    begin: tuple[int, ...]
    repository: int | None
    file: int | None
    ends: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> InfillTokens | None:
        """Return a tokenizer's: as its files name them, else by the names that are known; None if
        it has none."""
        names = [tokenizer.specials.get(f"{part}_token") for part in ("prefix", "suffix", "middle")]
        named = [tuple(name for name in names if name is not None)]
        marks = next(filter(None, (_ids(tokenizer, each) for each in (*named, *_MARKS))), None)
        if marks is None:
            return None
        known = {name: tokenizer.backend.token_to_id(name) for name in (*_REPOSITORIES, *_FILES)}
        more = (tokenizer.backend.token_to_id(name) for name in (*_PADDING, *_ENDS))
        found = (*marks, *known.values(), *more)
        return cls(
            *marks,
            begin=tuple(tokenizer.encode("")),
            repository=_first(known[name] for name in _REPOSITORIES),
            file=_first(known[name] for name in _FILES),
            ends=tuple(dict.fromkeys(token for token in found if token is not None)),
        )

    def prompt(
        self, before: Sequence[int], behind: Sequence[int], extra: Sequence[int] = ()
    ) -> list[int]:
        """Return the prompt of a gap. extra: tokens of other texts, such as other files."""
        parts = (extra, [self.prefix], before, [self.suffix], behind, [self.middle])
        return [*self.begin, *(token for part in parts for token in part)]


def _ids(tokenizer: Tokenizer, names: Sequence[str]) -> tuple[int, int, int] | None:
    ids = [tokenizer.backend.token_to_id(name) for name in names]
    match [id_ for id_ in ids if id_ is not None]:
        case [prefix, suffix, middle]:
            return prefix, suffix, middle
    return None


def _first(ids: Iterable[int | None]) -> int | None:
    return next((id_ for id_ in ids if id_ is not None), None)
