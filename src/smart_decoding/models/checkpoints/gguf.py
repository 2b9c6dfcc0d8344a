"""GGUF files, in two ways.

Stored: a folder in the cache holds the configuration, the tokenizer and an index of the tensors,
which are read from the file itself, quants and all. Expanded: it holds the weights, too, as
safetensors; quantised tensors become bf16, and float tensors keep their type. Transformers can read
such a folder, but for gpt-oss, whose experts it wants in one tensor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from smart_decoding.errors import ModelError
from smart_decoding.files import reading, sha256_of
from smart_decoding.kernels.weights import FORMATS, Matrix, QuantizedTensor, as_tensor
from smart_decoding.models.checkpoints.gguf_header import Metadata, StoredTensor, read_gguf
from smart_decoding.models.checkpoints.gguf_parts import files_of
from smart_decoding.models.checkpoints.hub import (
    conversion_folder,
    conversion_key,
    is_whole,
    move_into_place,
    remove_unused,
    scratch,
    write_record,
)
from smart_decoding.models.checkpoints.weight_files import Weights, as_published
from smart_decoding.models.families.family import GGUF_MTP, MTP, RowOrder
from smart_decoding.models.families.reading import (
    check_tensors,
    config_from_gguf,
    config_to_hf,
    family_of,
    parted,
)
from smart_decoding.models.text.tokenizer import Tokenizer
from smart_decoding.progress import long_step

if TYPE_CHECKING:
    from smart_decoding.models.checkpoints.registry import Source
    from smart_decoding.models.families.config import ModelConfig
    from smart_decoding.models.families.family import Family

_SHARD = 1 << 30  # bytes of weights held in memory before they are written
TENSORS = "tensors.json"
ROPE_FACTORS = "rope_freqs.weight"
FILE_TYPE = "file_type"  # in the record of a stored folder, which older ones lack
_FLOATS = {"F32": np.float32, "F16": np.float16}
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = re.compile(r"blk\.(\d+)\.((?:nextn\.)?\w+)(\.weight|\.bias|)")
_DECAY = ".ssm_a"  # holds the negative of what is published as a logarithm
_CONVOLUTION = ".ssm_conv1d.weight"  # lacks a dimension of one
_SHARED_GATE = ".ffn_gate_inp_shexp.weight"  # likewise


def converted_folder(
    source: Source, check: Callable[[ModelConfig], None], stored: bool = False
) -> Path:
    """Return the cached folder of a GGUF file, written first if it is not there or damaged.

    check: raises for a configuration that cannot be used here, before anything is written. stored:
    without the weights, for StoredWeights.
    Raises ModelError for a file that is corrupt or not supported, DownloadError if the cache has no
    room."""
    files = files_of(source.path)
    for file in files:
        if not file.is_file():
            raise ModelError(f"{file.name} is missing: the model is split into {len(files)} files")
    target = conversion_folder(source.path, source.sha256, stored)
    if not is_whole(target):
        step = long_step(f"converting {source.path.name}, once", 1.0)
        with reading(source.path), step as progress:
            _convert(source, target, check, stored, progress)
        version, _, key = conversion_key(source.path, source.sha256).partition("-")
        made = target.parent.glob(f"v*-{key}*")
        remove_unused(each for each in made if not each.name.startswith(f"{version}-"))
    return target


class StoredWeights(Weights[Matrix]):
    """The tensors of a GGUF file, or of all that it is split into, under Hugging Face's names, each
    read on access: quants that the kernels know as they are, others as bfloat16, floats in
    their own type.

    index, folder: of `converted_folder`. Raises ModelError for a file that is shorter than it
    was."""

    def __init__(self, path: Path, index: Mapping[str, Any], folder: Path | None = None) -> None:
        self._files = files_of(path)
        self.folder = folder
        self._index = index
        self.shapes = {name: tuple(entry["shape"]) for name, entry in self._index.items()}
        self.dtypes = {name: entry["type"] for name, entry in index.items()}

    def __getitem__(self, name: str) -> Matrix:
        entry = self._index[name]
        size, kind, shape = entry["bytes"], entry["type"], entry["shape"]
        path = self._files[entry["part"]]
        try:  # mapped: reading into new memory takes ten times as long as the pages themselves
            content = np.memmap(path, np.uint8, "r", entry["offset"], size)
        except ValueError as error:
            reason = f"{path.name} ends within the tensor {entry['tensor']}"
            raise ModelError(reason) from error
        matrix = matrix_of(entry["tensor"], kind, np.asarray(content), shape)
        if entry["tensor"].endswith(_DECAY):
            matrix = as_tensor(matrix).neg().log()
        return matrix if entry["order"] is None else _ordered(matrix, RowOrder(**entry["order"]))

    @property
    def expanded(self) -> list[str]:
        """Types of quants that the kernels do not multiply: those tensors become bfloat16."""
        kinds = {entry["type"] for entry in self._index.values() if len(entry["shape"]) == 2}
        return sorted(kinds.difference(FORMATS, _FLOATS, ["BF16"]))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors: quants that stay as they are, others in bfloat16."""
        return sum(
            entry["bytes"]
            if _stays(entry["type"], entry["shape"])
            else prod(entry["shape"]) * torch.bfloat16.itemsize
            for entry in self._index.values()
        )


