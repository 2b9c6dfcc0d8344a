"""Tracebacks for the log, without what errors say: that may quote a request."""

from __future__ import annotations

import traceback


def traced(error: BaseException) -> str:
    """Return places and types of an error and of those before it. Its own text is left out, but
    for the system's reason and for `said`, which no request has a part in."""
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    earlier = f"{traced(before)}\nthen:\n" if before is not None else ""
    reason = error.strerror if isinstance(error, OSError) else getattr(error, "said", None)
    kind = type(error).__qualname__
    places = "".join(traceback.format_tb(error.__traceback__))
    return f"{earlier}{places}{kind}: {reason}" if reason else f"{earlier}{places}{kind}"
