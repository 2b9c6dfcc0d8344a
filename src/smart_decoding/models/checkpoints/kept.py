"""What the caches hold for a model: its download, converted weights and profiles."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from smart_decoding.errors import ConfigError, ModelError
from smart_decoding.files import expanded, read_json
from smart_decoding.models.checkpoints.gguf_parts import without_part
from smart_decoding.models.checkpoints.hub import RECORD, cache_dir, conversion, conversion_key
from smart_decoding.models.checkpoints.hub_repository import (
    cached_folder,
    fits,
    hub_cache,
    is_complete,
)
from smart_decoding.models.checkpoints.ollama import ollama_file
from smart_decoding.models.checkpoints.registry import (
    HUB,
    HUB_ID,
    NAMED_MODELS,
    first_part,
    hub_id_of,
)
from smart_decoding.models.families.family import MTP

PARTLY = "partly fetched"
OUTDATED = "outdated"


@dataclass(frozen=True, slots=True)
class Kept:
    """A file or folder in a cache. kind: download, hub, partly fetched, converted, outdated (of
    another version of the conversion: nothing uses it) or profile; size in bytes."""

    kind: str
    path: Path
    size: int


def kept_of(name: str) -> list[Kept]:
    """Return everything of one model: a built-in name, with its source or without; a hub id, with a
    file or for the whole repository; a GGUF file, or a folder's name among the converted ones. Of a
    user's own file only what was made of it.

    Raises ConfigError where several files of a repository are meant."""
    name = HUB.sub("", name)
    base, _, origin = name.partition("@")
    hub_id = hub_id_of(name)
    if base in NAMED_MODELS and origin in ("", "hub", "pypi"):
        return _of_named(name, base, origin)
    local = ollama_file(name) or first_part(expanded(name))
    if hub_id and not local.exists():
        return _of_hub(name, hub_id[1], hub_id[2])
    place = str(local.resolve())
    found = [*_converted(_keys([local]), name), *_profiles(lambda model: model == place)]
    # A file's name without its folder, as `smart models` shows it.
    return found or [each for each in conversions() if made_of(each.path) == f"of {name}"]


def hub_repositories() -> list[Kept]:
    """Return the models in the hub client's cache, which other programs use too."""
    return [_repository(path) for path in sorted(hub_cache().glob("models--*"))]


def conversions() -> list[Kept]:
    """Return all folders of converted weights."""
    return [_conversion(folder) for folder in sorted((cache_dir() / "converted").glob("*/"))]


def size_of(path: Path, links: bool = False) -> int:
    """Return bytes of a file, or of all files below a folder. Links count nothing, or with `links`
    what they lead to."""
    files = path.rglob("*") if path.is_dir() and (links or not path.is_symlink()) else [path]
    return sum(
        file.stat().st_size for file in files if file.is_file() and (links or not file.is_symlink())
    )


def readable(size: int) -> str:
    """Return bytes in MB or GB."""
    return f"{size / 1e6:.0f} MB" if size < 1e9 else f"{size / 1e9:.1f} GB"


def made_of(folder: Path) -> str:
    """Return what a converted folder was made of."""
    try:
        record = read_json(folder / RECORD)
        return f"of {record.get('source') or record['base']}"
    except (ModelError, KeyError):
        return "incomplete"


def holds_mtp(folder: Path) -> bool:
    """Return whether an index of tensors in a repository or a converted folder names a layer for
    multi-token prediction."""
    indices = (folder.rglob(name) for name in ("tensors.json", "model.safetensors.index.json"))
    files = [path for path in itertools.chain(*indices) if path.is_file()]
    return any(f'"{MTP}' in path.read_text() for path in files)


def _kept(kind: str, path: Path) -> Kept:
    return Kept(kind, path, size_of(path))


