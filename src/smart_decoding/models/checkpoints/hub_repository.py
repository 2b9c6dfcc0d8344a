"""Repositories of the model hub: folders of safetensors and single GGUF files, downloaded into the
hub client's own cache."""

from __future__ import annotations

import errno
import fnmatch
import glob
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from smart_decoding.errors import DownloadError, ModelError
from smart_decoding.files import errno_of, read_json, reading
from smart_decoding.models.checkpoints.gguf_header import HEAD, is_head_file
from smart_decoding.models.checkpoints.gguf_parts import is_further_part, parts_of, without_part

# The hub client is imported late: it takes a quarter of a second.

_WEIGHTS = "*.safetensors"
_FILES = [_WEIGHTS, "*.json", "*.jinja", "tokenizer.model"]
_PICKLES = ["pytorch_model*.bin"]
_NOT = ["*/*", "consolidated*", "*.gguf"]
_LONGEST = 300  # characters of what the client says
PATIENT = 10.0  # seconds to wait for the hub's first answer, and for each file's


def snapshot(repository: str, timeout: float | None, *, local_only: bool) -> Path:
    """Return the folder with a repository's safetensors, json and tokenizer files.

    timeout: seconds to wait for the hub's first answer, None if it has just given one; local_only:
    take only what is in the cache. Raises DownloadError."""
    return _stored(repository) if local_only else download(repository, _FILES, _NOT, timeout)


def pickles(repository: str) -> Path:
    """Return the folder as by `snapshot`, with the pickled weights of a repository that the hub
    has just listed. Raises DownloadError."""
    return download(repository, _PICKLES, _NOT, None)


def gguf_file(repository: str, file: str, timeout: float | None, *, local_only: bool) -> Path:
    """Return one file of a repository, the first if a model is split into several, which are
    fetched too; arguments and errors are as those of `snapshot`."""
    # not hf_hub_download, which tries for 23 seconds where there is no network
    names = parts_of(file)
    if local_only:
        folder = _stored(repository)
    else:
        folder = download(repository, [glob.escape(name) for name in names], [], timeout)
    for name in names:
        if not (folder / name).is_file():
            raise DownloadError(
                f"cannot fetch {name} of {repository} from the hub: "
                "it is not there, or the hub does not answer"
            )
    return folder / names[0]


def config_file(repository: str, *, local_only: bool) -> Path:
    """Return the folder with a repository's config.json, if it has one: checked before
    gigabytes are fetched. The hub has just listed it. Errors are as those of `snapshot`."""
    if local_only:
        return _stored(repository)
    return download(repository, ["config.json", "generation_config.json"], _NOT, None)


def download(repository: str, take: list[str], leave: list[str], timeout: float | None) -> Path:
    """Return the folder of a repository, with the files that the patterns `take` name and `leave`
    do not; where the hub does not answer in time, as it is in the cache.

    timeout: as for `snapshot`; the client's download itself would wait for the first answer without
    end. Raises DownloadError."""
    from huggingface_hub import snapshot_download

    silence = None if timeout is None else _silence(repository, timeout)
    with _one_line_errors(repository, silence):
        folder = snapshot_download(
            repository,
            allow_patterns=take,
            ignore_patterns=leave,
            etag_timeout=timeout or PATIENT,
            local_files_only=silence is not None,
        )
    return Path(str(folder))


def _silence(repository: str, timeout: float) -> Exception | None:
    """Return why the hub says nothing in time, if it does not."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().model_info(repository, timeout=timeout)
    except HfHubHTTPError:  # it says something; the download reports it
        return None
    except Exception as error:  # of several libraries
        return error
    return None


def _stored(repository: str) -> Path:
    """Return what the client's cache holds of the main branch. Raises DownloadError for nothing."""
    root = cached_folder(repository)
    with suppress(OSError):
        folder = root / "snapshots" / (root / "refs" / "main").read_text().strip()
        if folder.is_dir():
            return folder
    raise DownloadError(f"{repository} is not in the hub's cache {root.parent}")


def cached_folder(repository: str) -> Path:
    """Return where the hub client's cache keeps a repository, if it has it."""
    return hub_cache() / f"models--{repository.replace('/', '--')}"


def repository_of(folder: Path) -> str:
    """Return the hub id of a folder in the hub client's cache."""
    return folder.name.removeprefix("models--").replace("--", "/")


