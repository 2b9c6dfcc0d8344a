"""A head's tensors on its target's device, and what it borrows of the target."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from smart_decoding.kernels.weights import as_tensor
from smart_decoding.models.checkpoints.rounding import RoundedWeights
from smart_decoding.models.heads.files import AUX_NORM, FIRST, OUTPUTS, layer_prefixes
from smart_decoding.models.heads.forms import MTP_LAYER
from smart_decoding.models.torch.layers import LayerWeights, layer_weights, norm_weight

if TYPE_CHECKING:
    from collections.abc import Mapping

    from smart_decoding.kernels.weights import Matrix, PackedWeight
    from smart_decoding.models.families.config import ModelConfig
    from smart_decoding.models.heads.files import HeadFiles
    from smart_decoding.models.torch.torch_layers import Linear


class TargetWeights(Protocol):
    """What a head borrows of its target. native: whether the head runs on the CPU kernels;
    graphs: whether its levels are recorded on a CUDA device; work_dtype: of activations; head:
    the output matrix."""

    config: ModelConfig
    native: bool
    graphs: bool
    dtype: torch.dtype
    work_dtype: torch.dtype
    device: torch.device
    head: Linear | PackedWeight

    @property
    def quantized(self) -> bool:
        """Whether the CPU kernels hold quants of the target."""

    @property
    def final_norm(self) -> Tensor | None:
        """The weight [hidden] of the norm before the output matrix; None if the aux hidden states
        of an EAGLE-1/2 head come through it already."""

    @property
    def embedding(self) -> PackedWeight | Tensor:
        """The embeddings, packed or as a table, as the CPU kernels read them."""

    def embed(self, token: Tensor) -> Tensor:
        """[n, hidden], on torch."""


class HeadWeights:
    """A head's tensors on the target's device, in its dtype.

    draft_ids: [draft] the tokens it proposes. aux_together: one norm reads what `fc` does, the aux
    hidden states of all layers side by side."""

    def __init__(self, files: HeadFiles, target: TargetWeights) -> None:
        self.files = files
        self.target = target
        # a copy, as some heads change it, and others may be made of the same files
        self.draft_ids = self._read("draft_ids").long().clone()
        self.aux_together = AUX_NORM in files.weights

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name).to(self.target.dtype)

    def get(self, name: str) -> Tensor | None:
        """Return the tensor, or None where the head has none of that name."""
        return self[name] if name in self.files.weights else None

    def norm(self, name: str | None) -> Tensor | None:
        """Return the weight [hidden] of a norm by its name in HeadForm; None where that is None."""
        if name is None:
            return None
        shifted = self.files.shape.shifted_norms
        return norm_weight(self.files.weights, name, self.target.dtype, shifted).to(
            self.target.device
        )

    @cached_property
    def aux_norm(self) -> Tensor | None:
        """[aux_layers * hidden] the weight of norms of what `fc` reads; None: it has none."""
        if self.aux_together:
            return self[AUX_NORM]
        count = len(self.files.aux_layers)
        each = [norm for i in range(count) if (norm := self.get(f"fc_norm.{i}.weight")) is not None]
        return torch.cat(each) if each else None

    @cached_property
    def held(self) -> Mapping[str, Matrix]:
        """Its tensors by name, matrices in 8 bits where the target's are quants, unless they are
        quants already: no answer depends on drafts."""
        weights = self.files.weights
        return RoundedWeights(weights, "int8") if self.target.quantized else weights

    @cached_property
    def embedding(self) -> Tensor | None:
        """[vocab, hidden] its own embeddings; None where it reads the target's."""
        own = self.get("embed_tokens.weight")
        return None if own is None else own.contiguous()

    @property
    def shares_output(self) -> bool:
        """Whether the target's output matrix ranks what comes out, as it is."""
        return self.files.fused and OUTPUTS not in self.files.weights and self._has_all_tokens

    @property
    def changes(self) -> bool:
        """Whether it proposes other tokens as time goes on, with other `rows_of` the output
        matrix."""
        return self.files.form == MTP_LAYER and not self._has_all_tokens

    @property
    def _has_all_tokens(self) -> bool:
        return len(self.draft_ids) == self.target.config.vocab

    @property
    def output(self) -> Tensor:
        """[draft, hidden] the output matrix: its own, or rows of one of all tokens, each time
        anew."""
        own = self.get("lm_head.weight")
        return self.rows_of(self.draft_ids) if own is None else own

    def rows_of(self, tokens: Tensor) -> Tensor:
        """Return rows [n, hidden] of the output matrix of all tokens: its own, or the target's,
        which the kernels give as float32."""
        own = self.files.weights.get(OUTPUTS)
        if own is None:
            return self.target.head.rows_of(tokens)
        return as_tensor(own[tokens.cpu().numpy()]).to(self.target.device, self.target.dtype)

    def _read(self, name: str) -> Tensor:
        return as_tensor(self.files.weights[name]).to(self.target.device)

    def layers(self) -> list[LayerWeights]:
        """Return its layers."""
        shape = self.files.shape
        target = self.target
        return [
            layer_weights(
                shape.layer(i),
                self.held,
                prefix,
                target.dtype,
                target.device,
                prefix != FIRST or self.files.form.input_norm,
            )
            for i, prefix in enumerate(layer_prefixes(shape.layers))
        ]
