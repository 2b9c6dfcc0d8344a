"""Checkpoints: a model's configuration and weights from a folder, a GGUF file, a hub id or a
built-in name.

Weights stay on disk (mmap) until they are read by name. Names and shapes are checked against the
configuration before any weight is read.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from smart_decoding.errors import ConfigError, ModelError
from smart_decoding.files import read_json, reading
from smart_decoding.kernels.weights import Matrix, QuantizedTensor
from smart_decoding.models.checkpoints.gguf import (
    FILE_TYPE,
    TENSORS,
    StoredWeights,
    converted_folder,
)
from smart_decoding.models.checkpoints.gguf_header import own_words, recommended_sampling
from smart_decoding.models.checkpoints.hub import RECORD, forget_sums
from smart_decoding.models.checkpoints.registry import Source, named_in_file, resolve
from smart_decoding.models.checkpoints.rounding import RoundedWeights
from smart_decoding.models.checkpoints.weight_files import (
    StackedExperts,
    Weights,
    as_computed,
    open_weights,
)
from smart_decoding.models.families import vision
from smart_decoding.models.families.config import ModelConfig, refuse_quantised, token_ids
from smart_decoding.models.families.reading import (
    check_tensors,
    config_from_hf,
    is_whole,
    parted,
    text_names,
)
from smart_decoding.models.families.vision import RenamedWeights, VisionFiles
from smart_decoding.models.heads.files import is_head

log = logging.getLogger("smart.models")

_IN_BYTES = ", activations in 8 bits"
_NAMED = 0.01  # of all numbers: types of fewer are not named


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loadable model. `weights`: Hugging Face name to tensor, read on access; `tokenizer_source`:
    a folder for Tokenizer.load; `provenance`: strings that say which weights these are; `vision`:
    its vision part, if it has one; `quantization`: as requested;
    `in_bytes`: whether inputs of quants are rounded to 8 bits; `mtp`: the tensors of its layers
    for multi-token prediction, which are not checked; `named`: the built-in name of the model that
    a GGUF file says it is; `sampling`: what that file recommends, in the names of
    generation_config.json, not checked; `file_type`: what it calls its mixture of types, as stored,
    such as Q4_K_M."""

    config: ModelConfig
    weights: Mapping[str, Matrix]
    tokenizer_source: Path
    provenance: Mapping[str, str]
    vision: VisionFiles | None = None
    quantization: str | None = "off"
    in_bytes: bool = False
    mtp: Weights[Any] | None = None
    named: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    file_type: str = ""

    @property
    def precision(self) -> str:
        """The types of weights and activations, in words: the mixture's name, or all types with a
        share of 1 % at least, the largest first."""
        end = _IN_BYTES if self.in_bytes else ""
        if isinstance(self.weights, RoundedWeights):
            return f"{self.quantization}{end}"
        return f"{self.file_type or _types(self.weights)}{end}"

    @property
    def has_quants(self) -> bool:
        """Whether the first layer has quants. Tensors that cannot be quants are not read."""
        if not isinstance(self.weights, StoredWeights | StackedExperts | RoundedWeights):
            return False
        layer = (name for name in self.weights if name.startswith("model.layers.0."))
        return any(isinstance(self.weights[name], QuantizedTensor) for name in layer)


def load_checkpoint(
    path_or_name: str | Path | Source,
    check: Callable[[ModelConfig], None] = lambda config: None,
    quantization: str | None = "off",
    trust_pickle: bool = False,
) -> Checkpoint:
    """Find (or fetch) a model and check its configuration, names and shapes; no weight is read.

    check: raises for a configuration that cannot be used here, before weights are converted, or
        fetched (but for GGUF files).
    quantization: None (quants of GGUF, and MXFP4, stay what they are), off (they are expanded to
        bf16), int8 or int4 (matrices are rounded to so many bits).
    trust_pickle: whether the weights may be a pickle, where there are no others.
    Raises ModelError, which names the file or tensor; DownloadError if it cannot be fetched."""
    usable = partial(require_usable, check=check)
    source = resolve(path_or_name, trust_pickle, usable)
    if source.path.is_dir():
        return _loaded(source, source.path, check, quantization, trust_pickle)
    folder = converted_folder(source, check, quantization is None)
    try:
        return _loaded(source, folder, check, quantization, trust_pickle)
    except ModelError:
        forget_sums(folder)
        folder = converted_folder(source, check, quantization is None)  # made again if it rotted
        return _loaded(source, folder, check, quantization, trust_pickle)


