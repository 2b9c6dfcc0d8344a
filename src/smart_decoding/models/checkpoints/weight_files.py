"""The weights of a folder: safetensors, or pickles where they are allowed, one file or shards with
their index. Tensors stay on disk (mmap) until they are read by name.

Layers multiply by some of them otherwise than they are published. Norms of some families are what
is beyond 1. Experts may lie in one tensor of all. gpt-oss has [experts, in, out], or MXFP4: blocks
[experts, out, in / 32, 16] of two numbers a byte, and scales [experts, out, in / 32]; gate and up
alternate among the outputs. Qwen3.5 has [experts, out, in], gate before up.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from smart_decoding.errors import ModelError
from smart_decoding.files import read_json, reading
from smart_decoding.kernels.weights import Matrix, QuantizedTensor
from smart_decoding.models.checkpoints.registry import TRUST
from smart_decoding.models.families.config import quantised
from smart_decoding.models.families.layer import GATED_NORM, expert_prefix
from smart_decoding.models.families.mtp import EMBEDDING_NORM, HIDDEN_NORM

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from smart_decoding.models.families.config import ModelConfig

_DTYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.uint8: "U8",
}
_FLOATS = ("BF16", "F16", "F32")
_OF_QUANTS = (".qweight", ".qzeros", ".g_idx")  # ends of names in GPTQ and AWQ checkpoints
_OF_MXFP4 = ("_blocks", "_scales")  # ends of names of bytes that StackedExperts reads
# buffers that old checkpoints hold, whatever their type: they are computed anew
_IGNORED = ("inv_freq", "position_ids")
_NORMS = ("norm.weight", f"{EMBEDDING_NORM}.weight", f"{HIDDEN_NORM}.weight")  # ends of names
_FORMAT = "MXFP4"
_GROUP = 32  # numbers of a block
_BLOCK_BYTES = 17  # its scale, and two numbers a byte
_ROUTER = ".mlp.router."  # what layer.py calls mlp.gate, as other families do
_GATE = ".mlp.gate."
_STACKED = re.compile(
    r"((?:model|mtp)\.layers\.\d+\.)mlp\.experts\.(gate_up|down)_proj(_blocks|_bias)?"
)
_MATRICES = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}


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
    """Other weights, `by` added to each norm but linear attention's own, in float32. An MTP layer
    has norms of other names, too."""

    def __init__(self, weights: Weights[MatrixT], by: float) -> None:
        self._weights: Weights[MatrixT] = weights
        self._by = by
        self.shapes = weights.shapes
        self.dtypes = weights.dtypes

    def __getitem__(self, name: str) -> MatrixT:
        weight = self._weights[name]
        if not isinstance(weight, Tensor) or name.endswith(GATED_NORM):
            return weight
        return weight.float() + self._by if name.endswith(_NORMS) else weight


def as_computed(
    config: ModelConfig, weights: Weights[Tensor], stored: bool = False
) -> Weights[Any]:
    """Return published weights as layers multiply by them. stored: MXFP4 stays what it is."""
    if config.shifted_norms:
        weights = ShiftedNorms(weights, 1.0)
    if config.experts is not None and config.experts.stacked:
        return StackedExperts(weights, config.experts.stacked == "in turn", stored)
    return weights


def as_published(config: ModelConfig, weights: Weights[Matrix]) -> Weights[Matrix]:
    """Return what `as_computed` makes these weights of: a GGUF file has them as they are computed
    with. Experts stay apart, as `StackedExperts` takes them, too."""
    return ShiftedNorms(weights, -1.0) if config.shifted_norms else weights


class _ExpertPart(NamedTuple):
    """One expert's matrix or bias in a tensor of all: some of its outputs."""

    tensor: str
    kind: str  # as in _STACKED
    expert: int
    outputs: slice


