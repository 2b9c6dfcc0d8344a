"""Milliseconds of verification forwards, as rounds perform them.

Medians of 12 in each of three turns over all of them, since machines drift. Compare two versions by
running their commands in turn.
"""

from __future__ import annotations

import argparse
import time
from argparse import ArgumentTypeError
from collections.abc import Callable

import numpy as np

from smart_decoding.errors import ConfigError
from smart_decoding.profiling.measure import verification

Shape = tuple[int, int, int]
USUAL = (
    "1,150,0 1,150,10 4,150,0 4,150,2 8,150,0 8,150,1 8,150,3 8,1000,0 16,150,0 16,150,1 32,150,0"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The shapes to time."""
    parser.add_argument(
        "shapes",
        type=shape_of,
        nargs="*",
        default=[shape_of(text) for text in USUAL.split()],
        metavar="SEQUENCES,CONTEXT,NODES",
        help="requests, tokens of context and drafted nodes of each (default: eleven usual ones)",
    )


def shape_of(text: str) -> Shape:
    """'4,150,2' as numbers."""
    try:
        sequences, context, nodes = map(int, text.split(","))
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is not of the form 4,150,2") from error
    return sequences, context, nodes


def main(args: argparse.Namespace) -> int:
    """Measures and prints a line for each shape."""
    from smart_decoding import LLM

    llm = LLM("smollm2-135m", speculative_config=False, max_num_seqs=32)
    pages = llm.engine.config.pages
    runs = {}
    for shape in args.shapes:
        sequences, context, nodes = shape
        run = verification(llm.target, sequences, sequences * (1 + nodes), context, pages)
        if run is None:
            raise ConfigError(f"{shape} does not fit into the cache: give a smaller shape")
        runs[shape] = run
    found: dict[Shape, list[float]] = {shape: [] for shape in runs}
    for _ in range(3):
        for shape, run in runs.items():
            found[shape].append(median_ms(run))
    for shape, medians in found.items():
        print(f"{shape}: " + " ".join(f"{ms:.2f}" for ms in sorted(medians)))
    return 0


def median_ms(run: Callable[[], object]) -> float:
    """The median of 12 calls after two."""
    seconds = []
    for _ in range(14):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[2:])) * 1e3
