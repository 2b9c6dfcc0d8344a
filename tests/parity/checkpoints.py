"""Tiny random models of every supported shape, and the rows to run them on."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from smart_decoding.core.tree import ROOT, DraftTrees
from smart_decoding.engine.kv import PAGE
from smart_decoding.engine.rows import Rows, Span, build_rows
from smart_decoding.models.families.decoder import Decoder
from smart_decoding.models.families.layer import GATED_NORM
from smart_decoding.models.families.reading import config_from_hf

if TYPE_CHECKING:
    from smart_decoding.models.families.config import ModelConfig

VOCAB = 331
PAGES = 40
STATES = 4
SIZES: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 200,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.5}
Llama = transformers.LlamaConfig
Mistral = transformers.MistralConfig
Qwen2 = transformers.Qwen2Config
Qwen3 = transformers.Qwen3Config
Qwen3Moe = transformers.Qwen3MoeConfig
Qwen3_5 = transformers.Qwen3_5TextConfig
Qwen3_5Moe = transformers.Qwen3_5MoeTextConfig
Gemma3 = transformers.Gemma3TextConfig
GEMMA3 = {
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 20,
    "query_pre_attn_scalar": 24,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    },
}
EXPERTS = {
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 72,
    "norm_topk_prob": True,
}
HYBRID = {
    "initializer_range": 0.08,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
SHARED = {
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 72,
    "shared_expert_intermediate_size": 72,
}
GptOss = transformers.GptOssConfig
GPT_OSS = {
    "initializer_range": 0.1,
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
    "intermediate_size": 72,
    "sliding_window": 20,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "truncate": False,
    },
}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (Llama, {}),
    "llama-tied": (Llama, {"tie_word_embeddings": True}),
    "llama-llama3": (Llama, {"rope_parameters": LLAMA3}),
    "llama-linear": (Llama, {"rope_parameters": LINEAR}),
    "llama-bias": (Llama, {"attention_bias": True}),
    "mistral": (Mistral, {}),
    "mistral, with a window": (Mistral, {"sliding_window": 24}),
    "gemma3": (Gemma3, GEMMA3),
    "gemma3, head_dim 256, tied": (
        Gemma3,
        {
            **GEMMA3,
            "head_dim": 256,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2": (Qwen2, {}),
    "qwen3": (Qwen3, {"head_dim": 32}),
    "qwen3 of experts": (Qwen3Moe, EXPERTS),
    "qwen3 of experts, one layer dense": (
        Qwen3Moe,
        {**EXPERTS, "norm_topk_prob": False, "mlp_only_layers": [1]},
    ),
    "gpt-oss": (GptOss, {**GPT_OSS, "head_dim": 64, "sliding_window": 70}),
    "gpt-oss, each row has all experts": (GptOss, {**GPT_OSS, "num_experts_per_tok": 6}),
    "head_dim 64, one query per key": (
        Llama,
        {"head_dim": 64, "num_attention_heads": 3, "num_key_value_heads": 3},
    ),
    "head_dim 96, five per key": (
        Llama,
        {"head_dim": 96, "hidden_size": 80, "num_attention_heads": 5, "num_key_value_heads": 1},
    ),
    "head_dim 128, tied": (
        Qwen3,
        {"head_dim": 128, "num_attention_heads": 4, "tie_word_embeddings": True},
    ),
}
HYBRIDS = {
    "qwen3.5": (Qwen3_5, HYBRID),
    "qwen3.5, as many key heads, wider values": (
        Qwen3_5,
        {**HYBRID, "linear_num_key_heads": 4, "linear_value_head_dim": 12},
    ),
    "qwen3.5 of experts": (Qwen3_5Moe, {**HYBRID, **SHARED}),
}
OTHERS = {  # shapes without CPU kernels
    "head_dim 24": (Llama, {"head_dim": 24}),
    "odd ffn": (Llama, {"intermediate_size": 131}),
}


@functools.cache
def reference(name: str) -> transformers.PreTrainedModel:
    """transformers' model, fp32; biases and norms are random too."""
    torch.manual_seed(0)
    config_class, extra = (MODELS | HYBRIDS | OTHERS)[name]
    model = (
        transformers.AutoModelForCausalLM.from_config(config_class(**{**SIZES, **extra}))
        .float()
        .eval()
    )
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    return model


