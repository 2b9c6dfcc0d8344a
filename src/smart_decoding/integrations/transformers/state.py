"""The state of a transformers model, kept on the model itself from call to call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from smart_decoding.errors import ModelError
from smart_decoding.integrations.transformers.checks import cache_of, fitting_layout

if TYPE_CHECKING:
    from smart_decoding.core.costs import CostModel
    from smart_decoding.integrations.transformers.sources import Drafting, DraftSource

ATTRIBUTE = "_smart_decoding"  # on the model


@dataclass(frozen=True, slots=True)
class Report:
    """Counts of one `generate` call. rounds: forwards that decoded; drafted / verified / accepted:
    tree nodes.

    layout: 'tree', or 'chain' where the model's attention takes no tree mask. drafter: 'none' if
    speculation was off.
    """

    drafter: str
    policy: str
    layout: str
    tokens: int
    rounds: int
    drafted: int
    verified: int
    accepted: int


@dataclass
class ModelState:
    """The state of one model.

    layouts, costs: by attention, dtype, device. idle: by configuration. sources: heads and draft
    models that no call is using, by `key_of`."""

    layouts: dict[tuple[object, ...], str] = field(default_factory=dict)
    costs: dict[tuple[object, ...], CostModel] = field(default_factory=dict)
    idle: dict[str, Drafting] = field(default_factory=dict)
    sources: dict[str | None, DraftSource] = field(default_factory=dict)
    last: Report | None = None


def state_of(model: PreTrainedModel) -> ModelState:
    """Return the model's state, made at first use."""
    state = getattr(model, ATTRIBUTE, None)
    if not isinstance(state, ModelState):
        state = ModelState()
        setattr(model, ATTRIBUTE, state)
    return state


def bucket(batch: int) -> int:
    """Return the power of two at or above it."""
    return 1 << (batch - 1).bit_length()


def layers_of(model: PreTrainedModel, inputs: Mapping[str, Any] | None = None) -> int:
    """Return layers with keys, of the cache that `generate` prepared or would prepare."""
    cache = cache_of(inputs) if inputs is not None else None
    if cache and cache.layers:
        return len(cache.layers)
    return int(model.config.get_text_config(decoder=True).num_hidden_layers)


def layout_of(model: PreTrainedModel, layers: int) -> str:
    """Return 'tree' or 'chain', found once.

    Raises ModelError for a model whose logits change through our cache."""
    state = state_of(model)
    key = setting_of(model)
    if key not in state.layouts:
        layout = fitting_layout(model, layers)
        if layout is None:
            raise ModelError(
                f"{type(model).__name__} ({key[0]} attention) gives other logits through a cache "
                "that we manage than without: it cannot be used here"
            )
        state.layouts[key] = layout
    return state.layouts[key]


def setting_of(model: PreTrainedModel) -> tuple[object, ...]:
    """Return the settings besides the model that layouts and costs depend on."""
    return (str(model.config._attn_implementation), str(model.dtype), str(model.device))
