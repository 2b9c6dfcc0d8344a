"""llama.cpp's best flags on this machine, found by trying: flash attention, repacking, batches,
sampling, the KV buffer and mapped weights for plain decoding, then settings of its draft
model and n-gram modes.

Needed by `gguf-speed`, whose files are the README's first table.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

from smart_decoding.errors import ModelError
from smart_lab.gguf.rates import Reply
from smart_lab.gguf.server import Flags

PLAIN, DRAFT, NGRAM, BOTH = "plain", "draft model", "n-gram", "draft model and n-gram"
# n-max, p-min of a draft: llama.cpp's defaults first, then what was best on other machines.
DRAFTS = ((3, 0.0), (16, 0.75), (8, 0.5), (5, 0.0), (2, 0.0), (1, 0.0), (4, 0.4))


def _mod(match: int, most: int) -> tuple[str, ...]:
    words = ("ngram-mod", "--spec-ngram-mod-n-match", str(match))
    return (*words, "--spec-ngram-mod-n-min", "1", "--spec-ngram-mod-n-max", str(most))


def _sized(kind: str, match: int, most: int) -> tuple[str, ...]:
    option = f"--spec-{kind}-size"
    return (kind, f"{option}-n", str(match), f"{option}-m", str(most))


# What looks up n-grams, and how: defaults first, which wait for twelve equal tokens; then what won
# elsewhere, with drafts as long as ours. What never won by more than noise in 14 tunings on
# two machines is gone: ngram-cache, ngram-map-k, and lengths beside those below.
NGRAMS = (
    ("ngram-simple",),
    _sized("ngram-simple", 4, 48),
    _mod(4, 32),
    _mod(4, 8),
    _sized("ngram-simple", 5, 8),
    _sized("ngram-simple", 3, 4),
    _sized("ngram-map-k4v", 3, 4),
    ("ngram-mod",),
)
# Of plain decoding, one after the other, each in all values that are not the defaults of Flags.
STEPS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("flash", ("on", "off")),
    ("repack", (False,)),
    ("sampling", (True,)),
    ("unified", (True,)),
    ("ubatch", (128,)),
    ("mmap", (False,)),
)
FINALISTS = 2  # of each mode are tried once more: single trials differ by several per cent


class Words(Protocol):
    """Flags of a server, hashable."""

    @property
    def words(self) -> list[str]:
        """The flags as words of its command line."""


FlagsT = TypeVar("FlagsT", bound=Words)
Answer = Callable[[FlagsT], Reply]  # tries flags; raises ModelError where they do not work
TimeLeft = Callable[[], bool]


@dataclass
class Tuned(Generic[FlagsT]):
    """The result of tuning. flags: mode -> the best ones; tried: settings with tokens per second or
    an error; left_out: settings not tried for lack of time."""

    flags: dict[str, FlagsT] = field(default_factory=dict)
    tried: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """Return the result for JSON."""
        return asdict(self)

    @classmethod
    def of(cls, kept: Mapping[str, Any], kind: Callable[..., FlagsT]) -> Tuned[FlagsT]:
        """Return the inverse of `plain`."""
        flags = {
            mode: kind(**{**each, "speculation": tuple(each["speculation"])})
            for mode, each in kept["flags"].items()
        }
        return cls(flags, list(kept["tried"]), list(kept["left_out"]))


def draft_words(draft: str, setting: tuple[int, float]) -> tuple[str, ...]:
    """Return llama-server's options to draft with the model in that file."""
    most, least = setting
    words = ("--spec-type", "draft-simple", "--spec-draft-model", draft)
    return (*words, "--spec-draft-n-max", str(most), "--spec-draft-p-min", str(least))


def ngram_words(setting: Sequence[str]) -> tuple[str, ...]:
    """Return its options to look up n-grams."""
    return ("--spec-type", *setting)


def both_words(draft: Sequence[str], ngram: Sequence[str]) -> tuple[str, ...]:
    """Return its options for n-grams first, and the draft model where they find nothing."""
    return ("--spec-type", f"{ngram[1]},{draft[1]}", *ngram[2:], *draft[2:])


