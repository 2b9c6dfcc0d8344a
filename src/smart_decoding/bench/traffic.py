"""What a forward moves and computes, so that its time can be read as GB/s and GFLOP/s."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smart_decoding.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Sizes:
    """weights: elements of all matrices that a forward multiplies by; kv: elements that a context
    token keeps; item: bytes of an element."""

    weights: int
    kv: int
    item: int

    @classmethod
    def of(cls, config: ModelConfig, item: int) -> Sizes:
        """The sizes of a decoder of the Llama family."""
        layer = layer_elements(
            config.hidden, config.heads, config.kv_heads, config.head_dim, config.ffn
        )
        kv = 2 * config.layers * config.kv_heads * config.head_dim
        return cls(config.layers * layer + config.vocab * config.hidden, kv, item)

    def moved(self, batch_size: int, context: float) -> float:
        """Bytes: every weight and every cached key and value once."""
        return self.item * (self.weights + batch_size * context * self.kv)


def layer_elements(hidden: int, heads: int, kv_heads: int, head_dim: int, ffn: int) -> int:
    """Elements of the matrices of one layer."""
    return hidden * (2 * head_dim * (heads + kv_heads) + 3 * ffn)


def achieved(run: Mapping[str, Any], sizes: Sizes) -> dict[str, float]:
    """Mean GB/s and GFLOP/s of a run's verifying forwards (sampling included), NaN where no round
    was counted.

    FLOPs: products with weights; attention is left out."""
    seconds = 1e-3 * run["verify_ms"]
    moved = sizes.moved(run["batch_size"], run["context_tokens"])
    computed = 2 * sizes.weights * run["rows_per_round"]
    return {"gb_per_s": _rate(moved, seconds), "gflop_per_s": _rate(computed, seconds)}


def _rate(amount: float, seconds: float) -> float:
    return 1e-9 * amount / seconds if seconds > 0 else float("nan")