def hub_cache() -> Path:
    """Return the hub client's cache, which other programs use too."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def is_complete(folder: Path) -> bool:
    """Return whether a snapshot holds a configuration, a tokenizer and all weights (an interrupted
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
    """Return the revision, in 12 digits, of a repository's file that was downloaded to `path`."""
    return path.parents[len(PurePosixPath(file).parts) - 1].name[:12]


@dataclass(frozen=True, slots=True)
class Listing:
    """What a repository holds. files: their names; gguf_family: the architecture of its GGUF files,
    where the hub reports it; answered: whether this is from the hub, not from the cache; revision:
    the hub's."""

    repository: str
    files: list[str]
    gguf_family: str = ""
    answered: bool = True
    revision: str = ""

    def nothing_to_fetch(self, names: Iterable[str]) -> bool:
        """Return whether the cache has these files of this revision, or must do as nobody
        answers."""
        if not self.answered:
            return True
        with suppress(DownloadError):
            folder = _stored(self.repository)
            return folder.name == self.revision and all((folder / n).is_file() for n in names)
        return False

    @property
    def of_snapshot(self) -> list[str]:
        """The files that `snapshot` takes."""
        return [n for n in self.files if _matches(n, _FILES) and not _matches(n, _NOT)]

    @property
    def ggufs(self) -> list[str]:
        """The GGUF files, of a split one the first."""
        names = sorted(name for name in self.files if name.endswith(".gguf"))
        return [name for name in names if not is_further_part(name)]

    @property
    def is_of_head(self) -> bool:
        """Whether its GGUF files are those of a draft head: by what the hub reports, or where it
        does not answer by what is in the cache."""
        if self.answered:
            return self.gguf_family == HEAD
        folder = _stored(self.repository)
        return any(is_head_file(folder / name) for name in self.ggufs)

    @property
    def has_only_ggufs(self) -> bool:
        """Whether these are all of its weights."""
        others = [n for n in self.files if "/" not in n and _matches(n, [_WEIGHTS, *_PICKLES])]
        return bool(self.ggufs) and not others

    def gguf_name(self, requested: str) -> str:
        """Return the GGUF file that `requested` means: its name, or a quantisation such as Q4_K_M.

        Raises DownloadError, with the names to choose from, unless one file fits."""
        if requested.endswith(".gguf"):
            return requested
        fitting = [name for name in self.ggufs if fits(name, requested)]
        if len(fitting) == 1:
            return fitting[0]
        found = "several GGUF files" if fitting else "no GGUF file"
        known = ", ".join(fitting or self.ggufs) or "none"
        name = self.repository
        raise DownloadError(
            f"{name} has {found} of {requested}; give {name}:FILE with one of: {known}"
        )


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def fits(name: str, requested: str) -> bool:
    """Return whether a GGUF file of a repository is the one with this name or quantisation."""
    ending = rf"(.*[-._/])?{re.escape(requested)}\.gguf"
    model = without_part(name)
    is_named = model == without_part(requested)
    return is_named or re.fullmatch(ending, model, re.IGNORECASE) is not None


def listing(repository: str, timeout: float) -> Listing:
    """Return what the hub lists; without the hub, what is in the cache. Raises DownloadError."""
    from huggingface_hub import HfApi

    try:
        with _one_line_errors(repository):
            found = HfApi().model_info(repository, timeout=timeout)
    except DownloadError:
        files = _cached_names(repository)
        if not files:
            raise
        return Listing(repository, files, answered=False)
    family = (getattr(found, "gguf", None) or {}).get("architecture", "")
    files = [file.rfilename for file in found.siblings or []]
    return Listing(repository, files, family, revision=getattr(found, "sha", None) or "")


def _cached_names(repository: str) -> list[str]:
    try:
        folder = _stored(repository)
    except DownloadError:
        return []
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


@contextmanager
def _one_line_errors(repository: str, silence: Exception | None = None) -> Iterator[None]:
    """silence: why the hub said nothing, which explains what is missing then."""
    try:
        yield
    except Exception as error:  # the client lets errors of several libraries through
        reason = _reason(silence or error)
        raise DownloadError(f"cannot fetch {repository} from the hub: {reason}") from error


def _reason(error: Exception) -> str:
    """In one line. The client's own says first what number its request had."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
    )

    if isinstance(error.__cause__, HfHubHTTPError):  # it looked into the cache then
        error = error.__cause__
    if isinstance(error, GatedRepoError):
        return "it is gated: accept its terms on its page, then `hf auth login` or set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or it is private (`hf auth login`, or set HF_TOKEN)"
    if errno_of(error) == errno.ENOSPC:
        return f"{os.strerror(errno.ENOSPC)}: make room in {hub_cache()}, or set HF_HOME elsewhere"
    text = " ".join(str(error).split())[:_LONGEST] or type(error).__name__
    of_network = isinstance(error, ConnectionError | TimeoutError)
    is_known = isinstance(error, HfHubHTTPError | ValueError | OSError) and not of_network
    return text if is_known else f"it does not answer: {text}"
