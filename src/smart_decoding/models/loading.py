"""Checkpoints: a model's configuration and weights from a folder, a GGUF file, a hub id or a
built-in name.

Weights stay on disk (mmap) until they are asked for. Names and shapes are checked against the
configuration before any weight is read.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open

from smart_decoding.errors import ModelError
from smart_decoding.models import vision
from smart_decoding.models.config import ModelConfig
from smart_decoding.models.gguf import StoredWeights, converted_folder
from smart_decoding.models.gptq import INTEGERS, GroupedWeights, scheme_of
from smart_decoding.models.registry import Source, resolve
from smart_decoding.models.rounding import RoundedWeights
from smart_decoding.models.vision import RenamedWeights, VisionFiles

if TYPE_CHECKING:
    from smart_decoding.kernels.weights import Matrix

_INDEX = "model.safetensors.index.json"
_FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loadable model. `weights`: Hugging Face name to tensor, read on access; `tokenizer_source`:
    a folder for Tokenizer.load; `provenance`: strings that say which weights these are; `vision`:
    its vision part, if it has one; `quantization`: as it was asked for."""

    config: ModelConfig
    weights: Mapping[str, Matrix]
    tokenizer_source: Path
    provenance: Mapping[str, str]
    vision: VisionFiles | None = None
    quantization: str | None = "off"


def _accept(config: ModelConfig) -> None:
    """Takes any."""


def load_checkpoint(
    path_or_name: str | Path,
    check: Callable[[ModelConfig], None] = _accept,
    quantization: str | None = "off",
) -> Checkpoint:
    """Finds (or fetches) a model and checks its configuration, names and shapes; reads no weight
    yet.

    check: raises for a configuration that cannot be used here, before GGUF weights are converted.
    quantization: None (quants of GGUF, GPTQ and AWQ stay what they are), off (they are expanded to
        bf16), int8 or int4 (matrices are rounded to so many bits).
    Raises ModelError, in one line that names the file or tensor; DownloadError if it cannot be
    fetched."""
    source = resolve(path_or_name)
    stored = quantization is None
    folder = _folder_of(source, check, stored)
    raw = _read_json(folder / "config.json")
    architecture = vision.architecture_of(raw)
    if architecture is not None:
        return _rounded(_load_vision(source, folder, raw, architecture, check), quantization)
    scheme = scheme_of(raw, quantization)
    config = read_config(folder)
    check(config)
    is_file = source.path != folder
    weights: StoredWeights | SafetensorsWeights | GroupedWeights = (
        StoredWeights(source.path, folder) if is_file and stored else SafetensorsWeights(folder)
    )
    if scheme is not None and isinstance(weights, SafetensorsWeights):
        weights = GroupedWeights(weights, scheme, config.expected_shapes(), stored)
    config.check_tensors(weights.shapes, source.path.name if is_file else folder.name)
    provenance = _provenance(source, weights.dtype_of("model.embed_tokens.weight"))
    if is_file or scheme is not None:
        provenance["weights"] += ", as stored" if stored else ", dequantised to bf16"
    return _rounded(Checkpoint(config, weights, folder, provenance), quantization)


def _rounded(checkpoint: Checkpoint, quantization: str | None) -> Checkpoint:
    if quantization in (None, "off"):
        return replace(checkpoint, quantization=quantization)
    told = f"{checkpoint.provenance['weights']}, rounded to {quantization}"
    return replace(
        checkpoint,
        weights=RoundedWeights(checkpoint.weights, quantization),
        provenance={**checkpoint.provenance, "weights": told, "dtype": quantization},
        quantization=quantization,
    )


def _load_vision(
    source: Source,
    folder: Path,
    raw: dict[str, Any],
    architecture: str,
    check: Callable[[ModelConfig], None],
) -> Checkpoint:
    config, whole = vision.read_configs(folder, raw, _generation(folder))
    check(config)
    weights = SafetensorsWeights(folder)
    ours, of_vision = vision.split_names(weights, architecture)
    config.check_tensors(
        {name: weights.shapes[theirs] for name, theirs in ours.items()}, folder.name
    )
    provenance = _provenance(source, weights.dtype_of(ours["model.embed_tokens.weight"]))
    files = VisionFiles(folder, whole, of_vision, weights)
    return Checkpoint(config, RenamedWeights(weights, ours), folder, provenance, files)


