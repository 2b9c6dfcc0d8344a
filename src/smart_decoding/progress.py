"""Long steps say that they run: as a bar on a terminal, else as lines of the logger `smart.steps`,
which the command line shows."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

log = logging.getLogger("smart.steps")


@contextmanager
def long_step(what: str, total: float, unit: str = "it") -> Iterator[Callable[[float], object]]:
    """what: such as 'measuring costs'. Yields what takes the progress made, of `total` in all."""
    if sys.stderr.isatty():
        shown = "{desc}: {percentage:3.0f}%|{bar}| {remaining} left"
        with tqdm(total=total, desc=what, unit=unit, bar_format=shown, leave=False) as bar:
            yield bar.update
        return
    log.info("%s ...", what)
    start = time.perf_counter()
    yield lambda _: None
    log.info("%s: done in %.1f s", what, time.perf_counter() - start)
