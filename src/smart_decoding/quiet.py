"""Imports of transformers without its notices."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING

from smart_decoding.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

NEEDED = (
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
            raise ModelError(NEEDED) from error
        raise
    finally:
        logger.setLevel(level)
