"""The shapes of the tensors that a head must hold, by EAGLE-3's names."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from smart_decoding.models.config import ModelConfig

FIRST = "midlayer."  # EAGLE-3's name for the layer

Shapes: TypeAlias = dict[str, tuple[int, ...]]


def eagle3_shapes(c: ModelConfig, target_hidden: int, aux_layers: tuple[int, ...]) -> Shapes:
    """EAGLE-3: q, k and v read [embedding ; features]."""
    return {
        "fc.weight": (c.hidden, len(aux_layers) * target_hidden),
        "norm.weight": (c.hidden,),
        f"{FIRST}input_layernorm.weight": (c.hidden,),
        f"{FIRST}hidden_norm.weight": (c.hidden,),
        **_first_shapes(c, 2 * c.hidden),
    }


def eagle2_shapes(c: ModelConfig) -> Shapes:
    """EAGLE-1/2: fc reads [embedding ; features], and the layer has no norm at its input."""
    return {"fc.weight": (c.hidden, 2 * c.hidden), **_first_shapes(c, c.hidden)}


def further_shapes(c: ModelConfig) -> Shapes:
    """The layers after the first are ordinary ones: they read what the one before gave, through
    their own norm."""
    shapes: Shapes = {}
    for prefix in layer_prefixes(c.layers)[1:]:
        shapes |= _layer_shapes(c, c.hidden, prefix)
    return shapes


def layer_prefixes(layers: int) -> list[str]:
    """What the names of each layer's tensors start with in `HeadFiles.weights`."""
    return [FIRST, *(f"layers.{i}." for i in range(1, layers))]


def _layer_shapes(c: ModelConfig, width: int, prefix: str) -> Shapes:
    return {prefix + name: shape for name, shape in c.layer_shapes(width).items()}


def _first_shapes(c: ModelConfig, width: int) -> Shapes:
    """Those of the first layer, but for norms of what it reads."""
    shapes = _layer_shapes(c, width, FIRST)
    del shapes[f"{FIRST}input_layernorm.weight"]
    return shapes
