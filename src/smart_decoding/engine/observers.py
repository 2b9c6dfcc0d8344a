"""Who watches the engine from its own thread: metrics and the live page."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from smart_decoding.engine.engine import Engine
    from smart_decoding.engine.request import Request

log = logging.getLogger("smart.engine")


class Observer:
    """Called by the engine thread; what it does not override is nothing to it. All calls must be
    quick."""

    def before(self, engine: Engine) -> None:
        """A round begins."""

    def after(self, engine: Engine, touched: Sequence[Request]) -> None:
        """A round is over; `touched` got tokens."""

    def ended(self, request: Request, reason: str) -> None:
        """An answer is over: 'stop', 'length', 'abort' or 'error'."""


class Observers(list[Observer]):
    """Told of everything until they raise: watching must not hurt the watched."""

    def tell(self, call: Callable[[Observer], None]) -> None:
        """Call every observer; one that raises is not asked again."""
        for observer in list(self):
            try:
                call(observer)
            except Exception as error:
                name = type(observer).__name__
                log.error("%s has failed and is told no more", name, exc_info=error)
                self.remove(observer)
