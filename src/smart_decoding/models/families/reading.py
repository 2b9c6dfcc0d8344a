"""The families of models that are supported, and how their configurations are read and written.

Whatever this project does not compute (other architectures, quantised weights,
other kinds of RoPE, ...) is refused here by name, before any weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from smart_decoding.errors import ModelError
from smart_decoding.models.checkpoints.gguf_header import HEAD
from smart_decoding.models.families import rope
from smart_decoding.models.families.config import (
    ModelConfig,
    check_shapes,
    refuse_quantised,
    token_ids,
)
from smart_decoding.models.families.family import MTP
from smart_decoding.models.families.gemma3 import GEMMA3
from smart_decoding.models.families.gpt_oss import GPT_OSS
from smart_decoding.models.families.llama import LLAMA
from smart_decoding.models.families.mistral import MISTRAL
from smart_decoding.models.families.qwen import QWEN2, QWEN3
from smart_decoding.models.families.qwen3_5 import QWEN3_5
from smart_decoding.models.families.qwen3_5_moe import QWEN3_5_MOE
from smart_decoding.models.families.qwen_moe import QWEN3_MOE

if TYPE_CHECKING:
    from smart_decoding.models.families.family import Family

T = TypeVar("T")

FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3, QWEN3_MOE, QWEN3_5, QWEN3_5_MOE, GEMMA3, GPT_OSS)
_BY_NAME = {family.name: family for family in FAMILIES}
_BY_ARCHITECTURE = {family.architecture: family for family in FAMILIES}
_BY_WHOLE = {family.whole: family for family in FAMILIES if family.whole}
_BY_GGUF = {
    name: family for family in FAMILIES for name in (family.gguf, family.gguf_alias) if name
}
# Tokens that end an answer wherever a vocabulary has them, those of llama.cpp that our families
# have: a GGUF file names one or two, where generation_config.json has all.
_ENDS = frozenset(
    (
        *("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>"),
        *("<\uff5cend\u2581of\u2581sentence\uff5c>", "<EOT>", "_<EOT>"),
        *("<eos>", "<end_of_turn>"),  # not "</s>", which is HTML to Gemma
        *("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),  # of Qwen2.5-Coder
    )
)
_SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")
_EXPERTS = (
    *("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size"),
    "shared_expert_intermediate_size",
)
_EXPLAINED = {
    "expert_count": ": mixtures of experts are",
    "rope.dimension_count": ": partial rotary embeddings are",
}


def family_of(config: ModelConfig) -> Family:
    """Return the description of a model's family."""
    return _BY_NAME[config.family]


def gguf_family(name: object) -> Family:
    """Return the family of a GGUF file by its architecture; ModelError for one that is not
    supported."""
    if name == HEAD:
        raise ModelError(
            "a GGUF file of a draft head is no model: name its model, and the head by --draft "
            "(model in speculative_config)"
        )
    if name not in _BY_GGUF:
        known = ", ".join(_BY_GGUF)
        raise ModelError(f"GGUF architecture {name!r} is not supported; supported: {known}")
    return _BY_GGUF[str(name)]


def config_from_hf(
    config: Mapping[str, Any], generation: Mapping[str, Any] | None = None
) -> ModelConfig:
    """Read the contents of config.json and, for further end tokens, generation_config.json.

    Raises ModelError, naming what is not supported, and any error where an entry is missing or
    malformed (`files.reading` names the file)."""
    whole, config = config, _text_config(config)
    family = _hf_family(config)
    for part in (whole, config):
        refuse_quantised(part, family.quantisations)
    _refuse_options(config, family)
    return family.from_hf(_common_from_hf(family, config, generation or {}), config)


