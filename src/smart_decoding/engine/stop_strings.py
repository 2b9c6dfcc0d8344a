"""Stop strings, looked for as a text grows."""

from __future__ import annotations

from array import array


class StopString:
    """A stop string with its prefix function (Knuth, Morris and Pratt). Answers share it.

    A text costs a few steps for each new character, whatever both repeat."""

    __slots__ = ("_border", "_fallbacks", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        # _fallbacks: [characters] where to go on after so many that matched and one that does not;
        # -1 for the next one of the text. _border: after a whole match.
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
        """Go on from `matched` characters at the text's end. Return how many match, of a proper
        prefix, after the characters `new`; and after how many of these the string first ended."""
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
