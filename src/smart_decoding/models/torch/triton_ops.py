"""What lies between a layer's matrix products, by Triton's kernels.

Attention is split over the keys (flash-decoding, Dao et al. 2023): partial maxima, sums and outputs
first, then one reduction. A tile holds up to TILE rows of a group with all query heads that share a
head of keys, so that the keys of the context are read once for them. A row's ancestors in the draft
tree are few: each row reads its own, which needs no mask.

This never ran on a GPU so far (2026-11-28). docs/will-it-help.md says what is checked without one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from smart_decoding.models.torch import triton_kernels as kernels
from smart_decoding.models.torch.rows import TILE
from smart_decoding.models.torch.torch_layers import TorchOps

if TYPE_CHECKING:
    from torch import Tensor

    from smart_decoding.models.torch.layers import Context, LayerWeights

BLOCKS = 264  # programs that keep a GPU busy: two for each multiprocessor of an H100
MOST_SPLITS = 32
COLUMNS = 1024  # of a feed-forward network's rows, in one program
LOG2_E = 1.4426950408889634


class TritonOps(TorchOps):
    """See `TorchOps`, which does what has no kernel here: sinks, and clamped gates."""

    def write(
        self, qkv: Tensor, w: LayerWeights, context: Context, keys: Tensor, values: Tensor
    ) -> Tensor:
        """See `TorchOps`."""
        q = qkv.new_empty(len(qkv), w.heads, w.head_dim)
        kernels.write[(len(qkv), w.heads + 2 * w.kv_heads)](
            *(qkv, q, keys, values, context.on_device.meta, *context.rotation),
            *(w.q_norm, w.k_norm, w.eps, keys.stride(0)),
            angles=context.rotation[0].shape[1],
            angle=w.angle,
            heads=w.heads,
            kv_heads=w.kv_heads,
            half=w.head_dim // 2,
            num_warps=1,
        )
        return q

    def attend(
        self,
        q: Tensor,
        context: Context,
        keys: Tensor,
        values: Tensor,
        window: int = 0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """See `TorchOps`."""
        if sinks is not None:
            return super().attend(q, context, keys, values, window, sinks)
        rows, heads, width = q.shape
        kv_heads = len(keys)
        at = context.on_device
        splits = splits_of(at.size, kv_heads)
        out = partial = q.new_empty(rows, heads * width)
        weight = None
        if splits > 1:
            partial = q.new_empty(rows, heads, splits, width, dtype=torch.float32)
            weight = q.new_empty(rows, heads, splits, 2, dtype=torch.float32)
        kernels.attend[(at.tiles, kv_heads, splits)](
            *(q, keys, values, at.meta, partial, weight, at.size, keys.stride(0)),
            *(width**-0.5 * LOG2_E, window),
            group=heads // kv_heads,
            width=width,
            num_warps=8,  # with 4, registers spill
            num_stages=2,
        )
        if splits > 1:
            kernels.reduce[(rows, heads)](
                partial, weight, at.meta, out, splits, width, MOST_SPLITS, num_warps=4
            )
        return out

    def gate(self, gate_up: Tensor, gelu: bool = False, clamped: bool = False) -> Tensor:
        """See `TorchOps`."""
        if clamped:
            return super().gate(gate_up, gelu, clamped)
        rows, both = gate_up.shape
        ffn = both // 2
        out = gate_up.new_empty(rows, ffn)
        kernels.gate[(rows, -(-ffn // COLUMNS))](gate_up, out, ffn, gelu=gelu, block=COLUMNS)
        return out


def splits_of(rows: int, kv_heads: int) -> int:
    """Return parts that contexts are read in, so that forwards of so many rows keep a GPU busy."""
    return max(1, min(MOST_SPLITS, BLOCKS // (-(-rows // TILE) * kv_heads)))
