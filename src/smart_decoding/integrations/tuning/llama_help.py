"""What a llama-server knows, asked of its own `--help`: no table of versions."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from smart_decoding.errors import ConfigError

REMOVED = "has been removed"  # options that are listed to say so
_NAMES = re.compile(r",\s+(?=-)")
_HEAD = re.compile(r"^ {0,10}(--?[A-Za-z].*?)(?:\s{2,}(.*))?$")


class LlamaHelp:
    """The options of one server. text: what it prints for `--help`."""

    def __init__(self, text: str) -> None:
        self._about: dict[str, str] = {}  # option: its values and its text
        blocks: list[tuple[str, list[str]]] = []
        for line in text.splitlines():
            head = _HEAD.match(_NAMES.sub(", ", line))
            if head:
                blocks.append((head[1], [head[2] or ""]))
            elif blocks:
                blocks[-1][1].append(line.strip())
        for names, lines in blocks:
            about = " ".join(lines)
            if REMOVED not in about:
                *_, last = names.split(", ")
                values = last.strip().partition(" ")[2]
                for name in names.split(","):
                    self._about[name.strip().partition(" ")[0]] = f"{values} {about}"

    def __contains__(self, option: object) -> bool:
        return option in self._about

    def first(self, *options: str) -> str | None:
        """Return the first of some names that it knows: options were renamed."""
        return next((option for option in options if option in self._about), None)

    def takes(self, option: str, value: str) -> bool:
        """Return whether it lists a value of an option."""
        return value in re.findall(r"[\w.-]+", self._about.get(option, ""))

    def only(self, words: tuple[str, ...]) -> bool:
        """Return whether it knows all the options among some words."""
        return all(word in self for word in words if word.startswith("--"))

    @property
    def drafting(self) -> list[str]:
        """Ways of drafting, by its own names: ngram-..., draft-...; none of one too old for it."""
        values = self._about.get("--spec-type", "").partition("(default")[0]
        return list(dict.fromkeys(re.findall(r"\b(?:ngram|draft)-[\w-]+", values)))


def asked(server: Path) -> LlamaHelp:
    """Return what a server knows. Raises ConfigError if it is no llama-server."""
    try:
        done = subprocess.run(
            [str(server), "--help"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{server} cannot be asked for its options: {error}") from error
    found = LlamaHelp(f"{done.stdout}\n{done.stderr}")
    if "--model" not in found or "--parallel" not in found:
        raise ConfigError(f"{server} is no llama-server: its --help has no --model and --parallel")
    return found
