"""A draft head, published or ours, on a transformers model, whose layers it reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from smart_decoding.drafters.eagle import EagleDrafter
from smart_decoding.errors import ConfigError, ModelError
from smart_decoding.models.config import ModelConfig
from smart_decoding.models.eagle_head import EagleHead
from smart_decoding.models.head_export import layout_of
from smart_decoding.models.head_files import HeadFiles, head_folder, load_head
from smart_decoding.models.kernel_check import use_native
from smart_decoding.models.layers import Workspace
from smart_decoding.speculation import SCRATCH_PAGES, shipped_head

if TYPE_CHECKING:
    from smart_decoding.core.rule import TreeRule
    from smart_decoding.core.tree import DraftTrees, IntArray
    from smart_decoding.drafters.levels import Asked, Growth, Ranked
    from smart_decoding.engine.protocols import Drafter, Grown
    from smart_decoding.engine.rows import Rows
    from smart_decoding.models.features import Part

KERNEL_DTYPES = (torch.bfloat16, torch.float32)


class HostHead(EagleHead):
    """A head whose target is a transformers model.

    widest: children of a node that are proposed at most; 1 where the target takes chains only.
    folder: its own."""

    def __init__(self, files: HeadFiles, folder: Path, model: PreTrainedModel) -> None:
        if files.fused:  # transformers gives what the target's output matrix reads
            files = replace(files, aux_layers=(files.aux_layers[0] + 1,))
        super().__init__(files, HostWeights(files, model), 0, 0, 0)
        self.folder: Path | None = folder
        self.widest = 1 << 30

    def drafter(self, pages: int, positions: int) -> Drafter:
        """For one call, with room for keys in so many pages and for positions below `positions`."""
        self.allocate(pages + SCRATCH_PAGES, positions + 64)
        return EagleDrafter(self, pages, SCRATCH_PAGES)

    def first(self, rows: Rows, parts: Sequence[Part], last: IntArray, asked: Asked) -> Ranked:
        """The first level, of at most `widest` children."""
        return super().first(rows, parts, last, replace(asked, k=min(asked.k, self.widest)))

    def deeper(self, rows: Rows, above: IntArray, asked: Asked) -> Ranked:
        """A further level, of at most `widest` children."""
        return super().deeper(rows, above, replace(asked, k=min(asked.k, self.widest)))

    def grow(
        self, rule: TreeRule, given: DraftTrees, growth: Growth | None, parts: Sequence[Part]
    ) -> Grown:
        """A round in one call, of at most `widest` children of a node."""
        narrow = replace(rule, children=min(rule.children, self.widest))
        return super().grow(narrow, given, growth, parts)

    def check_length(self, max_length: int) -> None:
        """A head follows any text."""


class HostWeights:
    """What a head borrows of a transformers model (`TargetWeights`)."""

    final_norm: torch.Tensor | None = None
    embedding = None
    graphs = False  # each call has a cache of its own

    def __init__(self, files: HeadFiles, model: PreTrainedModel) -> None:
        self.config, _ = host_config(model)
        self.dtype = model.dtype
        self.workspace = Workspace()
        self.head = HostOutput(model.get_output_embeddings())  # type: ignore[no-untyped-call]
        self.device: torch.device = self.head.weight.device
        self.native = model.dtype in KERNEL_DTYPES and use_native(
            files.shape, self.device, allow_slow=True
        )
        self.work_dtype = torch.float32 if self.native else model.dtype
        self._embedding: Any = model.get_input_embeddings()

    def embed(self, token: torch.Tensor) -> torch.Tensor:
        """[n, hidden] in the working dtype."""
        with torch.inference_mode():  # a model in shards has its embeddings on another device
            states: torch.Tensor = self._embedding(token.to(self._embedding.weight.device))
            return states.to(self.device, self.work_dtype)


class HostOutput:
    """The model's own output matrix."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.weight = module.weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [n, vocab] in float32 for x [n, hidden]."""
        logits: torch.Tensor = self._module(x.to(self.weight.dtype)).float()
        return logits

    def without_norm(self) -> HostOutput:
        """Here the norm is a module of its own."""
        return self

    def rows_of(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of the weight: [n, hidden]."""
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
            f"the head in {folder} has the shape of its target's layers, "
            f"which {type(model).__name__} has not: it was made for another model"
        )
    return HostHead(files, folder, model)


def host_config(model: PreTrainedModel) -> tuple[ModelConfig, bool]:
    """What a head must fit, and whether it is all that is to say of the model's layers."""
    text = model.config.get_text_config(decoder=True)
    described = {**text.to_dict(), "architectures": [type(model).__name__]}
    try:
        return ModelConfig.from_hf(described), True
    except (ModelError, KeyError, TypeError, ValueError):  # another family's
        heads = int(text.num_attention_heads)
        hidden = int(text.hidden_size)
        config = ModelConfig(
            family="llama",
            layers=int(text.num_hidden_layers),
            hidden=hidden,
            heads=heads,
            kv_heads=heads,
            head_dim=hidden // heads,
            ffn=4 * hidden,
            vocab=int(text.vocab_size),
            rope_theta=10_000.0,
            rms_eps=1e-6,
            max_positions=int(getattr(text, "max_position_embeddings", None) or 1 << 30),
        )
        return config, False
