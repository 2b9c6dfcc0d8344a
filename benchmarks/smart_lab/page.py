"""The page of `smart report` with what only the laboratory measures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smart_decoding.bench import page as measured
from smart_decoding.bench.page import Further
from smart_lab import tables
from smart_lab.figures import further_figures

if TYPE_CHECKING:
    from smart_lab.results import LabResults


def page(results: LabResults) -> str:
    """The whole document."""
    compared = tables.compared(results)
    replayed = tables.replayed(results.replayed)
    return measured.page(results, Further(compared, further_figures(results), replayed))
