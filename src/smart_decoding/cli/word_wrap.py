"""Word wrap of text that grows, for a terminal."""

from __future__ import annotations

import re
from collections.abc import Callable

from wcwidth import iter_graphemes, wcwidth, width

_FENCE = re.compile(r"(`{3,}(?=[^`]*$)|~{3,})")  # with a backtick behind it, it is code in a line


class WordWrap:
    """Breaks lines between words where they would reach a terminal's edge.

    A word is held back until it is whole, and blanks until the next word; those at a line's end are
    left out. A line end ends the last word, too. Code between fences stays as it is, so that it can
    be copied. width: the terminal's present columns."""

    def __init__(self, width: Callable[[], int]) -> None:
        self._width = width
        self._line = ""  # the text's own line so far
        self._column = 0
        self._blanks = ""
        self._word = ""
        self._fence = ""  # that the present code began with

    def feed(self, text: str) -> str:
        """Add text; return what can be printed now."""
        return "".join(map(self._feed_one, text))

    def _feed_one(self, character: str) -> str:
        if character == "\n":
            return self._end_line()
        self._line += character
        if self._fence:
            return character
        if character.isspace():
            printed = self._end_word()
            self._blanks += character
            return printed
        printed = ""
        if not self._joins(character) and (_is_wide(character) or _is_wide(self._word)):
            printed = self._end_word()  # scripts without blanks break anywhere
        self._word += character
        too_long = len(self._word) >= self._width()
        return printed + (self._end_word() if too_long else "")

    def _joins(self, character: str) -> bool:
        """Return whether a character belongs to the one before, as parts of an emoji do."""
        if character.isascii() or not self._word:
            return False
        return [*iter_graphemes(self._word + character)][-1] != character

    def _end_line(self) -> str:
        printed = self._end_word() + "\n"
        self._blanks = ""
        line = self._line.strip()
        opening = _FENCE.match(line)
        if self._fence:
            if line.startswith(self._fence) and not line.strip(self._fence[0]):
                self._fence = ""
        elif opening:
            self._fence = opening[1]
        self._line = ""
        self._column = 0
        return printed

    def _end_word(self) -> str:
        """Return blanks and word, or a new line in place of the blanks. The terminal breaks words
        that are longer than a line."""
        if not self._word:
            return ""
        word = self._word
        size = width(word)
        room = self._width()
        self._word = ""
        may_break = self._column and (self._blanks or _is_wide(word))
        if may_break and self._column + len(self._blanks) + size > room:
            self._blanks = ""
            self._column = 0
            word = "\n" + word
        printed = self._blanks + word
        self._column += len(self._blanks) + size
        self._blanks = ""
        while self._column > room:
            self._column -= room
        return printed


def _is_wide(word: str) -> bool:
    return wcwidth(word[:1]) == 2
