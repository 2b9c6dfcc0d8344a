"""Progress of long steps: a bar on a terminal, else lines on standard error, or in the log of a
program that has set up the logger `smart`. And the silence of a library that says too much."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from tqdm import tqdm

from smart_decoding.errors import ModelError

log = logging.getLogger("smart.steps")


def _say(line: str) -> None:
    """A program that logs INFO gets it there; one that gave `smart` another level gets nothing."""
    shown = log.isEnabledFor(logging.INFO) and log.hasHandlers()
    if shown or log.level or logging.getLogger("smart").level:
        log.info(line)
    elif sys.stderr is not None:  # closed at the start
        with suppress(OSError, ValueError):  # nobody reads it
            print(f"smart: {line}", file=sys.stderr, flush=True)


def on_terminal() -> bool:
    """Return whether somebody sees standard error, which may be closed."""
    with suppress(AttributeError, ValueError):
        return sys.stderr.isatty()
    return False


@contextmanager
def long_step(what: str, total: float, unit: str = "it") -> Iterator[Callable[[float], object]]:
    """Yield a function that takes the progress made, of `total` in all. what: the step's name."""
    if on_terminal():
        shown = "{desc}: {percentage:3.0f}%|{bar}| {remaining} left"
        with tqdm(total=total, desc=what, unit=unit, bar_format=shown, leave=False) as bar:
            yield bar.update
        return
    _say(f"{what} ...")
    start = time.perf_counter()
    ended = "broken off after"
    try:
        yield lambda _: None
        ended = "done in"
    finally:
        _say(f"{what}: {ended} {time.perf_counter() - start:.1f} s")


VISION = (
    "vision-language models need transformers and pillow: in the clone, pip install -e '.[vision]'"
)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Import and load without notices about other packages; ModelError without transformers."""
    logger = logging.getLogger("transformers")
    level = logger.level
    try:
        import transformers.utils.logging  # noqa: F401  # it sets the level

        level = logger.level
        logger.setLevel(logging.ERROR)
        import PIL  # noqa: F401

        yield
    except ModuleNotFoundError as error:
        if error.name in ("transformers", "PIL"):
            raise ModelError(VISION) from error
        raise
    finally:
        logger.setLevel(level)
