"""What the search asks of an engine: which settings there are, and to answer prompts with one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from smart_decoding.integrations.tuning.found import Found, LoadResult
    from smart_decoding.integrations.tuning.settings import Setting, Trial


class Launched(Protocol):
    """A running engine."""

    @property
    def notes(self) -> Sequence[str]:
        """What its user should know, such as layers that do not fit a GPU."""

    def __enter__(self) -> Launched:
        """Return itself, loaded."""

    def __exit__(self, *_: object) -> None:
        """End its processes, and wait until they are gone."""

    def answer(self, prompts: Sequence[str], load: int) -> Trial:
        """Answer prompts greedily, `load` at once. Raises ModelError if it fails."""


class Tunable(Protocol):
    """An engine. name: as its users call it; warnings: what to know before it is measured."""

    name: str
    warnings: list[str]

    def groups(self, loads: Sequence[int]) -> list[tuple[int, ...]]:
        """Return the loads (requests at once) that one launched engine serves."""

    def prompts(self, load: int) -> int:
        """Return how many prompts a block has: more than `load`, so that all slots stay busy."""

    def stages(self, loads: Sequence[int], found: Found) -> Iterator[list[Setting]]:
        """Yield the alternatives to `found.base`, stage by stage: options of plain decoding, which
        become the base if they are faster, and at last drafts."""

    def launch(self, setting: Setting, loads: Sequence[int]) -> Launched:
        """Return an engine with these options. Raises ModelError if it does not start."""

    def about(self) -> dict[str, Any]:
        """Return what is measured, for the file of all measurements: versions, names of files."""

    def write(self, found: Found, choices: Sequence[LoadResult], output: Path) -> list[str]:
        """Write the engine's own options to `output`; return lines that say how to start it.
        Raises CapacityError if the file cannot be written."""
