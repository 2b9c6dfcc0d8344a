"""GGUF files: read, dequantised and written once as a Hugging Face folder in the cache, which is
then loaded by mmap.

Quantised tensors become bf16; float tensors keep their type. The cached folder (config.json,
safetensors, tokenizer) can be read by transformers too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from smart_decoding.errors import DownloadError, ModelError
from smart_decoding.models.config import ModelConfig
from smart_decoding.models.hub import cache_dir, scratch, sha256_of
from smart_decoding.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from smart_decoding.models.registry import Source

_VERSION = 1  # of the conversion: cached folders of another version are not used
_SHARD = 1 << 30  # bytes of weights held in memory before they are written
_RECORD = "converted.json"
_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def converted_folder(source: Source, check: Callable[[ModelConfig], None]) -> Path:
    """The cached folder with the weights of a GGUF file, written first if it is not there or
    damaged.

    check: raises for a configuration that cannot be used here, before anything is written.
    Raises ModelError for a file that is corrupt or not supported, DownloadError if the cache has no
    room."""
    target = cache_dir() / "converted" / _key(source)
    if not is_whole(target):
        shutil.rmtree(target, ignore_errors=True)
        _convert(source, target, check)
    return target


def _key(source: Source) -> str:
    """A pinned file is known by its checksum; a user's file by place, size and time, since hashing
    it takes long."""
    if source.sha256:
        return f"v{_VERSION}-{source.sha256[:16]}"
    stat = source.path.stat()
    identity = f"{source.path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    return f"v{_VERSION}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"


def is_whole(folder: Path) -> bool:
    """Whether a converted folder has all its files, each with all its bytes."""
    try:
        sizes = json.loads((folder / _RECORD).read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _convert(source: Source, target: Path, check: Callable[[ModelConfig], None]) -> None:
    metadata, tensors = read_gguf(source.path)
    rope_factors = tensors.pop("rope_freqs.weight", None)
    factors = None if rope_factors is None else np.asarray(rope_factors.data, np.float32)
    config = ModelConfig.from_gguf(metadata, tensors.keys(), factors)
    check(config)
    shapes = {
        hf_name(name): tuple(int(n) for n in reversed(tensor.shape))
        for name, tensor in tensors.items()
    }
    config.check_tensors(shapes, source.path.name)
    tokenizer = Tokenizer.from_gguf(metadata)
    with scratch(2 * sum(int(tensor.n_elements) for tensor in tensors.values())) as part:
        record = {
            "source": source.path.name,
            "source_sha256": source.sha256 or sha256_of(source.path),
        }
        _write_weights(config, tensors, part, record)
        tokenizer.save(part)
        (part / "config.json").write_text(json.dumps(config.to_hf(), indent=1))
        sizes = {path.name: path.stat().st_size for path in part.iterdir()}
        (part / _RECORD).write_text(json.dumps({**record, "files": sizes}, indent=1))
        move_into_place(part, target)


def move_into_place(part: Path, target: Path) -> None:
    """Renames a finished folder, unless another process was faster. Raises DownloadError."""
    target.parent.mkdir(exist_ok=True)
    part.chmod(0o755)  # a temporary folder is its owner's alone, and a cache may be shared
    try:
        os.rename(part, target)
    except OSError as error:
        if not is_whole(target):
            raise DownloadError(f"cannot write {target}: {error.strerror}") from error


def _write_weights(
    config: ModelConfig, tensors: Mapping[str, Any], folder: Path, record: dict[str, str]
) -> None:
    """Writes numbered shards and their index, so that memory stays bounded however large the model
    is."""
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())):05d}.safetensors"
        try:
            save_file(shard, folder / name, metadata={"format": "pt", **record})
        except SafetensorError as error:  # its way to say that the disk is full
            raise DownloadError(
                f"cannot write the weights to {folder.parent}: {error}; make room there"
            ) from error
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, weight in _dequantised(config, tensors):
        if shard and sum(w.nbytes for w in shard.values()) + weight.nbytes > _SHARD:
            flush()
        shard[name] = weight
    flush()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def _dequantised(
    config: ModelConfig, tensors: Mapping[str, Any]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Hugging Face names and weights in Hugging Face's layout."""
    for name, tensor in tqdm(tensors.items(), desc="dequantising", unit="tensor", disable=None):
        weight = torch.from_numpy(np.array(_floats(tensor)))
        is_quantised = tensor.tensor_type.name not in ("F32", "F16")
        if config.family == "llama" and name.split(".")[2:3] in (["attn_q"], ["attn_k"]):
            weight = half_split(weight, config.heads if ".attn_q." in name else config.kv_heads)
        yield (
            hf_name(name),
            weight.to(torch.bfloat16).contiguous() if is_quantised else weight.contiguous(),
        )


def _floats(tensor: Any) -> NDArray[np.floating[Any]]:
    if tensor.tensor_type.name in ("F32", "F16"):
        return np.asarray(tensor.data)
    try:
        return dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        kind = tensor.tensor_type.name
        raise ModelError(
            f"the tensor {tensor.name} has the type {kind}, which cannot be dequantised"
        ) from error


def half_split(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undoes llama.cpp's row order of q and k ([heads * head_dim, ...]): it pairs RoPE dimensions
    (0, 1), (2, 3), ...; Hugging Face's layout pairs (0, d/2), (1, d/2 + 1), ..."""
    return weight.reshape(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor; ModelError for one that no supported model has."""
    match = _BLOCK.fullmatch(name)
    if match and match[2] in _NAMES:
        return f"model.layers.{match[1]}.{_NAMES[match[2]]}.{match[3]}"
    if name not in _TOP_NAMES:
        raise ModelError(f"the GGUF tensor {name} belongs to no supported architecture")
    return _TOP_NAMES[name]


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata by key and the reader's tensors by name; ModelError if the file is corrupt or
    truncated."""
    try:
        reader = GGUFReader(path)
        metadata = {key: reader_field.contents() for key, reader_field in reader.fields.items()}
        return metadata, {tensor.name: tensor for tensor in reader.tensors}
    except Exception as error:  # the reader parses what it finds: a corrupt file can raise any
        reason = (str(error).splitlines() or [""])[0]
        raise ModelError(
            f"{path.name} is not a readable GGUF file, corrupt or truncated: {reason}"
        ) from error
