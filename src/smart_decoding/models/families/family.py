"""What a family of models says of itself: its names in files, and what it reads of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smart_decoding.models.families.config import ModelConfig

# llama.cpp's names of a layer's tensors, and Hugging Face's
GGUF_NAMES: Mapping[str, str] = {
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


def _as_read(config: ModelConfig, source: Mapping[str, Any]) -> ModelConfig:
    return config


def _nothing_more(config: ModelConfig) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, slots=True)
class Family:
    """An architecture, as its files name it and as its layers compute. reading.py reads what all
    families have in common.

    name: `ModelConfig.family`. architecture, model_type: its names in config.json. gguf: its name
    in GGUF metadata; None: no such file is read. activations: its `hidden_act`, the first one where
    it is written. options, gguf_options: options that reading.py refuses of other families.
    from_hf: completes the common configuration by the contents of config.json. from_gguf: the same
    by the metadata. to_hf: entries of config.json in addition to the common ones, or in their
    place. gguf_names: names of a layer's tensors in GGUF files, and in safetensors, which have a
    tensor for each expert ({}). gguf_pairs: GGUF files have rows of q and k in llama.cpp's own
    order. gguf_space: SentencePiece puts a blank before a text where a GGUF file does not say
    it."""

    name: str
    architecture: str
    model_type: str
    gguf: str | None = None
    activations: tuple[str, ...] = ("silu", "swish")
    options: frozenset[str] = frozenset()
    gguf_options: frozenset[str] = frozenset()
    from_hf: Callable[[ModelConfig, Mapping[str, Any]], ModelConfig] = _as_read
    from_gguf: Callable[[ModelConfig, Mapping[str, Any]], ModelConfig] = _as_read
    to_hf: Callable[[ModelConfig], dict[str, Any]] = _nothing_more
    gguf_names: Mapping[str, str] = field(default_factory=lambda: GGUF_NAMES)
    gguf_pairs: bool = False
    gguf_space: bool = True
