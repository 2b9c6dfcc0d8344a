"""A family is described as data: what computes reads the description, and asks for no name."""

import ast
from pathlib import Path
from typing import Any

import pytest

import smart_decoding
from smart_decoding.models.families.layer import PRE_NORMS
from smart_decoding.models.families.reading import (
    FAMILIES,
    config_from_hf,
    family_of,
    gguf_family,
)

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
    config = config_from_hf({**SIZES, "architectures": [family.architecture]})
    assert family_of(config) is family
    if family.gguf is not None:
        assert gguf_family(family.gguf) is family
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
