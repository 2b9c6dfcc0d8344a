"""Plain decoding: the baseline that every speedup is a ratio to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smart_decoding.core.policies.base import StatelessPolicy

if TYPE_CHECKING:
    from smart_decoding.core.batch import BatchState


class Off(StatelessPolicy):
    """Never drafts."""

    name = "off"

    def plan(self, batch: BatchState) -> None:
        """Return None: plain decoding."""
