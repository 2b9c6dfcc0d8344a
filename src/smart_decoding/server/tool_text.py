"""Tool calls read from an answer's text as it grows.

What may be shown is given out at once, markers never are.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from typing import Any, Literal

from smart_decoding.engine.stopping import overlap
from smart_decoding.server.tools import CLOSING, OPENING

Json = dict[str, Any]
_HEAD = re.compile(r'\n\{"name": "([\w-]+)", "arguments": ')


class ToolText:
    """Splits one answer's text into content and calls. The grammar keeps the form."""

    def __init__(self) -> None:
        self._place: Literal["content", "head", "arguments", "after"] = "content"
        self._rest = ""
        self._found = False  # whether the last marker looked for was there
        self._calls = -1  # index of the present call

    @property
    def complete(self) -> bool:
        """Whether the answer ended with a whole call."""
        return self._place == "after"

    def feed(self, text: str, last: bool) -> tuple[str, list[Json]]:
        """The content and the pieces of calls, as OpenAI streams them, that `text` adds.

        last: nothing follows.
        """
        self._rest += text
        content = ""
        calls: list[Json] = []
        for kind, piece in self._pieces(last):
            if kind == "content":
                content += piece
            elif kind == "name":
                self._calls += 1
                calls.append(_begun_call(self._calls, piece))
            elif calls:
                calls[-1]["function"]["arguments"] += piece
            else:
                calls.append({"index": self._calls, "function": {"arguments": piece}})
        return content, calls

    def _pieces(self, last: bool) -> Iterator[tuple[str, str]]:
        while True:
            if self._place == "content":
                yield "content", self._until(OPENING, last)
                if not self._found:
                    return
                self._place = "head"
            elif self._place == "head":
                head = _HEAD.match(self._rest)
                if head is None:
                    return
                yield "name", head[1]
                self._rest = self._rest[head.end() :]
                self._place = "arguments"
            elif self._place == "arguments":
                yield "arguments", self._until(CLOSING, last)
                if not self._found:
                    return
                self._place = "after"
            else:
                self._until(f"\n{OPENING}", False)
                if not self._found:
                    return
                self._place = "head"

    def _until(self, marker: str, last: bool) -> str:
        """Takes the text before `marker`; without one, all but what may be its beginning."""
        text, found, rest = self._rest.partition(marker)
        self._found = bool(found)
        held = 0 if found or last else overlap(text, marker)
        self._rest = rest if found else text[len(text) - held :]
        return text[: len(text) - held]


def _begun_call(index: int, name: str) -> Json:
    return {
        "index": index,
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": name, "arguments": ""},
    }


def whole_calls(pieces: list[Json]) -> list[Json]:
    """The calls of a finished answer, as a message has them."""
    return [{key: value for key, value in piece.items() if key != "index"} for piece in pieces]
