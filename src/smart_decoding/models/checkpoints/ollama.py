"""Models that Ollama has fetched to this machine, by the names that it gives them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_NAME = re.compile(r"([A-Za-z0-9][\w.-]*)(?::([A-Za-z0-9][\w.-]*))?")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_WEIGHTS = "application/vnd.ollama.image.model"
_LIBRARY = "manifests/registry.ollama.ai/library"
SERVICE = Path("/usr/share/ollama/.ollama/models")  # of a service under Linux


def ollama_file(name: str) -> Path | None:
    """Return the GGUF file of a model of Ollama's library, such as llama3.2 or qwen3:8b, if Ollama
    has it on this machine. Nothing is fetched."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    for store in _stores():
        manifest = store / _LIBRARY / found[1] / (found[2] or "latest")
        try:
            layers = json.loads(manifest.read_text(encoding="utf-8"))["layers"]
            digests = [each["digest"] for each in layers if each["mediaType"] == _WEIGHTS]
            blobs = [store / "blobs" / d.replace(":", "-") for d in digests if _DIGEST.fullmatch(d)]
            blob: Path | None = next(filter(Path.is_file, blobs), None)
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            continue  # there is none, or another's file
        if blob is not None:
            return blob
    return None


def ollama_models() -> dict[str, Path]:
    """Return the files of all models of Ollama's library that it has on this machine, by their full
    names, such as llama3.2:latest."""
    found: dict[str, Path] = {}
    for store in _stores():
        with suppress(OSError):  # it may not be searched
            for manifest in sorted((store / _LIBRARY).glob("*/*")):
                name = f"{manifest.parent.name}:{manifest.name}"
                if (file := ollama_file(name)) is not None:
                    found[name] = file
    return found


def _stores() -> Iterator[Path]:
    """Yield the folders in which Ollama may keep models."""
    chosen = os.environ.get("OLLAMA_MODELS")
    home = Path(os.path.expanduser("~"))
    yield from (Path(chosen),) if chosen else (home / ".ollama" / "models", SERVICE)