def _provenance(source: Source, dtype: str) -> dict[str, str]:
    known = {"model": source.name, "weights": source.weights, "dtype": dtype}
    return known | ({"sha256": source.sha256} if source.sha256 else {})


def _folder_of(source: Source, check: Callable[[ModelConfig], None], stored: bool) -> Path:
    return source.path if source.path.is_dir() else converted_folder(source, check, stored)


def read_config(folder: Path) -> ModelConfig:
    """The configuration in a folder, but for how its weights are quantised; ModelError if it is
    missing, corrupt or not supported."""
    raw = _read_json(folder / "config.json") | {"quantization_config": None}
    return ModelConfig.from_hf(raw, _generation(folder))


def _generation(folder: Path) -> dict[str, Any] | None:
    path = folder / "generation_config.json"
    return _read_json(path) if path.is_file() else None


class SafetensorsWeights(Mapping[str, torch.Tensor]):
    """The tensors of a folder's safetensors files, each read when asked for.

    Raises ModelError for files that are missing, corrupt or pickled."""

    def __init__(self, folder: Path) -> None:
        self._file_of: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path, listed in _weight_files(folder).items():
            file = _open(path)
            names = set(file.keys())
            for name in listed if listed is not None else sorted(names):
                if name not in names:
                    raise ModelError(
                        f"{path.name} lacks the tensor {name} that the index lists; fetch it again"
                    )
                self._file_of[name] = file
                self.shapes[name] = tuple(file.get_slice(name).get_shape())
                is_packed = self.dtype_of(name) == "I32" and name.endswith(INTEGERS)
                if self.dtype_of(name) not in _FLOATS and not is_packed:
                    known = ", ".join(_FLOATS)
                    raise ModelError(
                        f"the tensor {name} is {self.dtype_of(name)}; supported: {known}"
                    )

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.as_tensor(self._file_of[name].get_tensor(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def dtype_of(self, name: str) -> str:
        """The type on disk: BF16, F16 or F32; empty for an unknown name."""
        return str(self._file_of[name].get_slice(name).get_dtype()) if name in self._file_of else ""


def _weight_files(folder: Path) -> Mapping[Path, list[str] | None]:
    """The files to open, with the tensors the index lists in each (None: whatever is in it).

    One file comes before an index, as in transformers, which leaves an older index behind when it
    saves anew."""
    single = folder / "model.safetensors"
    if single.is_file():
        return {single: None}
    if (folder / _INDEX).is_file():
        try:
            weight_map: dict[str, str] = dict(_read_json(folder / _INDEX)["weight_map"])
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"{_INDEX} in {folder} is corrupt: it has no weight_map; fetch it again"
            ) from error
        files: dict[Path, list[str]] = defaultdict(list)
        for name, shard in weight_map.items():
            if Path(shard).name != shard:
                raise ModelError(f"{_INDEX} in {folder} names {shard}, which is outside the folder")
            files[folder / shard].append(name)
        return dict(files)
    found = sorted(folder.glob("model-*.safetensors"))
    if not found:
        _refuse(folder)
    return dict.fromkeys(found)


def _refuse(folder: Path) -> NoReturn:
    pickled = [
        path.name for suffix in ("bin", "pt", "pth") for path in sorted(folder.glob(f"*.{suffix}"))
    ]
    if pickled:
        raise ModelError(
            f"{folder} holds only pickled weights ({pickled[0]}), which can run code when loaded; "
            "convert them to safetensors"
        )
    raise ModelError(f"{folder} holds no model.safetensors")


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise ModelError(f"{path.name} is missing from {path.parent}; fetch it again") from error
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path.name} in {path.parent} is corrupt or truncated ({error}); fetch it again"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(
            f"{path.name} is missing from {path.parent}; is it a model folder?"
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path.name} in {path.parent} is corrupt or unreadable: {error}"
        ) from error
    if not isinstance(content, dict):
        raise ModelError(f"{path.name} in {path.parent} is corrupt: it is not a JSON object")
    return content
