"""Answers in Harmony, the format of gpt-oss: messages one after the other, each with a channel.

    <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...

`analysis` is reasoning and `final` the answer. `commentary to=functions.NAME` calls a tool with
its text; other commentary is part of the answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

_MESSAGE = "<|message|>"
_ENDS = ("<|end|>", "<|return|>", "<|call|>", "<|start|>", "<|channel|>")
# what a header begins with: an answer may go on in a message that its prompt began
_HEADERS = ("<|channel|>", "<|start|>", "<|constrain|>", " to=", "to=")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_TOOL = re.compile(r"to=functions\.([\w-]+)")
_OTHER_TOOL = re.compile(r"to=\w")


class Part(NamedTuple):
    """A piece of an answer. text: of reasoning, content or arguments; the name of a call."""

    kind: Literal["reasoning", "content", "call", "arguments"]
    text: str


class HarmonyText:
    """Splits an answer's text, with its special tokens, as it grows."""

    def __init__(self) -> None:
        self._rest = ""
        self._kind: Literal["reasoning", "content", "arguments"] | None = None  # None: in a header
        self._first = True

    @property
    def calls(self) -> bool:
        """Whether the present message is a call."""
        return self._kind == "arguments"

    def feed(self, text: str, ended: bool) -> Iterator[Part]:
        """Add text; yield what is certain. ended: no more follows."""
        self._rest += text
        while self._rest:
            if self._kind is not None:
                yield from self._body(ended)
                if self._kind is not None:
                    return
            elif self._first and not _begins_header(self._rest):
                self._kind = "content"
            else:
                header, found, rest = self._rest.partition(_MESSAGE)
                if not found:  # one that is cut says nothing
                    return
                self._rest = rest
                yield from self._begin(header)
            self._first = False

    def _begin(self, header: str) -> Iterator[Part]:
        channel = _CHANNEL.search(header)
        tool = _TOOL.search(header)
        if tool is not None:
            self._kind = "arguments"
            yield Part("call", tool[1])
        elif _OTHER_TOOL.search(header) or (channel is not None and channel[1] == "analysis"):
            self._kind = "reasoning"
        else:
            self._kind = "content"

    def _body(self, ended: bool) -> Iterator[Part]:
        """Yield the present message's text; a token that ends it ends its kind."""
        assert self._kind is not None
        found = [at for end in _ENDS if (at := self._rest.find(end)) >= 0]
        if found:
            text = self._rest[: min(found)]
            self._rest = self._rest[len(text) :].removeprefix("<|end|>")
        else:
            held = 0 if ended else _held(self._rest)
            text = self._rest[: len(self._rest) - held]
            self._rest = self._rest[len(text) :]
        if text:
            yield Part(self._kind, text)
        if found:
            self._kind = None


def speaks_harmony(template: str | None) -> bool:
    """Return whether a chat template writes this format."""
    return template is not None and "<|channel|>" in template and _MESSAGE in template


def _begins_header(text: str) -> bool:
    """Return whether a text begins as a header does, as far as it goes."""
    return any(text.startswith(begin[: len(text)]) for begin in _HEADERS)


def _held(text: str) -> int:
    """Return how many characters at the text's end may begin an end of the message."""
    longest = max(map(len, _ENDS))
    for count in range(min(longest, len(text)), 0, -1):
        if any(end.startswith(text[-count:]) for end in _ENDS):
            return count
    return 0
