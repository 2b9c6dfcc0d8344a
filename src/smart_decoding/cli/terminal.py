"""What a terminal is shown of texts that strangers may have written: models, their files."""

from __future__ import annotations

from typing import TextIO

# A terminal obeys them: they write to the clipboard, over earlier lines, or answer in its place.
_CONTROL = dict.fromkeys({*range(32), *range(127, 160)} - {ord("\t"), ord("\n")})


def shown(text: str, stream: TextIO) -> str:
    """Return the text for a stream: without control characters where that is a terminal."""
    return text.translate(_CONTROL) if stream.isatty() else text
