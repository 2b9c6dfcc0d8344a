"""Settings of an engine, and what one block of prompts told of one."""

from __future__ import annotations

from dataclasses import dataclass

PLAIN = "plain"


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to start an engine. mode: how it drafts, in the engine's own word, or `PLAIN`; base:
    its options of plain decoding, `huge_pages.VARIABLE` among them; drafts: its options of
    drafting, words of a command line."""

    mode: str = PLAIN
    base: tuple[str, ...] = ()
    drafts: tuple[str, ...] = ()

    @property
    def words(self) -> tuple[str, ...]:
        """All its options."""
        return (*self.base, *self.drafts)

    def __str__(self) -> str:
        return " ".join(self.words) or "defaults"


@dataclass(frozen=True, slots=True)
class Trial:
    """A block of prompts that one process answered. seconds: while all its slots were busy,
    prompts included; tokens: of answers in these seconds; drafted, accepted: tokens of drafts;
    context: mean tokens of a request while it is answered, its prompt and half of its answer."""

    tokens: float
    seconds: float
    drafted: float = 0
    accepted: float = 0
    context: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    @property
    def rounds(self) -> float:
        """Forwards, summed over the requests: each gives a token beside the accepted ones."""
        return max(1, self.tokens - self.accepted)