def config_from_gguf(
    metadata: Mapping[str, Any],
    tensor_names: Collection[str],
    rope_factors: NDArray[np.float32] | None = None,
) -> ModelConfig:
    """Read a GGUF file's metadata, the names of its tensors, and its `rope_freqs.weight` if there
    is one.

    Raises as `config_from_hf` does."""
    family = gguf_family(metadata.get("general.architecture"))
    common = _common_from_gguf(family, metadata, tensor_names, rope_factors)
    return family.from_gguf(common, metadata)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json that `config_from_hf` (and transformers, but for `factors` scaling)
    reads back."""
    family = family_of(config)
    kinds = ("full_attention", "sliding_attention")
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "num_hidden_layers": config.layers,
        "hidden_size": config.hidden,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn,
        "vocab_size": config.vocab,
        "hidden_act": family.activations[0],
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling.to_hf() if config.rope_scaling else None,
        "rms_norm_eps": config.rms_eps,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.o_bias,
        "sliding_window": max(config.windows, default=None),
        "use_sliding_window": bool(config.windows),
        "layer_types": [kinds[w > 0] for w in config.windows] or None,
        **family.to_hf(config),
        "eos_token_id": list(config.eos_token_ids) or None,
        "bos_token_id": config.bos_token_id,
        "torch_dtype": "bfloat16",
    }


def check_tensors(config: ModelConfig, found: Mapping[str, Collection[int]], where: str) -> None:
    """Raise ModelError, naming the tensor, if one is missing, misshapen, or would be ignored.

    found: shape by Hugging Face name; where: the file or folder for the message."""
    ignored = [name for name in found if name.endswith("inv_freq")]
    ignored += ["lm_head.weight"] if config.tie_embeddings else []
    check_shapes(where, found, config.expected_shapes(), ignored, family_of(config).architecture)


def parted(config: ModelConfig, found: Mapping[str, T]) -> tuple[dict[str, T], dict[str, T]]:
    """Return a checkpoint's tensors in two, by name: the model's, and those of its layers for
    multi-token prediction, where its family has them."""
    of_mtp = {name for name in found if family_of(config).mtp and name.startswith(MTP)}
    own = {name: each for name, each in found.items() if name not in of_mtp}
    return own, {name: each for name, each in found.items() if name in of_mtp}


def is_whole(config: Mapping[str, Any]) -> bool:
    """Return whether the contents of config.json are those of a model that reads images, too, and
    of which the part for text is computed here."""
    names = config.get("architectures") or [""]
    return names[0] in _BY_WHOLE


def text_names(found: Collection[str]) -> dict[str, str]:
    """Return the names of such a model's tensors for text: ours -> theirs. Those of its vision
    part are left out."""
    return {
        re.sub(r"^model\.language_model\.", "model.", name): name
        for name in found
        if not name.startswith("model.visual.")
    }


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a whole model's configuration that is of its text."""
    if not is_whole(config):
        return config
    text = config["text_config"]
    given = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    family = _BY_WHOLE[config["architectures"][0]]
    return {**text, "architectures": [family.architecture], "tie_word_embeddings": given}


def _hf_family(config: Mapping[str, Any]) -> Family:
    names = config.get("architectures") or []
    name = names[0] if names else f"model_type {config.get('model_type')!r}"
    if name not in _BY_ARCHITECTURE:
        known = ", ".join([*_BY_ARCHITECTURE, *_BY_WHOLE])
        raise ModelError(f"architecture {name} is not supported; supported: {known}")
    return _BY_ARCHITECTURE[name]


def _refuse_options(config: Mapping[str, Any], family: Family) -> None:
    options = {**rope.options_of(config), **config}
    activations = (None, *family.activations)
    refused = {
        "mlp_bias": bool(config.get("mlp_bias")),
        "rope_interleaved": bool(config.get("rope_interleaved")),
        "partial_rotary_factor": options.get("partial_rotary_factor", 1.0) not in (None, 1.0),
        "hidden_act": config.get("hidden_act") not in activations,
        "hidden_activation": config.get("hidden_activation") not in activations,
        "attention_bias": bool(config.get("attention_bias")),
        **{name: config.get(name) is not None for name in _SOFTCAPS},
        "use_bidirectional_attention": bool(config.get("use_bidirectional_attention")),
        **{name: bool(config.get(name)) for name in _EXPERTS},
    }
    for name, is_refused in refused.items():
        if is_refused and name not in family.options:
            raise ModelError(
                f"the config option {name} = {options[name]!r} is not supported for "
                f"{family.architecture}"
            )


