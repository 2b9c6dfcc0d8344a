"""The parts that draft in one call of `generate`: policy, drafters, a head or draft model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from smart_decoding.drafters.union import UnionDrafter

if TYPE_CHECKING:
    from pathlib import Path

    from smart_decoding.core.policies.base import Policy
    from smart_decoding.engine.protocols import Drafter


class DraftSource(Protocol):
    """A draft head or draft model, used by one call at a time. folder: of its prior, or None."""

    folder: Path | None

    @property
    def shape(self) -> tuple[object, ...]:
        """The sizes that the cost of a level depends on."""

    def drafter(self, pages: int, positions: int, tree: bool) -> Drafter:
        """Return a drafter for one call, with room for keys in so many pages and positions; not
        tree: it proposes chains."""

    def check_length(self, max_length: int) -> None:
        """Raise ModelError if it cannot follow a text to this length."""


@dataclass(slots=True)
class Drafting:
    """A policy and drafters, used by one call at a time.

    free: drafters without a model of their own. source: makes the drafter with a model."""

    method: str
    policy: Policy
    free: list[Drafter]
    source: DraftSource | None = None

    def drafter(self, pages: int, positions: int, tree: bool) -> Drafter | None:
        """Return the drafter of one call; see `DraftSource`."""
        parts = list(self.free)
        if self.source:
            parts.insert(0, self.source.drafter(pages, positions, tree))
        if len(parts) > 1:
            return UnionDrafter(parts)
        return parts[0] if parts else None
