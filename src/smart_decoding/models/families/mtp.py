"""Layers for multi-token prediction (MTP), as some checkpoints hold one: its names and its shape.

It reads the embedding of a token and the model's state before that token, through a norm each, and
predicts the token behind. In safetensors its tensors are `mtp.*`; in GGUF files it is the last
block, and what is no layer's is `nextn.*`. Embeddings and output matrix are the model's, or its
own.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from smart_decoding.errors import ModelError
from smart_decoding.models.families.config import check_shapes
from smart_decoding.models.families.family import MTP

if TYPE_CHECKING:
    from smart_decoding.models.families.config import ModelConfig
    from smart_decoding.models.families.layer import Shapes

LAYER = f"{MTP}layers.0."
EMBEDDING = f"{MTP}embed_tokens.weight"
OUTPUT = f"{MTP}lm_head.weight"
# the norms of what fc reads
EMBEDDING_NORM = "pre_fc_norm_embedding"
HIDDEN_NORM = "pre_fc_norm_hidden"
_NUMBER = re.compile(r"mtp\.layers\.(\d+)\.")
_INSTEAD = "take method 'ngram', or 'draft_model' with a smaller model"


def mtp_shape(model: ModelConfig) -> ModelConfig:
    """Return the shape of a model's MTP layer: one of its own layers, with attention to all
    positions."""
    return replace(model, layers=1, linear=None, attention_layers=())


def mtp_shapes(model: ModelConfig) -> Shapes:
    """Return the tensors that a model's MTP layer must have: name to shape."""
    hidden = model.hidden
    layer = mtp_shape(model).layer(0).shapes(hidden)
    return {
        f"{MTP}fc.weight": (hidden, 2 * hidden),
        f"{MTP}{EMBEDDING_NORM}.weight": (hidden,),
        f"{MTP}{HIDDEN_NORM}.weight": (hidden,),
        **{LAYER + name: shape for name, shape in layer.items()},
        f"{MTP}norm.weight": (hidden,),
    }


def own_shapes(model: ModelConfig, found: Collection[str]) -> Shapes:
    """Return those of its embeddings and its output matrix that are `found`: elsewhere it shares
    the model's."""
    return {name: (model.vocab, model.hidden) for name in (EMBEDDING, OUTPUT) if name in found}


def check_mtp(model: ModelConfig, found: Mapping[str, Collection[int]], name: str) -> None:
    """Raise ModelError unless a checkpoint has an MTP layer that can draft.

    found: shape by name of its tensors `mtp.*`; name: the checkpoint's."""
    if not found:
        raise ModelError(
            f"{name} has no layer for multi-token prediction (tensors mtp.*, or nextn in GGUF "
            f"files, many of which leave it out): {_INSTEAD}"
        )
    layers = {match[1] for match in map(_NUMBER.match, found) if match}
    if len(layers) > 1:
        raise ModelError(
            f"{name} has {len(layers)} layers for multi-token prediction, of which one is "
            f"supported: {_INSTEAD}"
        )
    expected = {**mtp_shapes(model), **own_shapes(model, found)}
    check_shapes(f"the MTP layer of {name}", found, expected, (), "an MTP layer")
