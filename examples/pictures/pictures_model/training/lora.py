"""Low-rank changes to frozen linear layers: W + scale * B A, trained here and merged when the model
is assembled."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SCALE = 2.0


class LowRank(nn.Module):
    """A frozen linear layer plus SCALE * B A; B starts at zero, so that nothing is changed at
    first."""

    def __init__(self, frozen: nn.Linear, rank: int) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.lora_a = nn.Parameter(torch.randn(rank, frozen.in_features) / frozen.in_features**0.5)
        self.lora_b = nn.Parameter(torch.zeros(frozen.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.linear(x, self.lora_a.to(x.dtype))
        out: Tensor = self.frozen(x) + F.linear(inner, self.lora_b.to(x.dtype) * SCALE)
        return out


def attach(decoder: Any, rank: int, first: int, kinds: Collection[str]) -> None:
    """Freezes a decoder and puts a low-rank change beside the linear layers of these kinds from
    block `first` on."""
    decoder.requires_grad_(False)
    for block in decoder.layers[first:]:
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if name in kinds and isinstance(child, nn.Linear):
                    setattr(parent, name, LowRank(child, rank))
