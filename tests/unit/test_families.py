"""A family is described as data: what computes reads the description, and asks for no name."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import smart_decoding
from smart_decoding.models.checkpoints.memory import (
    EngineLimits,
    kv_bytes,
    state_bytes,
    work_bytes,
)
from smart_decoding.models.families.layer import (
    PRE_NORMS,
    Attention,
    FeedForward,
    LinearAttention,
)
from smart_decoding.models.families.reading import (
    FAMILIES,
    config_from_hf,
    family_of,
    gguf_family,
)

if TYPE_CHECKING:
    from smart_decoding.models.families.config import ModelConfig

OF_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
HYBRID = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
    "linear_conv_kernel_dim": 4,
}
MODELS = Path(smart_decoding.__file__).parent / "models"
SIZES: dict[str, Any] = {
    "num_hidden_layers": 6,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "vocab_size": 300,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 16,
    "sliding_window": 16,
}


def test_only_the_reader_of_configurations_asks_for_a_family() -> None:
    asking = {
        str(path.relative_to(MODELS))
        for path in MODELS.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "family"
    }
    assert asking == {"families/reading.py"}


@pytest.mark.parametrize("family", FAMILIES, ids=[family.name for family in FAMILIES])
def test_a_family_is_found_by_each_of_its_names(family: Any) -> None:
    more = dict(OF_EXPERTS) if "num_experts" in family.options else {}
    more |= HYBRID if family.whole else {}
    if family.name == "qwen3_5_moe":
        more["shared_expert_intermediate_size"] = more["moe_intermediate_size"]
    if family.name == "gpt_oss":
        more = {"num_local_experts": 4, "num_experts_per_tok": 2}
    config = config_from_hf({**SIZES, **more, "architectures": [family.architecture]})
    assert family_of(config) is family
    for name in (family.gguf, family.gguf_alias):
        assert name is None or gguf_family(name) is family
    for names in ({f.name for f in FAMILIES}, {f.architecture for f in FAMILIES}):
        assert len(names) == len(FAMILIES)


def test_each_layer_is_described_by_itself() -> None:
    config = config_from_hf({**SIZES, "architectures": ["Gemma3ForCausalLM"]})
    layers = [config.layer(number) for number in range(config.layers)]
    assert [layer.attention.window for layer in layers] == [16] * 5 + [0]
    assert [layer.attention.local_rope for layer in layers] == [True] * 5 + [False]
    assert all(layer.ffn.gelu and layer.shifted_norms for layer in layers)
    head = config.of_head().layer(0)
    assert (head.norms, head.attention.window, head.ffn.gelu) == (PRE_NORMS, 0, False)
    assert not head.attention.local_rope


def mixture(**changes: Any) -> ModelConfig:
    architecture = {"architectures": ["Qwen3MoeForCausalLM"]}
    return config_from_hf({**SIZES, **OF_EXPERTS, **architecture, **changes})


def test_layers_are_of_experts_but_those_that_are_listed() -> None:
    def dense(config: ModelConfig) -> list[int]:
        layers = map(config.layer, range(config.layers))
        return [n for n, layer in enumerate(layers) if isinstance(layer.ffn, FeedForward)]

    assert dense(mixture()) == []
    assert dense(mixture(mlp_only_layers=[1, 4])) == [1, 4]
    assert dense(mixture(decoder_sparse_step=2)) == [0, 2, 4]
    assert mixture(num_local_experts=4) == mixture(), "as transformers 5 writes it"
    assert mixture(use_sliding_window=True).windows == (16,) * 6


def test_a_head_of_a_mixture_has_one_network() -> None:
    assert mixture().of_head().layer(0).ffn == FeedForward(64, gelu=False)


def hybrid(**changes: Any) -> ModelConfig:
    architecture = {"architectures": ["Qwen3_5ForCausalLM"]}
    return config_from_hf({**SIZES, **HYBRID, **architecture, **changes})


def test_one_layer_in_four_has_attention() -> None:
    config = hybrid()
    kinds = [type(config.layer(n).attention) for n in range(config.layers)]
    assert kinds == [LinearAttention] * 3 + [Attention] + [LinearAttention] * 2
    assert (config.kv_layers, config.linear_layers) == (1, 5)
    assert hybrid(full_attention_interval=2).attention_layers == (1, 3, 5)
    assert config.rotary_dim == 2
    head = config.of_head()
    assert isinstance(head.layer(0).attention, Attention)
    assert not head.layer(0).attention.gated
    assert np.count_nonzero(head.inverse_frequencies()[0]) == 4


def test_memory_of_a_hybrid_is_that_of_its_states() -> None:
    """Keys and values of one layer; in the others a state for each request, and two copies."""
    config = hybrid()
    assert kv_bytes(config, torch.float32) == 2 * 2 * 8 * 4
    of_layer = 4 * 8 * 6 + 3 * (2 * 2 * 8 + 4 * 6)
    assert state_bytes(config, 3) == 4 * 5 * of_layer * 4
    # on the kernels six columns fill a block of 16, and eight rows may wait beside three inputs
    packed = 4 * 8 * 16 + (3 + 8) * (2 * 2 * 8 + 4 * 6 + 2 * 4)
    assert state_bytes(config, 3, native=True) == 4 * 5 * packed * (3 + 2)
    assert state_bytes(replace(config, linear=None), 3) == 0


def test_work_on_experts_has_room() -> None:
    """More rows than the layers' own are those of experts: two for each of the others."""
    limits = EngineLimits(kv_tokens=64, pages=4, rows=10, longest=64)
    wide = mixture(moe_intermediate_size=1000)
    more = work_bytes(wide, limits) - work_bytes(replace(wide, experts=None), limits)
    assert more == 4 * 10 * (4 + 2 * (32 + 1000) - 2 * 64)
