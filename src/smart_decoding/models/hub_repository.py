"""Repositories of the model hub: folders of safetensors and single GGUF files, downloaded into the
hub client's own cache."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from smart_decoding.errors import DownloadError, ModelError
from smart_decoding.files import read_json, reading

# The hub client is imported late: it takes a quarter of a second.

_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
_PICKLES = ["pytorch_model*.bin"]
_NOT = ["*/*", "consolidated*", "*.gguf"]


def snapshot(repository: str, timeout: float, *, local_only: bool) -> Path:
    """The folder with a repository's safetensors, json and tokenizer files.

    timeout: seconds to wait for the hub's first answer; local_only: take only what is in the
    cache. Raises DownloadError."""
    return _stored(repository) if local_only else download(repository, _FILES, _NOT, timeout)


def pickles(repository: str, timeout: float) -> Path:
    """The folder as by `snapshot`, with the repository's pickled weights. Raises DownloadError."""
    return download(repository, _PICKLES, _NOT, timeout)


def gguf_file(repository: str, file: str, timeout: float, *, local_only: bool) -> Path:
    """One file of a repository; its arguments and errors are as those of `snapshot`."""
    # not hf_hub_download, which tries for 23 seconds where there is no network
    if local_only:
        folder = _stored(repository)
    else:
        folder = download(repository, [glob.escape(file)], [], timeout)
    path = folder / file
    if not path.is_file():
        raise DownloadError(
            f"cannot fetch {file} of {repository} from the hub: "
            "it is not there, or the hub does not answer"
        )
    return path


def download(repository: str, take: list[str], leave: list[str], timeout: float) -> Path:
    """The folder of a repository, with the files that the patterns `take` name and `leave` do
    not. Raises DownloadError."""
    from huggingface_hub import snapshot_download

    with _one_line_errors(repository):
        folder = snapshot_download(
            repository, allow_patterns=take, ignore_patterns=leave, etag_timeout=timeout
        )
    return Path(str(folder))


def _stored(repository: str) -> Path:
    """What the client's cache holds of the main branch. Raises DownloadError for nothing."""
    root = cached_folder(repository)
    with suppress(OSError):
        folder = root / "snapshots" / (root / "refs" / "main").read_text().strip()
        if folder.is_dir():
            return folder
    raise DownloadError(f"{repository} is not in the hub's cache {root.parent}")


def cached_folder(repository: str) -> Path:
    """Where the hub client's cache keeps a repository, if it has it."""
    return hub_cache() / f"models--{repository.replace('/', '--')}"


def repository_of(folder: Path) -> str:
    """The hub id of a folder in the hub client's cache."""
    return folder.name.removeprefix("models--").replace("--", "/")


def hub_cache() -> Path:
    """The hub client's cache, which other programs use too."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def is_complete(folder: Path) -> bool:
    """Whether a snapshot holds a configuration, a tokenizer and all weights (an interrupted
    download does not)."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.is_file() and not single.is_file():
        try:
            with reading(index):
                shards = set(read_json(index)["weight_map"].values())
        except ModelError:
            return False
    else:
        shards = {single.name}
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    return has_tokenizer and all((folder / name).is_file() for name in ("config.json", *shards))


def revision_of(path: Path, file: str) -> str:
    """The revision, in 12 digits, of a repository's file that was downloaded to `path`."""
    return path.parents[len(PurePosixPath(file).parts) - 1].name[:12]


def gguf_name(repository: str, asked: str, timeout: float) -> str:
    """The GGUF file that `asked` means: its name, or a quantisation such as Q4_K_M.

    Raises DownloadError, with the names to choose from, unless one file fits."""
    if asked.endswith(".gguf"):
        return asked
    names = _gguf_names(repository, timeout)
    fitting = [name for name in names if fits(name, asked)]
    if len(fitting) == 1:
        return fitting[0]
    found = "several GGUF files" if fitting else "no GGUF file"
    known = ", ".join(fitting or names) or "none"
    raise DownloadError(
        f"{repository} has {found} of {asked}; give {repository}:FILE with one of: {known}"
    )


def fits(name: str, asked: str) -> bool:
    """Whether a GGUF file of a repository is the one asked for by name or quantisation."""
    ending = rf"(.*[-._/])?{re.escape(asked)}\.gguf"
    return name == asked or re.fullmatch(ending, name, re.IGNORECASE) is not None


def _gguf_names(repository: str, timeout: float) -> list[str]:
    """As the hub lists them; without the hub, those in the cache."""
    from huggingface_hub import HfApi

    try:
        with _one_line_errors(repository):
            files = HfApi().model_info(repository, timeout=timeout).siblings or []
        names = [file.rfilename for file in files]
    except DownloadError:
        names = _cached_names(repository)
        if not names:
            raise
    return sorted(name for name in names if name.endswith(".gguf"))


def _cached_names(repository: str) -> list[str]:
    try:
        folder = snapshot(repository, 0.0, local_only=True)
    except DownloadError:
        return []
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf")]


@contextmanager
def _one_line_errors(repository: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the client lets errors of several libraries through
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DownloadError(f"cannot fetch {repository} from the hub: {reason}") from error
