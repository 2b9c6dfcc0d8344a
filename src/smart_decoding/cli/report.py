"""`smart report`: pictures of what `smart bench --json` measured, without measuring again."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from smart_decoding.bench.options import check_outputs
from smart_decoding.bench.provenance import write_text
from smart_decoding.bench.results import Results
from smart_decoding.errors import ConfigError

if TYPE_CHECKING:
    from smart_decoding.bench.figures import Figure


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """The pictures that `smart bench` and `smart report` can make."""
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write a self-contained page there"
    )
    parser.add_argument(
        "--plots",
        type=Path,
        metavar="FOLDER",
        help="write PNG plots there (needs the extra 'bench')",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The results to draw, and what to write."""
    parser.add_argument(
        "results",
        type=Path,
        nargs="+",
        metavar="RESULTS.json",
        help="written by smart bench --json; parts of several files make one page",
    )
    add_output_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Writes what was asked for. Raises SmartError for what a user can mend."""
    check_asked(args.html, args.plots)
    write_outputs(Results.read(*args.results), args.html, args.plots)
    return 0


def check_asked(html: Path | None, plots: Path | None) -> None:
    """Raises ConfigError if nothing is to be made, or if it cannot be written."""
    if html is None and plots is None:
        raise ConfigError("nothing to make: give --html FILE or --plots FOLDER")
    check_outputs((html,), plots)


def write_outputs(results: Results, html: Path | None, plots: Path | None) -> None:
    """Writes the page and the plots, says where, and which figures lack data."""
    from smart_decoding.bench.figures import figures
    from smart_decoding.bench.page import page

    write_drawings(page(results), figures(results), html, plots)


def write_drawings(
    page: str, figures: Sequence[Figure], html: Path | None, plots: Path | None
) -> None:
    """Writes a page and plots where they are wanted, says so, and which figures lack data."""
    from smart_decoding.bench.plots import write_plots

    if html is not None:
        write_text(html, page)
        print(f"wrote {html}")
    for path in write_plots(figures, plots) if plots is not None else ():
        print(f"wrote {path}")
    for figure in figures:
        if figure.missing:
            print(f"not drawn, {figure.key}: {figure.missing}")
