"""Draft heads and draft models, as they are kept from call to call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from transformers import PreTrainedModel

from smart_decoding.integrations.transformers.state import layers_of, layout_of

if TYPE_CHECKING:
    from pathlib import Path

    from smart_decoding.engine.protocols import Drafter

METHODS = ("eagle", "draft_model")


class Source(Protocol):
    """Lent to one call at a time. widest: children of a node that it may propose. folder: where a
    prior may lie that came with it, or None."""

    widest: int
    folder: Path | None

    @property
    def shape(self) -> tuple[object, ...]:
        """What the cost of a level depends on."""
        ...

    def drafter(self, pages: int, positions: int) -> Drafter:
        """For one call, with room for keys in so many pages and positions."""
        ...

    def check_length(self, max_length: int) -> None:
        """Raises ModelError if it cannot follow a text to this length."""
        ...


def key_of(options: Mapping[str, Any]) -> str | None:
    """What stands for the model that these options name; None if they need none."""
    method = options["method"]
    model = options.get("model")
    if method == "union" and model:
        method = "eagle"
    if method not in METHODS:
        return None
    return f"{method} {id(model)}" if isinstance(model, PreTrainedModel) else f"{method} {model}"


def load_source(target: PreTrainedModel, options: Mapping[str, Any], max_length: int) -> Source:
    """What `key_of` stands for.

    Raises SmartError, before any forward of either model, where it does not fit."""
    if options["method"] != "draft_model":
        from smart_decoding.integrations.transformers.heads import load_host_head

        return load_host_head(target, options.get("model"), bool(options.get("trust_pickle")))
    from smart_decoding.integrations.transformers.draft_models import (
        HostDraftModel,
        load_draft_model,
    )

    model = load_draft_model(target, options.get("model"), max_length)
    layers = layers_of(model)
    vocab = int(target.config.get_text_config(decoder=True).vocab_size)
    return HostDraftModel(model, layers, layout_of(model, layers) == "tree", vocab)
