"""GGUF files with random weights of real shapes: to time a model here and in llama.cpp where no
checkpoint is at hand.

    python -m smart_lab random-gguf qwen3-30b-a3b --layers 12 model.gguf

Sizes, names and types of the tensors are those of published files; their contents are noise, so
that answers are nonsense and routers choose experts evenly. The tokenizer has bytes and numbered
tokens.

Needed by LOG.md's timings of mixtures and hybrids.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf.constants import GGML_QUANT_SIZES
from numpy.typing import NDArray
from tqdm import tqdm

from smart_decoding.errors import ConfigError
from smart_decoding.models.families.family import GGUF_MTP, MTP
from smart_decoding.models.families.mtp import LAYER, mtp_shapes
from smart_decoding.models.families.reading import config_from_hf, family_of
from smart_lab.provenance import check_outputs

if TYPE_CHECKING:
    from smart_decoding.models.families.family import Family
    from smart_decoding.models.families.layer import Shapes

NOISE_BYTES = 1 << 22  # of random bytes, which are repeated
SCALE = 0.02  # of the weights, about
QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "vocab_size": 151_936,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": False,
}
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "attention_bias": True,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "vocab_size": 201_088,
    "rope_theta": 150_000.0,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
    },
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131_072,
    "hidden_act": "silu",
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
}


def qwen3_5(hidden: int, layers: int, ffn: int, value_heads: int, heads: int, kv_heads: int) -> Any:
    """Return a config of Qwen3.5, whose embeddings are the output matrix up to 4B."""
    return {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 256,
        "intermediate_size": ffn,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": 4,
        "vocab_size": 248_320,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.25,
        },
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 262_144,
        "tie_word_embeddings": True,
    }


@dataclass(frozen=True, slots=True)
class Published:
    """A published model. config: its config.json; metadata: what its GGUF file says beside sizes
    that all have; usual: its matrices' type; better: that of some layers' values and last matrices,
    and of the output."""

    config: Mapping[str, Any]
    pre: str
    usual: Type = Type.Q4_K
    better: Type = Type.Q6_K
    metadata: Mapping[str, Any] = field(default_factory=dict)


LINEAR = {
    "ssm.conv_kernel": 4,
    "ssm.state_size": 128,
    "ssm.group_count": 16,
    "full_attention_interval": 4,
    "rope.dimension_count": 64,
    "rope.dimension_sections": [11, 11, 10, 0],
}
MODELS = {
    "qwen3-30b-a3b": Published(
        QWEN3_MOE,
        "qwen2",
        metadata={"expert_count": 128, "expert_used_count": 8, "expert_feed_forward_length": 768},
    ),
    "gpt-oss-20b": Published(
        GPT_OSS,
        "gpt-4o",
        usual=Type.MXFP4,
        better=Type.Q8_0,
        metadata={
            "expert_count": 32,
            "expert_used_count": 4,
            "expert_feed_forward_length": 2880,
            "attention.sliding_window": 128,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 32.0,
            "rope.scaling.original_context_length": 4096,
        },
    ),
    "qwen3.5-0.8b": Published(
        qwen3_5(1024, 24, 3584, 16, 8, 2),
        "qwen35",
        metadata={**LINEAR, "ssm.time_step_rank": 16, "ssm.inner_size": 2048},
    ),
    "qwen3.5-4b": Published(
        qwen3_5(2560, 32, 9216, 32, 16, 4),
        "qwen35",
        metadata={**LINEAR, "ssm.time_step_rank": 32, "ssm.inner_size": 4096},
    ),
    "qwen3.5-35b-a3b": Published(
        {
            **qwen3_5(2048, 40, 512, 32, 16, 2),
            "architectures": ["Qwen3_5MoeForCausalLM"],
            "model_type": "qwen3_5_moe_text",
            "num_experts": 256,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "tie_word_embeddings": False,
        },
        "qwen35",
        metadata={
            **LINEAR,
            "ssm.time_step_rank": 32,
            "ssm.inner_size": 4096,
            "expert_count": 256,
            "expert_used_count": 8,
            "expert_feed_forward_length": 512,
            "expert_shared_feed_forward_length": 512,
        },
    ),
}
_OLLAMAS = ("attn_out", "attn_sinks")  # names that llama.cpp does not read
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
}
# Where the scale of a block lies in its bytes; the others are numbers, and scales of parts.
_HALVES = {Type.Q4_K: {0: 3e-5, 2: 2.3e-4}, Type.Q6_K: {208: 3e-5}, Type.Q8_0: {0: SCALE / 73}}


def small(model: Published, **changes: int) -> Published:
    """Return a model of the same kind with 512 tokens and small matrices, to compare tokens.
    changes: of its config.json."""
    config = {**model.config, **SMALL, **changes}
    metadata = dict(model.metadata)
    if "num_experts_per_tok" in config:
        count = "num_experts" if "num_experts" in config else "num_local_experts"
        config |= {count: 8, "num_experts_per_tok": 2}
        metadata |= {"expert_count": 8, "expert_used_count": 2}
        widths = ("moe_intermediate_size", "shared_expert_intermediate_size")
        config |= {name: 256 for name in widths if name in config}
        width = config.get("moe_intermediate_size", config["intermediate_size"])
        metadata["expert_feed_forward_length"] = width
        if "expert_shared_feed_forward_length" in metadata:
            metadata["expert_shared_feed_forward_length"] = width
    if "rope.dimension_count" in metadata:
        metadata |= {"rope.dimension_count": 16, "rope.dimension_sections": [3, 3, 2, 0]}
    return replace(model, config=config, metadata=metadata)


def write(path: Path, model: Published, layers: int | None = None, mtp: bool = False) -> None:
    """Write a file. layers: fewer than the published ones; mtp: with a layer for multi-token
    prediction. Raises ConfigError for one where the family has none."""
    source = dict(model.config) | ({} if layers is None else {"num_hidden_layers": layers})
    config = config_from_hf(source)
    family = family_of(config)
    assert family.gguf is not None
    if mtp and not family.mtp:
        raise ConfigError(f"no model of {family.gguf} has a layer for multi-token prediction")
    writer = gguf.GGUFWriter(path, family.gguf, use_temp_file=False)
    _add_sizes(writer, family.gguf, source | {"num_hidden_layers": config.layers + mtp})
    if mtp:
        writer.add_uint32(f"{family.gguf}.nextn_predict_layers", 1)
    for key, value in model.metadata.items():
        if isinstance(value, str):
            writer.add_string(f"{family.gguf}.{key}", value)
        elif isinstance(value, list):
            writer.add_array(f"{family.gguf}.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{family.gguf}.{key}", value)
        else:
            writer.add_uint32(f"{family.gguf}.{key}", value)
    _add_tokenizer(writer, model.pre, config.vocab)
    shapes = dict(config.expected_shapes())
    if mtp:
        shapes |= _as_last_block(mtp_shapes(config), config.layers)
    tensors = dict(_stacked(family, shapes))
    kinds = {name: _kind(model, name, shape, config.layers) for name, shape in tensors.items()}
    for name, shape in tensors.items():
        _declare(writer, name, shape, kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    noise = np.random.default_rng(0)
    for name, shape in tqdm(tensors.items(), "writing", leave=False):
        writer.write_tensor_data(_contents(name, shape, kinds[name], noise))
    writer.close()


def _add_sizes(writer: gguf.GGUFWriter, name: str, source: Mapping[str, Any]) -> None:
    for key, entry in {
        "block_count": "num_hidden_layers",
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.key_length": "head_dim",
        "attention.value_length": "head_dim",
    }.items():
        writer.add_uint32(f"{name}.{key}", source[entry])
    theta = source.get("rope_theta") or source["rope_parameters"]["rope_theta"]
    writer.add_float32(f"{name}.rope.freq_base", theta)
    writer.add_float32(f"{name}.attention.layer_norm_rms_epsilon", source["rms_norm_eps"])


def _add_tokenizer(writer: gguf.GGUFWriter, pre: str, vocab: int) -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<|eos|>", *sorted(ByteLevel.alphabet()), "he"]
    numbered = [f"[{i}]" for i in range(vocab - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens + numbered)
    writer.add_token_types([3] + [1] * (vocab - 1))
    writer.add_token_merges(["h e"])
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for each in messages %}{{ each.content }}{% endfor %}")


def _as_last_block(shapes: Shapes, layers: int) -> Shapes:
    """Return the tensors of an MTP layer as those of one more block."""
    own = {published: name for name, published in GGUF_MTP.items()}
    found = {}
    for name, shape in shapes.items():
        if name.startswith(LAYER):
            found[f"model.layers.{layers}.{name.removeprefix(LAYER)}"] = shape
        else:
            stem, _, end = name.removeprefix(MTP).rpartition(".")
            found[f"model.layers.{layers}.{own[stem]}.{end}"] = shape
    return found


def _stacked(
    family: Family, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield GGUF's names and shapes: tensors of all experts in one."""
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    names = {name: what for name, what in family.gguf_names.items() if name not in _OLLAMAS}
    known = {published: name for name, published in names.items()}
    experts = sum(".0.mlp.experts." in name and "gate_proj.weight" in name for name in shapes)
    for name, shape in shapes.items():
        # dimensions of one are left out
        if name.endswith(("conv1d.weight", "shared_expert_gate.weight")):
            shape = tuple(size for size in shape if size != 1)
        stem, _, end = name.rpartition(".")
        if stem in top:
            yield f"{top[stem]}.{end}", shape
            continue
        _, _, layer, part = name.split(".", 3)
        if part.startswith("mlp.experts."):
            _, _, number, rest = part.split(".", 3)
            if number != "0":
                continue
            part, shape = f"mlp.experts.{{}}.{rest}", (experts, *shape)
        stem, _, end = part.rpartition(".")
        own = stem if stem in GGUF_MTP else known.get(stem)
        yield f"blk.{layer}.{known.get(part) or f'{own}.{end}'}", shape


