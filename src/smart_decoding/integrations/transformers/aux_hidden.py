"""A transformers model's hidden states at chosen layers, taken by forward hooks while it runs.

`output_hidden_states` would keep all layers, and has the last one after the final norm only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from smart_decoding.errors import ModelError


class AuxHidden:
    """The residual stream after layer 1, 2, ...; the number after the last layer's means the final
    norm.

    Raises ModelError if the layers cannot be found."""

    def __init__(self, model: PreTrainedModel, layers: int) -> None:
        decoder: nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
        lists = [
            part
            for part in decoder.modules()
            if isinstance(part, nn.ModuleList) and len(part) == layers
        ]
        if not lists:
            raise ModelError(
                f"the {layers} layers of {type(model).__name__} cannot be found: "
                "no draft head runs on it"
            )
        self._modules: list[nn.Module] = [*lists[0], decoder]

    @contextmanager
    def taken(self, aux_layers: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
        """Yield the states of the block's last forward by layer: [batch, queries, hidden]."""
        found: dict[int, torch.Tensor] = {}

        def keep(layer: int) -> Any:
            return lambda module, inputs, output: found.__setitem__(layer, _states(output))

        handles = [self._modules[n - 1].register_forward_hook(keep(n)) for n in aux_layers]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()


def _states(output: Any) -> torch.Tensor:
    """Return the states in the output of a layer, a tensor or a tuple, or of the whole decoder."""
    if isinstance(output, torch.Tensor):
        return output
    whole = hasattr(output, "last_hidden_state")
    states: torch.Tensor = output["last_hidden_state"] if whole else output[0]
    return states
