"""Heads of a head dimension that the CPU kernels do not serve, such as 80, with zeros up to the
next one that they do.

Zeros of queries and keys add nothing to scores, and those of values nothing to outputs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from smart_decoding.errors import ModelError
from smart_decoding.kernels.ops import HEAD_DIMS
from smart_decoding.kernels.weights import as_tensor
from smart_decoding.models.cpu.kernel_check import unserved
from smart_decoding.models.heads.files import layer_prefixes

if TYPE_CHECKING:
    from torch import Tensor

    from smart_decoding.kernels.weights import Matrix
    from smart_decoding.models.families.config import ModelConfig
    from smart_decoding.models.heads.files import HeadFiles


def widened_shape(shape: ModelConfig) -> ModelConfig:
    """Return the shape of the same head as the kernels serve it; itself where they do so already,
    or where that is not possible.

    Norms of queries and keys count the numbers that they divide by, so such heads stay."""
    larger = [size for size in HEAD_DIMS if size > shape.head_dim]
    if shape.head_dim in HEAD_DIMS or not larger or shape.head_dim % 2 or shape.qk_norm:
        return shape
    return replace(shape, head_dim=larger[0], rotary_dim=shape.head_dim)


def require_served_head(shape: ModelConfig) -> None:
    """Raise ModelError for a head that the CPU kernels do not serve beside a target of theirs."""
    reason = unserved(widened_shape(shape))
    if reason is not None:
        raise ModelError(
            f"the CPU kernels do not serve this head: {reason}; take another head or method"
        )


def widened(files: HeadFiles) -> HeadFiles:
    """Return the head in `widened_shape`, its quants expanded where they get zeros."""
    shape = widened_shape(files.shape)
    if shape == files.shape:
        return files
    old, new = files.shape.head_dim, shape.head_dim
    weights: dict[str, Matrix] = dict(files.weights)
    for prefix in layer_prefixes(shape.layers):
        for name in ("q", "k", "v"):
            for kind in ("weight", "bias"):
                full = f"{prefix}self_attn.{name}_proj.{kind}"
                if full not in weights:
                    continue
                rows = as_tensor(weights[full])
                if name == "q":  # scores are divided by the root of the new dimension
                    rows = rows.float() * (new / old) ** 0.5
                weights[full] = _padded(rows, old, new)
        output = f"{prefix}self_attn.o_proj.weight"
        weights[output] = _padded(as_tensor(weights[output]).t(), old, new).t().contiguous()
    return replace(files, weights=weights, shape=shape)


def _padded(rows: Tensor, old: int, new: int) -> Tensor:
    """Return rows [heads * old, ...] of heads as [heads * new, ...], zeros behind each head's."""
    each = rows.reshape(-1, old, *rows.shape[1:])
    zeros = each.new_zeros(len(each), new - old, *rows.shape[1:])
    return torch.cat((each, zeros), dim=1).flatten(0, 1)