def _kind(model: Published, name: str, shape: tuple[int, ...], layers: int) -> Type:
    """Return a tensor's type, as llama.cpp's Q4_K_M and its file of gpt-oss have them."""
    parts = name.split(".")
    unrounded = parts[-1] == "bias" or parts[-2].startswith(("ffn_gate_inp", "ssm_conv1d"))
    if len(shape) == 1 or unrounded:
        return Type.F32
    if model.usual is Type.MXFP4:
        return Type.MXFP4 if parts[-2].endswith("_exps") and len(shape) == 3 else model.better
    if parts[0] == "output":
        return model.better
    if parts[-2].startswith(("attn_v", "ffn_down")):
        layer = int(parts[1])
        eighth = layers // 8
        more = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
        return model.better if more else model.usual
    return model.usual


def _row_bytes(shape: tuple[int, ...], kind: Type) -> int:
    block, size = GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise ConfigError(f"rows of {shape[-1]} are not whole blocks of {kind.name}")
    return shape[-1] // block * size


def _declare(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], kind: Type) -> None:
    if kind is Type.F32:
        size = 4 * int(np.prod(shape))
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size)
        return
    stored = (*shape[:-1], _row_bytes(shape, kind))
    writer.add_tensor_info(name, stored, np.dtype(np.uint8), int(np.prod(stored)), raw_dtype=kind)


