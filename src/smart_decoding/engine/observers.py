"""Observers of the engine, called in its own thread: metrics and the live page."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from smart_decoding.engine.engine import Engine
    from smart_decoding.engine.request import Request

log = logging.getLogger("smart.engine")


class Observer:
    """Called by the engine thread; a subclass overrides the calls that it needs. All must be
    quick."""

    def before(self, engine: Engine) -> None:
        """Note that a round begins."""

    def after(self, engine: Engine, touched: Sequence[Request]) -> None:
        """Note the end of a round, in which `touched` got tokens."""

    def ended(self, request: Request, reason: str) -> None:
        """Note the end of an answer. reason: 'stop', 'length', 'abort' or 'error'."""


class Observers(list[Observer]):
    """The observers of an engine thread. One that raises is removed, and the engine goes on."""

    def notify(self, call: Callable[[Observer], None]) -> None:
        """Call every observer, and remove each one that raises."""
        for observer in list(self):
            try:
                call(observer)
            except Exception as error:
                name = type(observer).__name__
                log.error("%s has failed and is removed", name, exc_info=error)
                self.remove(observer)
