"""Docstrings in the site: `name: meaning` at the beginning of a line is an item of a list.

Needed by `make docs` (mkdocs.yml).
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ITEM = re.compile(r"^(\w+(?:[,/] ?\w+| / \w+)*): (?=\S)")


class ListedParameters(griffe.Extension):
    """Ours follow no style that mkdocstrings knows; as Markdown their lines would run together."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_list(obj.docstring.value)


def as_list(text: str) -> str:
    """The text, its items as those of a Markdown list."""
    lines: list[str] = []
    in_list = False
    for line in text.splitlines():
        item = ITEM.match(line)
        if item:
            lines += [] if in_list else [""]
            line = f"- `{item[1]}`: {line[item.end() :]}"
        elif in_list and line.startswith("Raises "):
            lines.append("")
        in_list = bool(item) or (in_list and bool(line.strip()) and not line.startswith("Raises "))
        lines.append(line.strip() if in_list and not item else line)
    return "\n".join(lines)
