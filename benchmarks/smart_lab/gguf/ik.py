"""ik_llama.cpp, a cousin of llama.cpp: its server has other flags, tunes its speculation itself,
and answers with texts, which our tokenizer turns back into tokens.

Needed by `gguf-speed --ik-llama-cpp`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from smart_lab.gguf.server import SERVER, Program, origin, require
from smart_lab.gguf.tuning import NGRAM, PLAIN, Answer, Search, TimeLeft, Tuned

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
CHANGES: tuple[dict[str, Any], ...] = ({"repack": True}, {"flash": "off"})
Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class IkFlags:
    """Settings of ik_llama.cpp. flash: on or off; repack: weights in its own layout, at loading."""

    threads: int
    flash: str = "on"
    repack: bool = False
    speculation: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        """The settings as words of its server's command line."""
        words = ["--threads", str(self.threads), "--flash-attn", self.flash]
        words += ["--run-time-repack"] if self.repack else []
        return [*words, *self.speculation]


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


def tune(answer: Answer[IkFlags], cores: int, slots: int, time_left: TimeLeft) -> Tuned[IkFlags]:
    """Return the best of few flags for plain decoding, which all modes have: it speculates for one
    slot only. Raises ModelError if it fails with the defaults."""
    search = Search(answer, time_left)
    best = IkFlags(cores)
    search.attempt(PLAIN, best)
    for change in CHANGES:
        best = search.best(PLAIN, best, [replace(best, **change)])
    modes = MODES if slots == 1 else {PLAIN: MODES[PLAIN]}
    search.found.flags = {mode: replace(best, speculation=words) for mode, words in modes.items()}
    return search.found
