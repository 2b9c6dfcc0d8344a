"""A model's layer for multi-token prediction (MTP) as a draft head.

It borrows the model's embeddings and its output matrix, unless it has its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from smart_decoding.models.families.family import MTP
from smart_decoding.models.families.mtp import LAYER, OUTPUT, mtp_shape
from smart_decoding.models.heads.files import FIRST, OUTPUTS, HeadFiles
from smart_decoding.models.heads.forms import MTP_LAYER

if TYPE_CHECKING:
    from collections.abc import Mapping

    from smart_decoding.kernels.weights import Matrix
    from smart_decoding.models.families.config import ModelConfig


def mtp_files(model: ModelConfig, tensors: Mapping[str, Matrix], tokens: int) -> HeadFiles:
    """Return the layer as head files.

    tensors: checked ones, as layers multiply by them. tokens: how many it proposes, those with the
    lowest ids, which byte-level BPE merged first: the most frequent ones."""
    weights = {
        FIRST + name.removeprefix(LAYER) if name.startswith(LAYER) else name.removeprefix(MTP): each
        for name, each in tensors.items()
    }
    if OUTPUT in tensors:
        weights[OUTPUTS] = weights.pop(OUTPUT.removeprefix(MTP))
    weights["draft_ids"] = torch.arange(tokens)
    return HeadFiles({}, weights, (model.layers,), mtp_shape(model), MTP_LAYER)