def _loaded(
    source: Source,
    folder: Path,
    check: Callable[[ModelConfig], None],
    quantization: str | None,
    trust_pickle: bool,
) -> Checkpoint:
    stored = quantization is None
    raw = read_json(folder / "config.json")
    if _has_vision(folder, raw):
        return _rounded(_load_vision(source, folder, raw, check, trust_pickle), quantization)
    config = read_config(folder)
    check(config)
    is_file = source.path != folder
    weights: Weights[Any]
    mtp: Weights[Any] | None
    if is_file and stored:
        weights, mtp = _stored_weights(config, source.path, folder)
    else:
        opened = open_weights(folder, trust_pickle)
        names = text_names(opened) if is_whole(raw) else {name: name for name in opened}
        own, of_mtp = parted(config, names)
        weights = as_computed(config, RenamedWeights(opened, own), stored)
        mtp = as_computed(config, RenamedWeights(opened, of_mtp), stored) if of_mtp else None
    check_tensors(config, weights.shapes, source.path.name if is_file else folder.name)
    provenance = _provenance(source, weights.dtypes["model.embed_tokens.weight"])
    made = Checkpoint(config, weights, folder, provenance, mtp=mtp)
    if is_file:
        provenance["weights"] += ", as stored" if stored else ", dequantised to bf16"
        named = named_in_file(own_words(source.path))
        sampling = recommended_sampling(source.path)
        file_type = str(read_json(folder / RECORD).get(FILE_TYPE, "")) if stored else ""
        made = replace(made, named=named, sampling=sampling, file_type=file_type)
    return _rounded(made, quantization)


def require_usable(
    folder: Path,
    check: Callable[[ModelConfig], None] = lambda config: None,
) -> None:
    """Raise ModelError, or what `check` raises, for a folder's config.json; its weights need not be
    there. A draft head's is not looked at."""
    if is_head(folder):
        return
    if not _has_vision(folder, read_json(folder / "config.json")):
        check(read_config(folder))


def _has_vision(folder: Path, raw: dict[str, Any]) -> bool:
    """Return whether a folder's config.json is of a vision-language model known here; ModelError if
    that is quantised."""
    with reading(folder / "config.json"):
        found = vision.architecture_of(raw) is not None
        if found:
            refuse_quantised(raw)
    return found


def _stored_weights(
    config: ModelConfig, path: Path, folder: Path
) -> tuple[StoredWeights, StoredWeights | None]:
    """Return those of a GGUF file, and those of its MTP layer, and log a warning if they cannot
    stay as they are."""
    own, of_mtp = parted(config, read_json(folder / TENSORS))
    weights = StoredWeights(path, own, folder)
    if weights.expanded:
        log.warning(
            "%s: weights of %s are expanded to bf16, which takes more memory and time than a file "
            "of Q4_K_M or Q8_0, whose weights stay quantised",
            path.name,
            ", ".join(weights.expanded),
        )
    return weights, StoredWeights(path, of_mtp, folder) if of_mtp else None


def _rounded(checkpoint: Checkpoint, quantization: str | None) -> Checkpoint:
    if quantization in (None, "off"):
        return replace(checkpoint, quantization=quantization)
    described = f"{checkpoint.provenance['weights']}, rounded to {quantization}"
    return replace(
        checkpoint,
        weights=RoundedWeights(checkpoint.weights, quantization),
        provenance={**checkpoint.provenance, "weights": described, "dtype": quantization},
        quantization=quantization,
    )


def require_quants(checkpoint: Checkpoint) -> None:
    """Raise ConfigError for weights without quants, whose inputs cannot be rounded to 8 bits."""
    if not checkpoint.has_quants:
        raise ConfigError(
            "activations='int8' needs quantised weights: a GGUF file, or "
            "quantization='int8' or 'int4'"
        )


def with_rounded_activations(checkpoint: Checkpoint) -> Checkpoint:
    """Return the same, inputs of its quants rounded to 8 bits."""
    dtype = checkpoint.provenance["dtype"] + _IN_BYTES
    return replace(checkpoint, provenance={**checkpoint.provenance, "dtype": dtype}, in_bytes=True)


def _types(weights: Mapping[str, Matrix]) -> str:
    """Return the types of weights as they are on disk, by their share of the numbers."""
    assert isinstance(weights, Weights)
    counts: Counter[str] = Counter()
    for name, shape in weights.shapes.items():
        counts[weights.dtypes[name]] += prod(shape)
    shares = counts.most_common()
    return " + ".join(kind for kind, count in shares if count >= _NAMED * counts.total())


def _load_vision(
    source: Source,
    folder: Path,
    raw: dict[str, Any],
    check: Callable[[ModelConfig], None],
    trust_pickle: bool,
) -> Checkpoint:
    config, whole = vision.read_configs(folder, generation_config(folder))
    check(config)
    weights = open_weights(folder, trust_pickle)
    ours, of_vision = vision.split_names(weights, str(vision.architecture_of(raw)))
    text = RenamedWeights(weights, ours)
    check_tensors(config, text.shapes, folder.name)
    provenance = _provenance(source, text.dtypes["model.embed_tokens.weight"])
    files = VisionFiles(folder, whole, of_vision, weights)
    return Checkpoint(config, text, folder, provenance, files)


def _provenance(source: Source, dtype: str) -> dict[str, str]:
    known = {"model": source.name, "weights": source.weights, "dtype": dtype}
    return known | ({"sha256": source.sha256} if source.sha256 else {})


def read_config(folder: Path) -> ModelConfig:
    """Return the configuration in a folder; ModelError if it is missing, corrupt or not
    supported."""
    raw = read_json(folder / "config.json")
    generation = generation_config(folder)
    with reading(folder / "config.json"):
        return config_from_hf(raw, generation)


def generation_config(folder: Path) -> dict[str, Any] | None:
    """Return what a folder's generation_config.json holds; None if there is none."""
    path = folder / "generation_config.json"
    if not path.exists():
        return None
    with reading(path):
        content = read_json(path)
        token_ids(content.get("eos_token_id"))
        return content