class StackedExperts(Weights[Matrix]):
    """A matrix and a bias for each expert, out of tensors of all; experts that have tensors of
    their own are taken as they are.

    in_turn: as in gpt-oss's tensors; else as in Qwen3.5's. stored: MXFP4 stays what it is, else it
    becomes bfloat16. Raises ModelError for a tensor that is no stack."""

    def __init__(self, weights: Weights[Tensor], in_turn: bool, stored: bool) -> None:
        self._weights = weights
        self._in_turn = in_turn
        self._stored = stored
        self._parts: dict[str, _ExpertPart] = {}
        self._names: dict[str, str] = {}  # of what is taken as it is
        self.shapes = {}
        self.dtypes = {}
        for name in weights:
            match = _STACKED.fullmatch(name)
            if match:
                self._add(name, *match.groups(default=""))
            elif not (name.endswith("_scales") and name[:-6] + "blocks" in weights.shapes):
                ours = name.replace(_ROUTER, _GATE)
                self._names[ours] = name
                self.shapes[ours] = weights.shapes[name]
                self.dtypes[ours] = weights.dtypes[name]

    def _add(self, name: str, layer: str, which: str, kind: str) -> None:
        """Describe the parts of one tensor."""
        rows, *columns = self._matrix_shape(name, kind)
        names = _MATRICES[which]
        each = rows // len(names)
        end = "bias" if kind == "_bias" else "weight"
        for expert in range(self._weights.shapes[name][0]):
            for i, matrix in enumerate(names):
                ours = f"{layer}{expert_prefix(expert)}{matrix}.{end}"
                outputs = slice(i * each, (i + 1) * each)
                if self._in_turn:
                    outputs = slice(i, None, len(names))
                self._parts[ours] = _ExpertPart(name, kind, expert, outputs)
                self.shapes[ours] = (len(range(*outputs.indices(rows))), *columns)
                self.dtypes[ours] = _FORMAT if kind == "_blocks" else self._weights.dtypes[name]

    def _matrix_shape(self, name: str, kind: str) -> tuple[int, ...]:
        """Return the shape of an expert's part of a tensor: outputs first, both of gate and up."""
        shape = self._weights.shapes[name]
        if kind == "_bias" and len(shape) == 2:
            return shape[1:]
        if not kind and len(shape) == 3:
            return (shape[2], shape[1]) if self._in_turn else shape[1:]
        if kind == "_blocks" and len(shape) == 4 and shape[3] == _GROUP // 2:
            scales = name.replace("_blocks", "_scales")
            if self._weights.dtypes[name] != "U8" or self._weights.dtypes.get(scales) != "U8":
                raise ModelError(f"the tensor {name} is not of bytes, or has no {scales}")
            if self._weights.shapes[scales] == shape[:3]:
                return shape[1], shape[2] * _GROUP
            shape = self._weights.shapes[name := scales]
        raise ModelError(f"the tensor {name} has shape {shape}, which is none of stacked experts")

    def __getitem__(self, name: str) -> Matrix:
        if name in self._names:
            return self._weights[self._names[name]]
        part = self._parts[name]
        rows = part.outputs
        of_expert = self._weights[part.tensor][part.expert]
        if part.kind != "_blocks":
            by_output = of_expert if part.kind or not self._in_turn else of_expert.t()
            return by_output[rows].contiguous()
        scales = self._weights[part.tensor.replace("_blocks", "_scales")][part.expert]
        quants = _as_in_gguf(of_expert[rows].numpy(), scales[rows].numpy())
        return quants if self._stored else quants.dequantize()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors: quants that stay as they are, others in bfloat16."""
        return sum(
            prod(shape) // _GROUP * _BLOCK_BYTES
            if self._stored and self.dtypes[name] == _FORMAT
            else prod(shape) * torch.bfloat16.itemsize
            for name, shape in self.shapes.items()
        )


def _as_in_gguf(blocks: NDArray[np.uint8], scales: NDArray[np.uint8]) -> QuantizedTensor:
    """Return blocks [n, groups, 16] as GGUF files have them: a scale, then in byte j the numbers j
    and j + 16, where byte j of safetensors has 2 j and 2 j + 1."""
    numbers = np.stack((blocks & 15, blocks >> 4), axis=-1).reshape(*scales.shape, _GROUP)
    low, high = np.split(numbers, 2, axis=-1)
    rows = np.concatenate((scales[..., None], low | high << 4), axis=-1)
    return QuantizedTensor(rows.reshape(len(rows), -1), _FORMAT, scales.shape[1] * _GROUP)


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
    if dtype == "U8" and name.endswith(_OF_MXFP4):
        return dtype
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
