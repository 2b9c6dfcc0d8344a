"""The weights of a folder: safetensors, or pickles where they are allowed, one file or shards with
their index. Tensors stay on disk (mmap) until they are read by name."""

from __future__ import annotations

import pickle
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor

from smart_decoding.errors import ModelError
from smart_decoding.files import read_json, reading
from smart_decoding.kernels.weights import Matrix
from smart_decoding.models.checkpoints.registry import TRUST
from smart_decoding.models.families.config import quantised
from smart_decoding.models.families.layer import GATED_NORM

if TYPE_CHECKING:
    from smart_decoding.models.families.config import ModelConfig

_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_FLOATS = ("BF16", "F16", "F32")
_OF_QUANTS = (".qweight", ".qzeros", ".g_idx")  # ends of names in GPTQ and AWQ checkpoints
# buffers that old checkpoints hold, whatever their type: they are computed anew
_IGNORED = ("inv_freq", "position_ids")


MatrixT = TypeVar("MatrixT", Tensor, Matrix)
MatrixT_co = TypeVar("MatrixT_co", Tensor, Matrix, covariant=True)


class Weights(Mapping[str, MatrixT_co]):
    """Tensors by name, each read on access. shapes, dtypes: theirs on disk; a dtype is BF16,
    F16, F32 or one of quants. folder: what was made of a GGUF file whose quants these are."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    folder: Path | None = None

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def open_weights(folder: Path, trust_pickle: bool = False) -> Weights[Tensor]:
    """Return the folder's safetensors; its pytorch_model.bin where there are none and pickles are
    trusted.

    Raises ModelError for files that are missing, corrupt, or pickles that are not trusted."""
    files = _weight_files(folder, "model", "safetensors")
    if files:
        return SafetensorsWeights(files)
    pickled = sorted(path for end in ("bin", "pt", "pth") for path in folder.glob(f"*.{end}"))
    if pickled and not trust_pickle:
        raise ModelError(
            f"{folder} holds only pickled weights ({pickled[0].name}), which can run code when "
            f"loaded; {TRUST}"
        )
    files = _weight_files(folder, "pytorch_model", "bin")
    if not files:
        trusted = " nor pytorch_model.bin" if trust_pickle else ""
        raise ModelError(f"{folder} holds no model.safetensors{trusted}")
    return PickledWeights(files)


class SafetensorsWeights(Weights[Tensor]):
    """The tensors of safetensors files, with the names that an index lists in each (None: all)."""

    def __init__(self, files: Mapping[Path, list[str] | None]) -> None:
        self._file_of: dict[str, Any] = {}
        self.shapes = {}
        self.dtypes = {}
        for path, listed in files.items():
            with reading(path):
                file: Any = safe_open(path, framework="pt")
                for name in _names(path, set(file.keys()), listed):
                    self._file_of[name] = file
                    part = file.get_slice(name)
                    self.shapes[name] = tuple(part.get_shape())
                    self.dtypes[name] = _checked_dtype(name, str(part.get_dtype()))

    def __getitem__(self, name: str) -> Tensor:
        return torch.as_tensor(self._file_of[name].get_tensor(name))


class PickledWeights(Weights[Tensor]):
    """The tensors of pickles, which may hold nothing else: no code is run."""

    def __init__(self, files: Mapping[Path, list[str] | None]) -> None:
        self._tensors: dict[str, Tensor] = {}
        self.shapes = {}
        self.dtypes = {}
        for path, listed in files.items():
            tensors = unpickle(path)
            for name in _names(path, set(tensors), listed):
                tensor = self._tensors[name] = tensors[name]
                self.shapes[name] = tuple(tensor.shape)
                dtype = _DTYPES.get(tensor.dtype, str(tensor.dtype))
                self.dtypes[name] = _checked_dtype(name, dtype)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]


class ShiftedNorms(Weights[MatrixT]):
    """Other weights, `by` added to each norm but linear attention's own, in float32."""

    def __init__(self, weights: Weights[MatrixT], by: float) -> None:
        self._weights: Weights[MatrixT] = weights
        self._by = by
        self.shapes = weights.shapes
        self.dtypes = weights.dtypes

    def __getitem__(self, name: str) -> MatrixT:
        weight = self._weights[name]
        if not isinstance(weight, Tensor) or name.endswith(GATED_NORM):
            return weight
        return weight.float() + self._by if name.endswith("norm.weight") else weight


def as_computed(config: ModelConfig, weights: Weights[MatrixT]) -> Weights[MatrixT]:
    """Published weights as layers multiply by them: of some families' norms what is beyond 1 is
    published."""
    return ShiftedNorms(weights, 1.0) if config.shifted_norms else weights


def as_published(config: ModelConfig, weights: Weights[MatrixT]) -> Weights[MatrixT]:
    """Return norms shifted the other way round: a GGUF file has them as they are computed with."""
    return ShiftedNorms(weights, -1.0) if config.shifted_norms else weights


def unpickle(path: Path) -> dict[str, Tensor]:
    """Return tensors of a pickle, mapped from disk where its format allows; it may hold nothing
    else, and no code is run. Raises ModelError."""
    with reading(path):
        # files older than torch 1.6 are no archives, and are read at once
        mmap = zipfile.is_zipfile(path)
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:
            raise ModelError(
                f"{path} holds more than tensors, or is corrupt: take safetensors of the model, or "
                "convert it where it comes from"
            ) from error
    if not isinstance(content, dict) or not all(
        isinstance(tensor, Tensor) for tensor in content.values()
    ):
        raise ModelError(f"{path} is no table of tensors")
    return content


def _names(path: Path, found: set[str], listed: list[str] | None) -> list[str]:
    for name in listed or ():
        if name not in found:
            raise ModelError(
                f"{path.name} lacks the tensor {name} that the index lists; fetch it again"
            )
    return sorted(found) if listed is None else listed


def _checked_dtype(name: str, dtype: str) -> str:
    if name.endswith(_OF_QUANTS):
        raise quantised(f"it holds the tensor {name}")
    if dtype not in _FLOATS and not name.endswith(_IGNORED):
        raise ModelError(f"the tensor {name} is {dtype}; supported: {', '.join(_FLOATS)}")
    return dtype


def _weight_files(folder: Path, stem: str, end: str) -> Mapping[Path, list[str] | None]:
    """Return the files to open, with the tensors the index lists in each (None: whatever is in it);
    none if there are none.

    One file comes before an index, as in transformers, which leaves an older index behind when it
    saves anew."""
    single = folder / f"{stem}.{end}"
    if single.is_file():
        return {single: None}
    index = folder / f"{stem}.{end}.index.json"
    if not index.is_file():
        return dict.fromkeys(sorted(folder.glob(f"{stem}-*.{end}")))
    files: dict[Path, list[str]] = defaultdict(list)
    with reading(index):
        for name, shard in read_json(index)["weight_map"].items():
            if Path(shard).name != shard:
                raise ModelError(
                    f"{index.name} in {folder} names {shard}, which is outside the folder"
                )
            files[folder / shard].append(name)
    return dict(files)
