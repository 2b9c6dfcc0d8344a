"""Llama 2 and 3, and what is built like them: Vicuna, SmolLM2, DeepSeek-R1's distillates."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smart_decoding.models.families.family import Family, RowOrder

if TYPE_CHECKING:
    from smart_decoding.models.families.config import ModelConfig


def row_order(heads: int, kv_heads: int, name: str) -> RowOrder | None:
    """Return the order of q and k, None for other tensors: llama.cpp pairs RoPE dimensions (0, 1),
    (2, 3), ...; Hugging Face's layout pairs (0, d/2), (1, d/2 + 1), ..."""
    part = name.split(".")[-2:][0]
    count = {"attn_q": heads, "attn_k": kv_heads}.get(part)
    return None if count is None else RowOrder((count, -1, 2), (1, 2))


def _gguf_order(config: ModelConfig, name: str) -> RowOrder | None:
    return row_order(config.heads, config.kv_heads, name)


LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    model_type="llama",
    gguf="llama",
    options=frozenset({"attention_bias"}),
    gguf_order=_gguf_order,
)
