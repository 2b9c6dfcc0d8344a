"""What the search asks of an engine: which settings there are, and to answer prompts with one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from smart_decoding.integrations.tuning.found import Found, Verdict
    from smart_decoding.integrations.tuning.settings import Patience, Setting, Trial


class Launched(Protocol):
    """A running engine."""

    def __enter__(self) -> Launched:
        """Return itself, loaded."""

    def __exit__(self, *_: object) -> None:
        """End its processes."""

    def answer(self, prompts: Sequence[str], load: int) -> Trial:
        """Answer prompts greedily, `load` at once. Raises ModelError if it fails."""


class Tunable(Protocol):
    """An engine. name: as its users call it; patience: blocks of its settings; shares: of the
    time, for each race and at last for the best drafts beside plain decoding; warnings: what to
    know before it is measured."""

    name: str
    patience: Patience
    shares: tuple[int, ...]
    warnings: list[str]

    def groups(self, loads: Sequence[int]) -> list[tuple[int, ...]]:
        """Return the loads (requests at once) that one launched engine serves."""

    def prompts(self, load: int) -> int:
        """Return how many prompts a block has."""

    def room(self, loads: Sequence[int]) -> int:
        """Return how many engines may run at once."""

    def settings(self, loads: Sequence[int], found: Found) -> Iterator[list[Setting]]:
        """Yield the settings of one race after another, the one to compare with first. Earlier
        races are in `found`. Raises ModelError if the engine cannot be asked."""

    def launch(self, setting: Setting, loads: Sequence[int]) -> Launched:
        """Return an engine with these options. Raises ModelError if it does not start."""

    def about(self) -> dict[str, Any]:
        """Return what is measured, for the file of all measurements: versions, names of files."""

    def write(self, found: Found, choices: Sequence[Verdict], output: Path) -> list[str]:
        """Write the engine's own options to `output`; return lines that say how to start it.
        Raises CapacityError if the file cannot be written."""
