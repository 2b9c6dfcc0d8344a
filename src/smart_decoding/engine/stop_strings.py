"""Search for stop strings in a growing text."""

from __future__ import annotations

from array import array


class StopString:
    """A stop string with its prefix function (Knuth, Morris and Pratt). Answers share it.

    A new character costs a few steps, however repetitive text and string are."""

    __slots__ = ("_border", "_fallbacks", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        # _fallbacks: [characters] matched characters that remain when the next one differs, or -1
        # for none of the next one either. _border: characters that remain after a whole match.
        self._fallbacks = array("h", [-1])
        border = 0
        for at in range(1, len(text)):
            char = text[at]
            same = char == text[border]
            self._fallbacks.append(self._fallbacks[border] if same else border)
            while border >= 0 and char != text[border]:
                border = self._fallbacks[border]
            border += 1
        self._border = border

    def advance(self, matched: int, new: str) -> tuple[int, int | None]:
        """Search on in the characters `new`; `matched` characters of the string end the text so
        far. Return how many match at the new end, less than the whole string, and after how many of
        `new` the string first ended, or None."""
        text = self.text
        if not matched and text[0] not in new:
            return 0, None
        end = None
        for at, char in enumerate(new, 1):
            while matched >= 0 and char != text[matched]:
                matched = self._fallbacks[matched]
            matched += 1
            if matched == len(text):
                end = end or at
                matched = self._border
        return matched, end
