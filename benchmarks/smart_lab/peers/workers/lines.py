"""How a worker speaks with `smart bench`: JSON lines. It runs in a peer's environment, with nothing
of ours beside it.

In: one line of settings, then a line per job {"prompts": [[id, ...], ...], "tokens": count}, to
which a worker may know more. Out: a line that says it is ready, with version and precision, then
one per job: seconds and tokens of decoding alone, and the answers' ids.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

Settings = dict[str, Any]
Answer = Callable[..., dict[str, Any]]


def serve(load: Callable[[Settings], tuple[dict[str, str], Answer]]) -> None:
    """Loads once, then answers until there are no more lines. What libraries print goes to standard
    error."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(reply: dict[str, Any]) -> None:
        print(json.dumps(reply), file=replies, flush=True)

    try:
        about, answer = load(json.loads(sys.stdin.readline()))
        say(about)
        for line in sys.stdin:
            say(answer(**json.loads(line)))
    except Exception as error:  # whatever a peer raises is its result
        say({"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]})
        raise
