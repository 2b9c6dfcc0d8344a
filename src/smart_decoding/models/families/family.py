"""What a family of models says of itself: its names in files, and what it reads of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from smart_decoding.models.families.layer import Experts, FeedForward

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
# The same of a mixture's layers.
GGUF_EXPERTS: Mapping[str, str] = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
# The same of the network that all rows of a mixture run.
GGUF_SHARED: Mapping[str, str] = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
# What names of an MTP layer's tensors begin with, and the same of what is no layer's there.
MTP = "mtp."
GGUF_MTP: Mapping[str, str] = {
    "nextn.eh_proj": "fc",
    "nextn.enorm": "pre_fc_norm_embedding",
    "nextn.hnorm": "pre_fc_norm_hidden",
    "nextn.shared_head_norm": "norm",
    "nextn.embed_tokens": "embed_tokens",
    "nextn.shared_head_head": "lm_head",
}


@dataclass(frozen=True, slots=True)
class RowOrder:
    """How rows of a GGUF tensor come into Hugging Face's order: those from `first` on are an array
    of `shape`, of which two `axes` are swapped. of_columns: its columns do so."""

    shape: tuple[int, ...]
    axes: tuple[int, int]
    first: int = 0
    of_columns: bool = False

    def index(self, count: int) -> NDArray[np.int64]:
        """Return which of a tensor's `count` rows come first, second, ..."""
        rows = np.arange(self.first, count).reshape(self.shape).swapaxes(*self.axes)
        return np.concatenate((np.arange(self.first), rows.reshape(-1)))


def _as_read(config: ModelConfig, source: Mapping[str, Any]) -> ModelConfig:
    return config


def _nothing_more(config: ModelConfig) -> dict[str, Any]:
    return {}


def _as_stored(config: ModelConfig, name: str) -> RowOrder | None:
    return None


@dataclass(frozen=True, slots=True)
class Family:
    """An architecture, as its files name it and as its layers compute. reading.py reads what all
    families have in common.

    name: `ModelConfig.family`. architecture, model_type: its names in config.json. whole: the
    architecture of checkpoints that have such a model as their part for text. gguf: its name in
    GGUF metadata; None: no such file is read. gguf_alias: another one, Ollama's. activations: its
    `hidden_act`, the first one where it is written. theta: RoPE's base where a file does not say
    it. options, gguf_options: options that reading.py refuses of other families. quantisations:
    methods of quantised safetensors that are read.
    from_hf: completes the common configuration by the contents of config.json. from_gguf: the same
    by the metadata. to_hf: entries of config.json in addition to the common ones, or in their
    place. gguf_names: names of a layer's tensors in GGUF files, and in safetensors, which have a
    tensor for each expert ({}); whole ones, or without `.weight` and `.bias`. gguf_order: of a
    tensor whose rows llama.cpp has in an order of its own. gguf_space: SentencePiece puts a blank
    before a text where a GGUF file does not say it. gguf_pre: the kind of byte-level BPE where it
    does not say that. mtp: its files may hold a layer for multi-token prediction."""

    name: str
    architecture: str
    model_type: str
    whole: str | None = None
    gguf: str | None = None
    gguf_alias: str | None = None
    activations: tuple[str, ...] = ("silu", "swish")
    theta: float = 10_000.0
    options: frozenset[str] = frozenset()
    gguf_options: frozenset[str] = frozenset()
    quantisations: frozenset[str] = frozenset()
    from_hf: Callable[[ModelConfig, Mapping[str, Any]], ModelConfig] = _as_read
    from_gguf: Callable[[ModelConfig, Mapping[str, Any]], ModelConfig] = _as_read
    to_hf: Callable[[ModelConfig], dict[str, Any]] = _nothing_more
    gguf_names: Mapping[str, str] = field(default_factory=lambda: GGUF_NAMES)
    gguf_order: Callable[[ModelConfig, str], RowOrder | None] = _as_stored
    gguf_space: bool = True
    gguf_pre: str | None = None
    mtp: bool = False


def experts_from_hf(source: Mapping[str, Any]) -> Experts:
    """Return the experts of a Qwen by its config.json."""
    # transformers 5 writes num_local_experts
    count = source["num_experts"] if "num_experts" in source else source["num_local_experts"]
    return Experts(
        count=int(count),
        per_token=int(source["num_experts_per_tok"]),
        normalised=bool(source.get("norm_topk_prob", False)),
        each=FeedForward(int(source["moe_intermediate_size"]), gelu=False),
    )


def experts_from_gguf(metadata: Mapping[str, Any]) -> Experts:
    """Return the experts of a Qwen by its GGUF file."""
    own = f"{metadata['general.architecture']}.expert_"
    return Experts(
        count=int(metadata[own + "count"]),
        per_token=int(metadata[own + "used_count"]),
        normalised=True,  # as llama.cpp runs them
        each=FeedForward(int(metadata[own + "feed_forward_length"]), gelu=False),
    )