def _ordered(matrix: Matrix, order: RowOrder) -> Matrix:
    if order.of_columns:
        return as_tensor(matrix)[:, order.index(matrix.shape[1])]
    return matrix[order.index(len(matrix))]


def _stays(kind: str, shape: list[int]) -> bool:
    """Return whether a tensor stays quants; others are widened to bfloat16, or are floats."""
    return kind in FORMATS[1:] and len(shape) == 2


def rope_factors(path: Path, tensors: dict[str, StoredTensor]) -> NDArray[np.float32] | None:
    """Take the tensor of a rotary embedding's factors out of `tensors`; return its numbers."""
    tensor = tensors.pop(ROPE_FACTORS, None)
    if tensor is None:
        return None
    content = np.asarray(np.memmap(path, np.uint8, "r", tensor.offset, tensor.nbytes))
    return as_tensor(matrix_of(*tensor[:2], content, [*tensor.shape])).float().numpy()


def matrix_of(name: str, kind: str, content: NDArray[np.uint8], shape: list[int]) -> Matrix:
    """Return a tensor of a file out of its bytes: quants that the kernels know as they are, others
    as bfloat16, floats in their own type. Raises ModelError for a type that nobody reads."""
    if kind in _FLOATS:
        return torch.tensor(content.view(_FLOATS[kind])).reshape(shape)
    quants = QuantizedTensor(content.reshape(*shape[:-1], -1), kind, shape[-1])
    if _stays(kind, shape):
        return quants
    try:
        return quants.dequantize()
    except NotImplementedError as error:
        raise ModelError(
            f"the tensor {name} has the type {kind}, which cannot be dequantised"
        ) from error


def _convert(
    source: Source,
    target: Path,
    check: Callable[[ModelConfig], None],
    stored: bool,
    progress: Callable[[float], object],
) -> None:
    metadata, tensors, parts = _read_parts(source.path)
    factors = rope_factors(files_of(source.path)[parts.get(ROPE_FACTORS, 0)], tensors)
    config = config_from_gguf(metadata, tensors.keys(), factors)
    check(config)
    if stored and config.linear is not None:  # columns of quants cannot be brought into an order
        config = replace(config, linear=replace(config.linear, tiled=True))
    index = _index(config, tensors, parts)
    shapes = {name: tuple(entry["shape"]) for name, entry in index.items()}
    own, _ = parted(config, shapes)
    check_tensors(config, own, source.path.name)
    family = family_of(config)
    tokenizer = Tokenizer.from_gguf(metadata, family.gguf_space, family.gguf_pre)
    need = 0 if stored else 2 * sum(prod(tensor.shape) for tensor in tensors.values())
    with scratch(need) as part:
        record = {"source": source.path.name}
        if stored:
            record[FILE_TYPE] = _file_type(metadata)
            (part / TENSORS).write_text(json.dumps(index))
            progress(1.0)
        else:
            record["source_sha256"] = source.sha256 or sha256_of(source.path)
            weights = as_published(config, StoredWeights(source.path, index))
            _write_weights(weights, part, record, progress)
        tokenizer.save(part)
        (part / "config.json").write_text(json.dumps(config_to_hf(config), indent=1))
        write_record(part, record)
        move_into_place(part, target)


