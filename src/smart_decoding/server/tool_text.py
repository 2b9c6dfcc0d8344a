"""Tool calls, and reasoning, read from an answer's text as it grows.

Text and arguments are passed on at once. Markers are not, nor is the beginning of a marker in an
answer that was cut.
"""

from __future__ import annotations

import json
import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from smart_decoding.models.text.harmony import HarmonyText
from smart_decoding.server.tools import CLOSING, OPENING

Json = dict[str, Any]
_JSON = json.JSONDecoder()
_HEAD = re.compile(r'\n\{"name": "([\w-]+)", "arguments": ')


class Pieces(NamedTuple):
    """What a chunk's text adds to an answer: calls as OpenAI streams them."""

    content: str
    calls: list[Json]
    reasoning: str = ""


class AnswerReader(ABC):
    """Splits one answer's text as it grows."""

    def __init__(self) -> None:
        self._calls = -1  # index of the present call

    @property
    @abstractmethod
    def complete(self) -> bool:
        """Whether the answer ended with a whole call."""

    @abstractmethod
    def _parts(self, text: str, end: str | None) -> Iterator[tuple[str, str]]:
        """Add `text`; yield what is new: of a `Part`'s kind, and its text."""

    def feed(self, text: str, end: str | None) -> Pieces:
        """Add `text`; return what is new. end: why the answer ended, None: more may follow."""
        found = {"content": "", "reasoning": ""}
        calls: list[Json] = []
        for kind, piece in self._parts(text, end):
            if kind == "call":
                self._calls += 1
                calls.append(_begun_call(self._calls, piece))
            elif kind != "arguments":
                found[kind] += piece
            elif calls:
                calls[-1]["function"]["arguments"] += piece
            elif piece:  # of a call that has begun earlier
                calls.append({"index": self._calls, "function": {"arguments": piece}})
        return Pieces(found["content"], calls, found["reasoning"])


class HarmonyReader(AnswerReader):
    """An answer of gpt-oss: its channels are reasoning, content and calls."""

    def __init__(self) -> None:
        super().__init__()
        self._text = HarmonyText()

    @property
    def complete(self) -> bool:
        """See `AnswerReader`."""
        return self._text.calls

    def _parts(self, text: str, end: str | None) -> Iterator[tuple[str, str]]:
        return self._text.feed(text, end is not None)


class ToolText(AnswerReader):
    """Splits one answer's text into content and calls. The grammar keeps the form."""

    def __init__(self) -> None:
        super().__init__()
        self._place: Literal["content", "head", "arguments", "after"] = "content"
        self._rest = ""
        self._found = False  # whether the last marker looked for was there
        self._arguments = ""  # of the present call

    @property
    def complete(self) -> bool:
        """See `AnswerReader`."""
        return self._place == "after"

    def _parts(self, text: str, end: str | None) -> Iterator[tuple[str, str]]:
        self._rest += text
        while True:
            if self._place == "content":
                yield "content", self._until(OPENING, end == "stop")
                if not self._found:
                    return
                self._place = "head"
            elif self._place == "head":
                head = _HEAD.match(self._rest)
                if head is None:
                    return
                yield "call", head[1]
                self._rest = self._rest[head.end() :]
                self._place = "arguments"
                self._arguments = ""
            elif self._place == "arguments":
                piece = self._until(CLOSING, False)
                self._arguments += piece
                yield "arguments", piece
                if not self._found:
                    if end is not None:
                        yield "arguments", self._rest[: self._missing()]
                    return
                self._place = "after"
            else:
                self._until(f"\n{OPENING}", False)
                if not self._found:
                    return
                self._place = "head"

    def _missing(self) -> int:
        """Return how many characters of a possible `CLOSING` belong to the arguments of a call that
        was cut."""
        try:
            _, end = _JSON.raw_decode(self._arguments + self._rest)
        except (ValueError, RecursionError):  # they were cut, and all is theirs
            return len(self._rest)
        return end - len(self._arguments)

    def _until(self, marker: str, last: bool) -> str:
        """Take the text before `marker`; without one, all but its possible beginning.

        last: nothing follows, so the text cannot end in the marker's beginning.
        """
        text, found, rest = self._rest.partition(marker)
        self._found = bool(found)
        begun = (0,) if found or last else range(len(marker))
        held = max(count for count in begun if text.endswith(marker[:count]))
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
    """Return the calls of a finished answer, as a message has them."""
    return [{key: value for key, value in piece.items() if key != "index"} for piece in pieces]
