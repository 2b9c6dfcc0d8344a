"""`python -m smart_lab report`: `smart report` with what only the laboratory measures."""

from __future__ import annotations

import argparse
from pathlib import Path

from smart_decoding.cli import report
from smart_lab.results import LabResults

add_arguments = report.add_arguments


def main(args: argparse.Namespace) -> int:
    """Writes what was asked for. Raises SmartError for what a user can mend."""
    report.check_asked(args.html, args.plots)
    write_outputs(LabResults.read(*args.results), args.html, args.plots)
    return 0


def write_outputs(results: LabResults, html: Path | None, plots: Path | None) -> None:
    """Writes the page and the plots, says where, and which figures lack data."""
    from smart_lab.figures import figures
    from smart_lab.page import page

    report.write_drawings(page(results), figures(results), html, plots)