def _contents(
    name: str, shape: tuple[int, ...], kind: Type, noise: np.random.Generator
) -> NDArray[Any]:
    if kind is Type.F32:
        if name.endswith("norm.weight"):
            return np.ones(shape, np.float32)
        if name.endswith(".ssm_a"):
            return -np.exp(noise.uniform(0, 2, shape)).astype(np.float32)
        return (SCALE * noise.standard_normal(shape)).astype(np.float32)
    _, size = GGML_QUANT_SIZES[kind]
    count = min(NOISE_BYTES // size, int(np.prod(shape[:-1])) * _row_bytes(shape, kind) // size)
    blocks = noise.integers(0, 256, (count, size), np.uint8)
    for at, value in _HALVES.get(kind, {}).items():
        blocks[:, at : at + 2] = np.array([value], np.float16).view(np.uint8)
    if kind is Type.MXFP4:
        blocks[:, 0] = 121  # 2 ** -7 and the halves of the table
    return np.resize(blocks.reshape(-1), (*shape[:-1], _row_bytes(shape, kind)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model and the file."""
    add = parser.add_argument
    add("model", choices=list(MODELS))
    add("file", type=Path, metavar="FILE")
    add("--layers", type=int, metavar="N", help="fewer than the published ones")
    add("--mtp", action="store_true", help="with a layer for multi-token prediction")
    add("--small", action="store_true", help="small matrices of floats, to compare tokens")


def main(args: argparse.Namespace) -> int:
    """Write the file. Raises ConfigError for one that cannot be written."""
    check_outputs((args.file,))
    model = MODELS[args.model]
    if args.small:
        model = replace(small(model), usual=Type.F32, better=Type.F32)
    write(args.file, model, args.layers, args.mtp)
    print(f"{args.file}: {args.file.stat().st_size / 1e9:.2f} GB")
    return 0
