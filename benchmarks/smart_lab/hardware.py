"""Costs of a round on other hardware: an explained roofline from a data sheet and a model's
dimensions.

    verify(batch, rows, context) = max(host, products(rows)) + keys(batch, context) + scores(rows,
    context) products(rows) = max(weights / memory rate, 2 * weights * rows in whole tiles /
    (efficiency * peak))

Keys are read once per sequence, scores are computed once per row. A drafted level is the same for
one layer, a fusing matrix and the drafter's output matrix; a cost model knows its rows only, so
that each of them pays a part of its sequence's keys. The parameters are in hardware.json; one
efficiency serves all cards.

Needed by `simulate --hardware` and `ablate --machines`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from smart_decoding.core.costs import CostModel, Curve
from smart_decoding.errors import ConfigError, ModelError
from smart_decoding.models.families.reading import config_from_hf

if TYPE_CHECKING:
    from smart_decoding.core.tree import FloatArray, IntArray

ITEM = 2  # bytes: bf16
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
MOST_ROWS = 96  # per request
LEVEL_ROWS = 4  # of a request in a drafted level, about: smart expands 1 or 2, EAGLE-2 ten


def layer_elements(hidden: int, heads: int, kv_heads: int, head_dim: int, ffn: int) -> int:
    """Elements of the matrices of one layer."""
    return hidden * (2 * head_dim * (heads + kv_heads) + 3 * ffn)


@dataclass(frozen=True, slots=True)
class Card:
    """bytes_s, flop_s: data sheet; efficiency: of flop_s; tile: rows that products are computed in;
    seconds that the host needs per layer, per drafted level beyond its layer, and per drafting
    round."""

    name: str
    bytes_s: float
    flop_s: float
    memory: float
    efficiency: float
    tile: int
    layer_seconds: float
    level_seconds: float
    round_seconds: float


@dataclass(frozen=True, slots=True)
class Dimensions:
    """A decoder of the Llama family, and the vocabulary of its draft head."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    draft_vocab: int

    @property
    def layer(self) -> int:
        """Elements of a layer's matrices."""
        return layer_elements(self.hidden, self.heads, self.kv_heads, self.head_dim, self.ffn)

    @property
    def weights(self) -> int:
        """Elements that a forward multiplies by."""
        return self.layers * self.layer + self.vocab * self.hidden

    @property
    def draft_weights(self) -> int:
        return self.layer + 2 * self.hidden**2 + self.draft_vocab * self.hidden

    @property
    def kv_bytes(self) -> int:
        """Bytes of a context token in one layer."""
        return 2 * self.kv_heads * self.head_dim * ITEM

    def memory(self, batch: int, context: float) -> float:
        """Return bytes of weights, head and keys."""
        return (
            ITEM * (self.weights + self.draft_weights)
            + batch * context * self.layers * self.kv_bytes
        )


def roofline(card: Card, model: Dimensions) -> CostModel:
    """Return the cost model of `model` on `card`."""
    rows = _grid(MOST_ROWS * BATCHES[-1], card.tile)
    seconds = np.maximum(model.layers * card.layer_seconds, _products(card, model.weights, rows))
    verify = {batch: _curve(rows[rows >= batch], seconds[rows >= batch]) for batch in BATCHES}
    level = (
        np.maximum(card.layer_seconds, _products(card, model.draft_weights, rows))
        + card.level_seconds
    )
    scores = 4 * model.heads * model.head_dim / (card.efficiency * card.flop_s)
    keys = model.kv_bytes / card.bytes_s
    return CostModel(
        verify,
        _curve(rows, level),
        row_token=model.layers * scores,
        sequence_token=model.layers * keys,
        draft_token=scores + keys / LEVEL_ROWS,
        overhead_seconds=card.round_seconds,
    )


def card(name: str, eager: bool = False) -> Card:
    """Return a card of hardware.json. Raises ConfigError for an unknown name."""
    data = _data()
    if name not in data["cards"]:
        raise ConfigError(
            f"unknown hardware {name!r}; known: {', '.join(data['cards'])}, measured, "
            "or a profile's JSON"
        )
    sheet, how = data["cards"][name], "eager" if eager else "graphs"

    def of(key: str) -> float:
        value = sheet.get(key, data[key])
        return float(value[how] if isinstance(value, Mapping) else value)

    return Card(
        sheet["name"],
        1e9 * sheet["memory_gb_s"],
        1e12 * sheet["bf16_tflop_s"],
        1e9 * sheet["memory_gb"],
        of("efficiency"),
        int(of("tile_rows")),
        1e-6 * of("host_us_per_layer"),
        1e-6 * of("host_us_per_level"),
        1e-6 * of("controller_us"),
    )


def dimensions(name: str) -> Dimensions:
    """Return a model of hardware.json, or a config.json. Raises ConfigError or ModelError."""
    models = _data()["models"]
    if name in models:
        return Dimensions(name=name, **{"draft_vocab": models[name]["vocab"], **models[name]})
    path = Path(name)
    if not path.is_file():
        raise ConfigError(
            f"unknown model {name!r}; known: {', '.join(models)}, or the path of a config.json"
        )
    try:
        config = config_from_hf(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not a readable config.json: {error}") from error
    return Dimensions(
        path.parent.name or path.name,
        config.layers,
        config.hidden,
        config.heads,
        config.kv_heads,
        config.head_dim,
        config.ffn,
        config.vocab,
        min(config.vocab, 32000),
    )


def too_large(card: Card, model: Dimensions, batch: int, context: float) -> list[str]:
    """Return a message if a batch does not fit into the card's memory."""
    needed = model.memory(batch, context)
    if needed <= card.memory:
        return []
    return [f"batch {batch} needs {needed / 1e9:.0f} GB, more than its {card.memory / 1e9:.0f} GB"]


def acceptances() -> Mapping[str, Mapping[str, Any]]:
    """Published levels of acceptance: tokens per round of EAGLE-2's trees, the context, the
    source."""
    found: Mapping[str, Mapping[str, Any]] = _data()["acceptance"]
    return found


@cache
def _data() -> Any:
    return json.loads((Path(__file__).with_name("hardware.json")).read_text(encoding="utf-8"))


def _products(card: Card, weights: int, rows: IntArray) -> FloatArray:
    """Return seconds of all products with `weights` elements."""
    computed = 2.0 * weights * card.tile * np.ceil(rows / card.tile)
    return np.maximum(ITEM * weights / card.bytes_s, computed / (card.efficiency * card.flop_s))


def _grid(most: int, tile: int) -> IntArray:
    """Row counts at both ends of every tile, so that linear interpolation keeps the staircase."""
    edges = np.arange(0, most + tile, tile)
    return np.unique(np.concatenate(([1], edges[1:], edges + 1)))


def _curve(rows: IntArray, seconds: FloatArray) -> Curve:
    return Curve(tuple(rows.tolist()), tuple(seconds.tolist()))