def _of_named(name: str, base: str, origin: str) -> list[Kept]:
    model = NAMED_MODELS[base]
    found: list[Kept] = []
    keys: set[str] = set()
    if origin != "hub":
        pinned = model.pinned.path
        for path in sorted(pinned.parent.glob(f"{pinned.name}*")):  # its checksum, parts of it
            found.append(_kept(PARTLY if path.name.endswith(".wheels") else "download", path))
        keys.add(conversion_key(pinned, model.pinned.sha256))
    if origin != "pypi":
        in_hub = list(_in_hub(model.repository, model.hub_file))
        if not model.hub_file:
            in_hub = [_whole_or_not(each) for each in in_hub]
        keys |= _keys(_gguf(in_hub))
        found += in_hub
    found += _converted(keys)
    return found + _profiles(
        lambda theirs: theirs == name or (not origin and theirs.partition("@")[0] == base)
    )


def _of_hub(name: str, repository: str, requested: str | None) -> list[Kept]:
    found = list(_in_hub(repository, requested))
    files = _gguf(found)

    def is_of(model: str) -> bool:
        theirs = HUB_ID.fullmatch(model)
        if theirs is None or theirs[1] != repository:
            return False
        if requested is None:
            return True
        of_file = theirs[2] is not None and any(fits(file.name, theirs[2]) for file in files)
        return model == name or of_file

    return [*found, *_converted(_keys(files)), *_profiles(is_of)]


def _in_hub(repository: str, requested: str | None) -> Iterator[Kept]:
    """Return the repository in the hub client's cache; if a file is requested, its links and what
    no other link leads to."""
    folder = cached_folder(repository)
    if not folder.is_dir():
        return
    if not requested:
        yield _repository(folder)
        return
    links = {path: _name_of(path) for path in folder.glob("snapshots/**/*") if not path.is_dir()}
    names = {file for file in links.values() if fits(file, requested)}
    if len(set(map(without_part, names))) > 1:
        known = ", ".join(sorted(names))
        raise ConfigError(
            f"the cache holds several files of {repository}:{requested}; give one of: {known}"
        )
    doomed = sorted(path for path, file in links.items() if file in names)
    others = {path.resolve() for path in links.keys() - doomed}
    blobs = {path.resolve() for path in doomed if path.is_symlink()} - others
    inside = set(folder.resolve().glob("blobs/*"))
    if doomed and not others and not inside - blobs:
        yield _repository(folder)
        return
    for path in (*doomed, *sorted(blobs & inside)):
        yield _kept("hub", path)


def _name_of(path: Path) -> str:
    """Return a file's name in its repository; path: below snapshots/REVISION."""
    parts = path.parts
    return "/".join(parts[len(parts) - parts[::-1].index("snapshots") + 1 :])


def _repository(folder: Path) -> Kept:
    return _kept(PARTLY if any(folder.glob("blobs/*.incomplete")) else "hub", folder)


def _whole_or_not(kept: Kept) -> Kept:
    """Return a repository of safetensors, by whether a snapshot of it has all that a model
    needs."""
    whole = any(is_complete(snapshot) for snapshot in kept.path.glob("snapshots/*/"))
    return replace(kept, kind="hub" if whole else PARTLY)


def _gguf(found: list[Kept]) -> list[Path]:
    """Return the GGUF files, by the names that they have in a repository."""
    files: list[Path] = []
    for each in found:
        files += each.path.rglob("*.gguf") if each.path.is_dir() else [each.path]
    return [file for file in files if file.suffix == ".gguf"]


def _keys(files: list[Path]) -> set[str]:
    return {conversion_key(file) for file in files if file.is_file()}


def _converted(keys: set[str], name: str = "") -> Iterator[Kept]:
    """Return what was made of files with these keys, by whatever version; or the folder of that
    name."""
    ends = {key.partition("-")[2] for key in keys}
    for each in conversions():
        key = each.path.name.split("-", 2)[1:2]  # behind it, what was made
        if ends.intersection(key) or each.path.name == name:
            yield each


def _conversion(folder: Path) -> Kept:
    version = re.match(r"v[0-9a-f]+(?=-)", folder.name)
    is_old = version is not None and version[0] != conversion()
    return _kept(OUTDATED if is_old else "converted", folder)


def _profiles(is_meant: Callable[[str], bool]) -> list[Kept]:
    found = []
    for path in sorted((cache_dir() / "profiles").glob("*.json")):
        try:
            model: Any = json.loads(path.read_text()).get("model")
        except (OSError, ValueError, AttributeError):
            continue
        if isinstance(model, str) and is_meant(model):
            found.append(_kept("profile", path))
    return found
