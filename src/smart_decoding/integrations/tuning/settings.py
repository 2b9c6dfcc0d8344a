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
    """A block of prompts that was answered. tokens: of all answers; seconds: of the block, prompts
    included; drafted, accepted: tokens of drafts; context: mean tokens of a request while it is
    answered, its prompt and half of its answer."""

    tokens: int
    seconds: float
    drafted: int = 0
    accepted: int = 0
    context: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    @property
    def rounds(self) -> int:
        """Forwards, summed over the requests: each gives a token beside the accepted ones."""
        return max(1, self.tokens - self.accepted)


@dataclass(frozen=True, slots=True)
class Patience:
    """Blocks that a setting is measured for. first: in the first turn of a race; most: in a race;
    last: for the best setting beside plain decoding, until the answer is clear."""

    first: int = 1
    most: int = 4
    last: int = 8
