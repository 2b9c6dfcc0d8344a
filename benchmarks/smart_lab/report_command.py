"""`python -m smart_lab report`: pictures of what `bench --json` measured, without measuring
again."""

from __future__ import annotations

import argparse
from pathlib import Path

from smart_decoding.bench.provenance import write_text
from smart_decoding.errors import ConfigError
from smart_lab.figures import figures
from smart_lab.page import page
from smart_lab.plots import check_outputs, write_plots
from smart_lab.results import LabResults


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """The pictures that `bench` and `report` can make."""
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
        help="written by bench --json; parts of several files make one page",
    )
    add_output_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Writes what was asked for. Raises SmartError for what a user can mend."""
    if args.html is None and args.plots is None:
        raise ConfigError("nothing to make: give --html FILE or --plots FOLDER")
    check_outputs((args.html,), args.plots)
    write_outputs(LabResults.read(*args.results), args.html, args.plots)
    return 0


def write_outputs(results: LabResults, html: Path | None, plots: Path | None) -> None:
    """Writes the page and the plots, says where, and which figures lack data."""
    if html is not None:
        write_text(html, page(results))
        print(f"wrote {html}")
    found = figures(results)
    for path in write_plots(found, plots) if plots is not None else ():
        print(f"wrote {path}")
    for figure in found:
        if figure.missing:
            print(f"not drawn, {figure.key}: {figure.missing}")