def _common_from_hf(
    family: Family, config: Mapping[str, Any], generation: Mapping[str, Any]
) -> ModelConfig:
    heads = int(config["num_attention_heads"])
    hidden = int(config["hidden_size"])
    options = rope.options_of(config)
    positions = int(config["max_position_embeddings"])
    scaling = rope.scaling_from_hf(options, positions)
    has_bias = bool(config.get("attention_bias", False))
    return ModelConfig(
        family=family.name,
        layers=int(config["num_hidden_layers"]),
        hidden=hidden,
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        # a mixture may have none beside its experts
        ffn=int(config.get("intermediate_size") or config["moe_intermediate_size"]),
        vocab=int(config["vocab_size"]),
        rope_theta=float(options.get("rope_theta", family.theta)),
        rms_eps=float(config["rms_norm_eps"]),
        max_positions=rope.stretched_positions(scaling, positions),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=has_bias,
        o_bias=has_bias,
        rope_scaling=scaling,
        mrope=_mrope_of(options, config),
        eos_token_ids=token_ids(config.get("eos_token_id"), generation.get("eos_token_id")),
        bos_token_id=next(iter(token_ids(config.get("bos_token_id"))), None),
    )


def _mrope_of(options: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[int, ...]:
    if options.get("mrope_interleaved"):  # all sections follow the position where text is alone
        return ()
    sections = tuple(int(n) for n in options.get("mrope_section") or ())
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    half = int(head_dim) // 2
    if sections and (len(sections) != 3 or sum(sections) != half):
        raise ValueError(f"mrope_section {sections} does not fill the {half} rotary frequencies")
    return sections


def _common_from_gguf(
    family: Family,
    metadata: Mapping[str, Any],
    tensor_names: Collection[str],
    rope_factors: NDArray[np.float32] | None,
) -> ModelConfig:
    own = f"{metadata['general.architecture']}."
    heads = int(metadata[own + "attention.head_count"])
    hidden = int(metadata[own + "embedding_length"])
    head_dim = int(metadata.get(own + "attention.key_length", hidden // heads))
    _refuse_in_gguf(metadata, family, head_dim, tensor_names)
    epsilon = float(metadata[own + "attention.layer_norm_rms_epsilon"])
    trained = int(metadata[own + "context_length"])
    scaling = rope.scaling_from_gguf(metadata, own, trained, rope_factors)
    tokens = metadata["tokenizer.ggml.tokens"]
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    ends += [id_ for id_, token in enumerate(tokens) if token in _ENDS]
    return ModelConfig(
        family=family.name,
        layers=int(metadata[own + "block_count"]),
        hidden=hidden,
        heads=heads,
        kv_heads=int(metadata.get(own + "attention.head_count_kv", heads)),
        head_dim=head_dim,
        ffn=int(
            metadata.get(own + "feed_forward_length")
            or metadata[own + "expert_feed_forward_length"]
        ),
        vocab=len(tokens),
        rope_theta=float(metadata.get(own + "rope.freq_base", family.theta)),
        rms_eps=round(epsilon, 12),  # stored as float32
        max_positions=rope.stretched_positions(scaling, trained),
        tie_embeddings="output.weight" not in tensor_names,
        qkv_bias="blk.0.attn_q.bias" in tensor_names,
        o_bias="blk.0.attn_output.bias" in tensor_names,
        qk_norm="blk.0.attn_q_norm.weight" in tensor_names,
        rope_scaling=scaling,
        eos_token_ids=token_ids(*ends),
        bos_token_id=next(iter(token_ids(metadata.get("tokenizer.ggml.bos_token_id"))), None),
    )


def _refuse_in_gguf(
    metadata: Mapping[str, Any], family: Family, head_dim: int, tensor_names: Collection[str]
) -> None:
    own = f"{metadata['general.architecture']}."
    if own + "vision.block_count" in metadata or any(n.startswith("v.") for n in tensor_names):
        raise ModelError(
            "a GGUF file that holds a vision part, as Ollama's of Gemma 3 do, is not supported: "
            "take one of the text alone, such as those of llama.cpp's converter"
        )
    dimensions = int(metadata.get(own + "rope.dimension_count", head_dim))
    refused = {
        "final_logit_softcapping": bool(metadata.get(own + "final_logit_softcapping")),
        "expert_count": bool(metadata.get(own + "expert_count")),
        "rope.dimension_count": dimensions != head_dim,
    }
    for name, is_refused in refused.items():
        if is_refused and name not in family.gguf_options:
            raise ModelError(f"GGUF option {name}{_EXPLAINED.get(name, ' is')} not supported")
