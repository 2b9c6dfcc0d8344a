"""`python -m smart_lab report`: a picture of what `bench --json` measured, without measuring again.

Needed by docs/results.md, one of whose pictures it draws.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from smart_decoding.errors import ConfigError
from smart_lab.plots import EXTRA, can_draw, write_plot
from smart_lab.results import Results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The results to draw, and where the picture goes."""
    parser.add_argument("results", type=Path, metavar="RESULTS.json", help="from bench --json")
    text = "write speedup.png there (needs the extra 'bench')"
    parser.add_argument("--plots", type=Path, metavar="FOLDER", required=True, help=text)


def main(args: argparse.Namespace) -> int:
    """Draw the figure and say where it is. Raises SmartError for what a user can mend."""
    folder = args.plots
    if not folder.parent.is_dir() or (folder.exists() and not folder.is_dir()):
        raise ConfigError(f"{folder} cannot be made: it must be a folder in an existing folder")
    if not can_draw():
        raise ConfigError(f"plots need matplotlib: {EXTRA}")
    path = folder / "speedup.png"
    write_plot(Results.read(args.results), path)
    print(f"wrote {path}")
    return 0
