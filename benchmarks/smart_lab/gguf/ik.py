"""ik_llama.cpp, a cousin of llama.cpp: its server has other flags, tunes its speculation itself,
and answers with texts, which our tokenizer turns back into tokens.

Needed by `gguf-speed --ik-llama-cpp`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smart_decoding.integrations.tuning import huge_pages
from smart_decoding.integrations.tuning.settings import PLAIN, Setting
from smart_lab.gguf.server import SERVER, Program, origin, require
from smart_lab.gguf.tuning import NGRAM, TokenServers, Tuned
from smart_lab.gguf.tuning import tuned as plain_tuned

if TYPE_CHECKING:
    from smart_decoding.integrations.tuning.found import Found

NAME = "ik_llama.cpp"
SUFFIX = "suffix"
AUTOTUNE = "--spec-autotune"  # of the length of drafts, and for suffixes of the match
# As long as what wins in llama.cpp; the default waits for twelve equal tokens.
NGRAMS = "ngram-simple:n_max=24,ngram_size_n=4,ngram_size_m=24"
MODES: Mapping[str, tuple[str, ...]] = {
    PLAIN: (),
    NGRAM: ("--spec-type", NGRAMS, AUTOTUNE),
    SUFFIX: ("--spec-type", "suffix", AUTOTUNE),
}
CHANGES = (("--run-time-repack",), ("--flash-attn", "off"))  # of plain decoding
Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class IkLlamaCpp:
    """The folder of its server. Raises ConfigError if it is missing."""

    folder: Path

    def __post_init__(self) -> None:
        require(self.folder, (SERVER,))

    def program(self, encode: Encode, end: int) -> Program:
        """Return its server. encode: our tokenizer; end: the token that ends an answer."""
        command = (str(self.folder / SERVER), "--log-disable")  # it would leave a file here
        return Program(NAME, command, partial(tokens_of, encode, end))

    def about(self) -> dict[str, Any]:
        """Return its version and build."""
        return origin(self.folder)


def tokens_of(encode: Encode, end: int, answer: Mapping[str, Any]) -> list[int]:
    """Return the tokens of an answer's text, and the one that ended it."""
    return encode(answer["content"]) + [end] * bool(answer["stopped_eos"])


class IkServers(TokenServers):
    """The cousin for the search: few flags of plain decoding, which all modes have. Its own tuning
    finds the rest."""

    name = NAME

    def stages(self, loads: Sequence[int], found: Found) -> Iterator[list[Setting]]:
        """Yield huge pages, then its changes by themselves and together."""
        (load,) = loads
        huge = huge_pages.variable()
        if huge:
            yield [Setting(base=huge)]
        before = found.base[load].base
        both = tuple(word for change in CHANGES for word in change)
        yield [Setting(base=(*before, *change)) for change in (*CHANGES, both)]


def tuned(found: Found, slots: int, always: Sequence[str]) -> Tuned:
    """Return the best flags of its modes: it speculates for one slot only."""
    best = found.base[slots]
    modes = MODES if slots == 1 else {PLAIN: MODES[PLAIN]}
    result = plain_tuned(found, slots, always)
    result.flags = {mode: [*always, *best.words, *words] for mode, words in modes.items()}
    return result
