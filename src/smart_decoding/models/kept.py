"""What the caches hold for a model: its download, converted weights and profiles."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smart_decoding.models.hub import cache_dir, conversion_key
from smart_decoding.models.registry import NAMED_MODELS


@dataclass(frozen=True, slots=True)
class Kept:
    """A file or folder in a cache. kind: download, hub, converted or profile; size in bytes."""

    kind: str
    path: Path
    size: int


def kept_of(name: str) -> list[Kept]:
    """Everything of one model: a built-in name, a hub id, a GGUF file, or a folder's name among the
    converted ones. Of a user's own file only what was made of it."""
    found = list(_downloads(name))
    weights = [Path(name).expanduser()] + [
        file
        for each in found
        for file in ([each.path] if each.path.is_file() else _gguf(each.path))
    ]
    found += _converted(name, weights)
    found += [_kept("profile", path) for path in _profiles(name)]
    return found


def hub_repositories() -> list[Kept]:
    """The models in the hub client's cache, which other programs use too."""
    return [_kept("hub", path) for path in sorted(_hub_cache().glob("models--*"))]


def repository_of(folder: Path) -> str:
    """The hub id of a folder in the hub client's cache."""
    return folder.name.removeprefix("models--").replace("--", "/")


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; links count nothing."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file() and not file.is_symlink())


def readable(size: int) -> str:
    """Bytes in MB or GB."""
    return f"{size / 1e6:.0f} MB" if size < 1e9 else f"{size / 1e9:.1f} GB"


def made_of(folder: Path) -> str:
    """What a converted folder was made of."""
    try:
        record = json.loads((folder / "converted.json").read_text(encoding="utf-8"))
        return f"of {record.get('source') or record['base']}"
    except (OSError, ValueError, KeyError):
        return "incomplete"


def _kept(kind: str, path: Path) -> Kept:
    return Kept(kind, path, size_of(path))


def _downloads(name: str) -> Iterator[Kept]:
    base = name.partition("@")[0]
    repository = name.partition(":")[0]
    if base in NAMED_MODELS:
        model = NAMED_MODELS[base]
        repository = model.repository
        pinned = model.pinned.path
        for path in sorted(pinned.parent.glob(f"{pinned.name}*")):  # its checksum, parts of it
            yield _kept("download", path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        folder = _hub_cache() / f"models--{repository.replace('/', '--')}"
        if folder.is_dir():
            yield _kept("hub", folder)


def _gguf(folder: Path) -> list[Path]:
    return sorted(folder.glob("snapshots/**/*.gguf"))


def _converted(name: str, weights: list[Path]) -> Iterator[Kept]:
    keys = {conversion_key(path) for path in weights if path.is_file()}
    base = NAMED_MODELS.get(name.partition("@")[0])
    if base is not None:
        keys.add(conversion_key(base.pinned.path, base.pinned.sha256))
    for folder in sorted((cache_dir() / "converted").glob("*/")):
        if folder.name.removesuffix("-stored") in keys or folder.name == name:
            yield _kept("converted", folder)


def _profiles(name: str) -> Iterator[Path]:
    for path in sorted((cache_dir() / "profiles").glob("*.json")):
        try:
            model: Any = json.loads(path.read_text()).get("model")
        except (OSError, ValueError, AttributeError):
            continue
        if isinstance(model, str) and _same(model, name):
            yield path


def _same(model: str, name: str) -> bool:
    """Whether two names mean one model, from whatever source."""
    if model.partition("@")[0] == name.partition("@")[0]:
        return True
    if Path(name).exists():
        return Path(model).expanduser().resolve() == Path(name).expanduser().resolve()
    return model.partition(":")[0] == name.partition(":")[0]


def _hub_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)
