"""EAGLE-3 heads in GGUF files, as llama.cpp's converter writes them.

They are brought to the names of published safetensors. `target_layers` are layers whose inputs are
read, `d2t` holds token ids and no offsets, rows of q and k are in llama.cpp's order, and the
vocabulary is the target's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from smart_decoding.errors import ModelError
from smart_decoding.files import reading
from smart_decoding.models.checkpoints.gguf import matrix_of, rope_factors
from smart_decoding.models.checkpoints.gguf_header import HEAD, StoredTensor, read_gguf
from smart_decoding.models.families import rope
from smart_decoding.models.families.family import GGUF_NAMES
from smart_decoding.models.families.llama import row_order

if TYPE_CHECKING:
    from smart_decoding.kernels.weights import Matrix

_OWN = f"{HEAD}."
_TOP_NAMES = {
    "fc.weight": "fc.weight",
    "enc.output_norm.weight": "input_norm.weight",
    "output_norm.weight": "norm.weight",
    "output.weight": "lm_head.weight",
    "token_embd.weight": "embed_tokens.weight",
    "d2t": "draft_ids",
}
_LAYER_NAMES = {**GGUF_NAMES, "attn_norm_2": "hidden_norm"}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


def read_gguf_head(path: Path) -> tuple[dict[str, Any], dict[str, Matrix]]:
    """Return a head's configuration under the names of EAGLE-3's config.json, and its tensors under
    those of its safetensors, `draft_ids` in place of d2t; all but q and k stay in the file until
    they are used.

    Raises ModelError for another file, and one that lacks an entry."""
    with reading(path):
        metadata, tensors = read_gguf(path)
        found = metadata.get("general.architecture")
        if found != HEAD:
            raise ModelError(
                f"{path} is no draft head but a model ({found!r}): the method draft_model drafts "
                "with a smaller one"
            )
        config = _config(path, metadata, rope_factors(path, tensors))
        heads = config["num_attention_heads"], config["num_key_value_heads"]
        weights: dict[str, Matrix] = {}
        for name, tensor in tensors.items():
            matrix = _mapped(path, tensor)
            rows = row_order(*heads, name)
            weights[_published(name)] = matrix if rows is None else matrix[rows.index(len(matrix))]
        return config, weights


def _config(path: Path, metadata: Mapping[str, Any], factors: Any) -> dict[str, Any]:
    def get(key: str, otherwise: Any = None) -> Any:
        value = metadata.get(_OWN + key, otherwise)
        if value is None:
            raise ModelError(
                f"{path.name} lacks {_OWN}{key}: convert the head again with a current llama.cpp"
            )
        return value

    heads, hidden = int(get("attention.head_count")), int(get("embedding_length"))
    positions = int(get("context_length"))
    scaling = rope.scaling_from_gguf(metadata, _OWN, positions, factors)
    head_dim = int(get("attention.key_length", get("rope.dimension_count", hidden // heads)))
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": int(get("attention.head_count_kv", heads)),
        "head_dim": head_dim,
        "intermediate_size": int(get("feed_forward_length")),
        "num_hidden_layers": int(get("block_count")),
        "vocab_size": int(get("vocab_size", len(metadata.get("tokenizer.ggml.tokens", ())))),
        "max_position_embeddings": positions,
        "rms_norm_eps": round(float(get("attention.layer_norm_rms_epsilon")), 12),
        "rope_theta": float(get("rope.freq_base", 10_000.0)),
        "rope_scaling": None if scaling is None else scaling.to_hf(),
        "eagle_aux_hidden_state_layer_ids": [int(layer) for layer in get("target_layers")],
        "target_hidden_size": int(get("target_hidden_size", hidden)),
        "norm_before_residual": bool(get("norm_before_residual", False)),
        "norm_before_fc": bool(get("norm_before_fc", False)),
    }


def _published(name: str) -> str:
    """Return the name in safetensors; one that is not known stays as it is, to be refused."""
    match = _BLOCK.fullmatch(name)
    if match and match[2] in _LAYER_NAMES:
        return f"layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"
    return _TOP_NAMES.get(name, name)


def _mapped(path: Path, tensor: StoredTensor) -> Matrix:
    """Return a tensor whose numbers are read when they are used."""
    name, kind, shape, offset, nbytes = tensor
    # writable, though nobody writes: torch warns of tensors that are not
    content = np.memmap(path, np.uint8, "c", offset, nbytes)
    if kind in _TYPES:
        numbers: Tensor = torch.from_numpy(np.asarray(content)).view(_TYPES[kind])
        return numbers.reshape(shape)
    return matrix_of(name, kind, np.asarray(content), [*shape])
