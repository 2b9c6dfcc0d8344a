"""Llama 2 and 3, and what is built like them: Vicuna, SmolLM2, DeepSeek-R1's distillates."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smart_decoding.models.families.family import Family, RowOrder

if TYPE_CHECKING:
    from smart_decoding.models.families.config import ModelConfig


def _gguf_order(config: ModelConfig, name: str) -> RowOrder | None:
    """Return the order of q and k: llama.cpp pairs RoPE dimensions (0, 1), (2, 3), ...; Hugging
    Face's layout pairs (0, d/2), (1, d/2 + 1), ..."""
    heads = {"attn_q": config.heads, "attn_k": config.kv_heads}.get(name.split(".")[-2])
    return None if heads is None else RowOrder((heads, -1, 2), (1, 2))


LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    model_type="llama",
    gguf="llama",
    options=frozenset({"attention_bias"}),
    gguf_order=_gguf_order,
)