def _file_type(metadata: Mapping[str, Any]) -> str:
    """Return the name of a file's mixture of types, such as Q4_K_M; nothing for an unknown one."""
    from gguf import LlamaFileType  # imported late: it is slow

    try:
        name = LlamaFileType(metadata["general.file_type"]).name
    except (KeyError, ValueError):
        return ""
    return name.partition("_")[2] if name.startswith(("ALL_", "MOSTLY_")) else ""


def _read_parts(path: Path) -> tuple[Metadata, dict[str, StoredTensor], dict[str, int]]:
    """Return metadata and tensors as by `read_gguf`, of all files of a split model, and the number
    of the file of each tensor."""
    files = files_of(path)
    metadata, tensors = read_gguf(path)
    count = int(metadata.get("split.count", 1))
    if count > 1 and count != len(files):
        raise ModelError(
            f"{path.name} is one of {count} files that a model is split into; they must keep the "
            f"names of the kind NAME-00001-of-{count:05d}.gguf"
        )
    parts = dict.fromkeys(tensors, 0)
    for number, file in enumerate(files[1:], 1):
        _, further = read_gguf(file)
        tensors |= further
        parts |= dict.fromkeys(further, number)
    return metadata, tensors, parts


def _index(
    config: ModelConfig, tensors: Mapping[str, StoredTensor], parts: Mapping[str, int]
) -> dict[str, dict[str, Any]]:
    """Return what StoredWeights must know of each tensor, and of each expert's part of one. part:
    the number of its file; order: a RowOrder, or None."""
    family = family_of(config)
    index: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        shape = [*tensor.shape]
        if name.endswith(_CONVOLUTION):
            shape.insert(1, 1)
        if name.endswith(_SHARED_GATE):
            shape.insert(0, 1)
        theirs = hf_name(name, family, config.layers)
        order = family.gguf_order(config, name)
        entry = {
            "tensor": name,
            "part": parts[name],
            "type": tensor.kind,
            "shape": shape,
            "offset": tensor.offset,
            "bytes": tensor.nbytes,
            "order": None if order is None else asdict(order),
        }
        index |= _by_expert(theirs, entry) if "{}" in theirs else {theirs: entry}
    final_norm = index.get("model.norm.weight")
    if final_norm is not None and any(name.startswith(MTP) for name in index):
        index.setdefault(f"{MTP}norm.weight", final_norm)  # as llama.cpp takes it
    return index


def _by_expert(name: str, entry: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the entries of a tensor [experts, rows, columns]: a matrix for each expert."""
    count, *shape = entry["shape"]
    size = entry["bytes"] // max(count, 1)
    return {
        name.format(number): {
            **entry,
            "shape": shape,
            "offset": entry["offset"] + number * size,
            "bytes": size,
        }
        for number in range(count)
    }


def _write_weights(
    weights: Mapping[str, Matrix],
    folder: Path,
    record: dict[str, str],
    progress: Callable[[float], object],
) -> None:
    """Write numbered shards and their index, so that memory stays bounded however large the model
    is."""
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())):05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt", **record})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for name in weights:
        weight = as_tensor(weights[name]).contiguous()
        if shard and sum(w.nbytes for w in shard.values()) + weight.nbytes > _SHARD:
            flush()
        shard[name] = weight
        progress(1 / len(weights))
    flush()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def hf_name(name: str, family: Family, layers: int) -> str:
    """Return the Hugging Face name of a GGUF tensor of a model of so many layers, {} for an
    expert's number; ModelError for one that no supported model has."""
    match = _BLOCK.fullmatch(name)
    if match:
        names = family.gguf_names
        prefix = _prefix(int(match[1]), match[2], layers if family.mtp else None)
        if (whole := match[2] + match[3]) in names:  # but for its number
            return prefix + names[whole]
        if match[2] in names and match[3]:
            return f"{prefix}{names[match[2]]}{match[3]}"
    if name not in _TOP_NAMES:
        raise ModelError(f"the GGUF tensor {name} belongs to no supported architecture")
    return _TOP_NAMES[name]


def _prefix(block: int, part: str, layers: int | None) -> str:
    """Return what a tensor's name begins with. layers: blocks behind so many are of MTP."""
    if layers is None or block < layers:
        return f"model.layers.{block}."
    return MTP if part in GGUF_MTP else f"{MTP}layers.{block - layers}."