def tune(answer: Answer[Flags], cores: int, draft: str | None, time_left: TimeLeft) -> Tuned[Flags]:
    """Return the best flags of each mode that works; the defaults of each are tried in any case.
    Raises ModelError if plain decoding fails with the defaults."""
    search = Search(answer, time_left)
    base = Flags(threads=cores)
    search.attempt(PLAIN, base)
    for name, values in STEPS:
        changed = [replace(base, **{name: value}) for value in values]
        base = search.best(PLAIN, base, changed)
    base = search.confirmed(PLAIN, base)
    search.found.flags[PLAIN] = base
    groups = {NGRAM: [ngram_words(setting) for setting in NGRAMS]}
    if draft is not None:
        groups[DRAFT] = [draft_words(draft, setting) for setting in DRAFTS]
    for mode, settings in groups.items():
        first, *others = [replace(base, speculation=words) for words in settings]
        search.attempt(mode, first)
        chosen = search.best(mode, first, others)
        # More rows in a forward may want other layouts: of weights, of the KV memory.
        for name in ("repack", "unified"):
            other: dict[str, Any] = {name: not getattr(chosen, name)}
            chosen = search.best(mode, chosen, [replace(chosen, **other)])
        if search.works(chosen):
            search.found.flags[mode] = search.confirmed(mode, chosen)
    flags = search.found.flags
    if DRAFT in flags and NGRAM in flags:
        words = both_words(flags[DRAFT].speculation, flags[NGRAM].speculation)
        flags[BOTH] = replace(flags[DRAFT], speculation=words)
    return search.found


class Search(Generic[FlagsT]):
    """Keeps what was tried."""

    def __init__(self, answer: Answer[FlagsT], time_left: TimeLeft) -> None:
        self._answer, self._time_left = answer, time_left
        self._rates: dict[FlagsT, list[float]] = {}  # of all trials
        self._of_mode: defaultdict[str, list[FlagsT]] = defaultdict(list)
        self.found: Tuned[FlagsT] = Tuned()

    def attempt(self, mode: str, flags: FlagsT) -> None:
        """Try flags. Raises ModelError if they are the first of all and do not work."""
        words = " ".join(flags.words)
        try:
            reply = self._answer(flags)
        except ModelError as error:
            if not self.found.tried:
                raise
            self.found.tried.append({"mode": mode, "flags": words, "error": str(error)})
            return
        self._rates.setdefault(flags, []).append(reply.overall)
        if flags not in self._of_mode[mode]:
            self._of_mode[mode].append(flags)
        rates = {"decode": reply.decode, "overall": reply.overall}
        self.found.tried.append({"mode": mode, "flags": words, **rates})

    def best(self, mode: str, known: FlagsT, others: Sequence[FlagsT]) -> FlagsT:
        """Return the best of `known`, which was tried before, and of the others."""
        for flags in others:
            if flags == known or self.works(flags):
                continue
            if self._time_left():
                self.attempt(mode, flags)
            else:
                self.found.left_out.append(f"{mode}: {' '.join(flags.words)}")
        working = [flags for flags in (known, *others) if self.works(flags)]
        return max(working, key=self._rate, default=known)

    def confirmed(self, mode: str, chosen: FlagsT) -> FlagsT:
        """Return the best of the finalists, each tried once more; `chosen` where there is no
        time."""
        finalists = sorted(self._of_mode[mode], key=self._rate, reverse=True)[:FINALISTS]
        if len(finalists) < FINALISTS or not self._time_left():
            return chosen
        for flags in finalists:
            self.attempt(mode, flags)
        return max(finalists, key=self._rate)

    def _rate(self, flags: FlagsT) -> float:
        """Return all trials' tokens over all their seconds."""
        return statistics.harmonic_mean(self._rates[flags])

    def works(self, flags: FlagsT) -> bool:
        """Return whether it answered with them."""
        return flags in self._rates
