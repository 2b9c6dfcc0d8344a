"""A draft head, published or ours, on a transformers model: it reads the model's layers and borrows
its embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from smart_decoding.core.tree import IntArray
from smart_decoding.drafters.eagle import EagleDrafter
from smart_decoding.drafters.levels import Asked, Ranked
from smart_decoding.engine.protocols import Drafter
from smart_decoding.engine.rows import Rows
from smart_decoding.errors import ConfigError, ModelError
from smart_decoding.models.config import ModelConfig
from smart_decoding.models.eagle_head import EagleHead
from smart_decoding.models.features import Part
from smart_decoding.models.head_export import layout_of
from smart_decoding.models.head_files import HeadFiles, head_folder, load_head
from smart_decoding.models.kernel_check import use_native
from smart_decoding.models.layers import Workspace
from smart_decoding.speculation import SCRATCH_PAGES, shipped_head

KERNEL_DTYPES = (torch.bfloat16, torch.float32)


class HostHead(EagleHead):
    """widest: children of a node that are proposed at most; 1 where the target takes chains only.
    folder: its own."""

    def __init__(self, files: HeadFiles, folder: Path, model: PreTrainedModel) -> None:
        if files.fused:  # transformers gives what the target's output matrix reads
            files = replace(files, aux_layers=(files.aux_layers[0] + 1,))
        super().__init__(files, HostLender(files, model), 0, 0, 0)
        self.folder, self.widest = folder, 1 << 30

    def drafter(self, pages: int, positions: int) -> Drafter:
        """For one call, with room for keys in so many pages and for positions below `positions`."""
        self.allocate(pages + SCRATCH_PAGES, positions + 64)
        return EagleDrafter(self, pages, SCRATCH_PAGES)

    def first(self, rows: Rows, parts: Sequence[Part], last: IntArray, asked: Asked) -> Ranked:
        return super().first(rows, parts, last, replace(asked, k=min(asked.k, self.widest)))

    def deeper(self, rows: Rows, above: IntArray, asked: Asked) -> Ranked:
        return super().deeper(rows, above, replace(asked, k=min(asked.k, self.widest)))


class HostLender:
    """What a head borrows of a transformers model."""

    final_norm, embedding = None, None

    def __init__(self, files: HeadFiles, model: PreTrainedModel) -> None:
        self.config, self.dtype, self.workspace = host_config(model)[0], model.dtype, Workspace()
        self.head = HostOutput(model.get_output_embeddings())
        self.device: torch.device = self.head.weight.device
        self.native = model.dtype in KERNEL_DTYPES and use_native(
            files.shape, self.device, allow_slow=True
        )
        self.work_dtype = torch.float32 if self.native else model.dtype
        self._embedding: Any = model.get_input_embeddings()

    def embed(self, token: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            states: torch.Tensor = self._embedding(token.to(self.device)).to(self.work_dtype)
        return states


class HostOutput:
    """The model's own output matrix."""

    def __init__(self, module: Any) -> None:
        self._module, self.weight = module, module.weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._module(x.to(self.weight.dtype)).float()
        return logits

    def without_norm(self) -> HostOutput:
        """Here the norm is a module of its own."""
        return self

    def rows_of(self, index: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = self.weight.detach()[index.to(self.weight.device)]
        return rows


def load_host_head(model: PreTrainedModel, name: Any, trust_pickle: bool = False) -> HostHead:
    """The head in a folder, on the hub, or of a built-in model. Raises ConfigError, ModelError or
    DownloadError."""
    if not name:
        raise ConfigError(
            "method 'eagle' needs a head: give model=FOLDER, a hub id, or a built-in model such as "
            "'smollm2-135m'"
        )
    config, exact = host_config(model)
    folder = shipped_head(str(name)) or head_folder(name, trust_pickle)
    files = load_head(folder, config, trust_pickle)
    if layout_of(files) == "smart" and not exact:
        raise ModelError(
            f"the head in {folder} has the shape of its target's layers, which {type(model).__name__} "
            "has not: it was made for another model"
        )
    return HostHead(files, folder, model)


def host_config(model: PreTrainedModel) -> tuple[ModelConfig, bool]:
    """What a head must fit, and whether it is all that is to say of the model's layers."""
    text = model.config.get_text_config(decoder=True)
    try:
        return ModelConfig.from_hf(
            {**text.to_dict(), "architectures": [type(model).__name__]}
        ), True
    except ModelError:
        heads, hidden = int(text.num_attention_heads), int(text.hidden_size)
        positions = int(getattr(text, "max_position_embeddings", None) or 1 << 30)
        return ModelConfig(
            "llama",
            int(text.num_hidden_layers),
            hidden,
            heads,
            heads,
            hidden // heads,
            4 * hidden,
            int(text.vocab_size),
            10_000.0,
            1e-6,
            positions,
        ), False