def config_of(name: str) -> ModelConfig:
    model = reference(name)
    return config_from_hf({**model.config.to_dict(), "architectures": [type(model).__name__]})


def computed(name: str) -> dict[str, Tensor]:
    """The reference's weights as layers multiply by them: some families' norms lack 1."""
    model = reference(name)
    published = revert_weight_conversion(model, model.state_dict())  # a matrix for each expert
    if any("experts.gate_up_proj" in key for key in published):
        return {our: w for key, weight in published.items() for our, w in _by_expert(key, weight)}
    if not config_of(name).shifted_norms:
        return published
    return {
        key: w + 1 if key.endswith("norm.weight") and not key.endswith(GATED_NORM) else w
        for key, w in published.items()
    }


def _by_expert(name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """gpt-oss's tensors of all experts [experts, in, out], in which gate and up alternate, as a
    matrix and a bias for each; others as they are."""
    stem, experts, which = name.partition("mlp.experts.")
    if not experts:
        yield name.replace("mlp.router.", "mlp.gate."), weight
        return
    parts = ("down_proj",) if which.startswith("down") else ("gate_proj", "up_proj")
    end = "bias" if which.endswith("bias") else "weight"
    for number, each in enumerate(weight):
        for first, part in enumerate(parts):
            outputs = each[..., first :: len(parts)]
            yield f"{stem}{experts}{number}.{part}.{end}", outputs.T if end == "weight" else outputs


def decoder(
    name: str,
    native: bool | None,
    dtype: torch.dtype = torch.float32,
    mrope: tuple[int, ...] = (),
    poison: int | None = None,
) -> Decoder:
    """A fresh decoder, its cache full of rubbish that no row may read. mrope: as in its config;
    poison: a token whose embedding is no number."""
    weights = computed(name)
    if poison is not None:
        embedding = weights["model.embed_tokens.weight"].clone()
        embedding[poison] = torch.nan
        weights = {**weights, "model.embed_tokens.weight": embedding}
    model = Decoder(
        replace(config_of(name), mrope=mrope),
        weights,
        dtype,
        torch.device("cpu"),
        PAGES,
        512,
        native,
    )
    model.hold_states(STATES)
    for cache in (model.kv.keys, model.kv.values):
        cache.fill_(torch.nan) if model.native else cache.uniform_(-1000, 1000)
    if (states := model.kv.states) is not None:
        states.states.fill_(torch.nan)
        states.inputs.fill_(torch.nan)
    if model.model is not None and model.model.states is not None:
        for memory in model.model.states.tensors:
            memory.fill_(torch.nan)
    return model


class Memory:
    """Pages in random order."""

    def __init__(self, seed: int) -> None:
        self._free = np.random.default_rng(seed).permutation(PAGES).astype(np.int32).tolist()

    def pages(self, tokens: int) -> np.ndarray:
        count = -(-tokens // PAGE)
        taken, self._free = self._free[:count], self._free[count:]
        return np.array(taken, np.int32)


def span(
    tokens: Sequence[int], start: int, pages: np.ndarray, nodes: int = 0, state: int = -1
) -> Span:
    position = np.arange(start, start + len(tokens) + nodes)
    slots = (pages[position // PAGE] * PAGE + position % PAGE).astype(np.int32)
    return Span(tokens, start, slots, pages, state=state)


def plain_rows(*spans: Span) -> Rows:
    """Return rows whose logits are all required."""
    rows = build_rows(spans, DraftTrees.empty(len(spans)), [True] * len(spans))[0]
    rows.logit_rows = None
    return rows


def random_trees(seed: int, batch: int, nodes: int) -> DraftTrees:
    rng = np.random.default_rng(seed)
    trees = DraftTrees.empty(batch)
    for _ in range(nodes):
        owner = int(rng.integers(batch))
        parent = int(rng.choice([ROOT, *trees.nodes_of(owner)[-4:]]))
        trees.append([owner], [int(rng.integers(VOCAB))], [parent], [0.5])
    return trees
