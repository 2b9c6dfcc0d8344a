"""A draft head, published or ours, on a transformers model, whose layers it reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from smart_decoding.drafters.eagle import EagleDrafter
from smart_decoding.errors import ConfigError, ModelError
from smart_decoding.kernels.weights import PackedWeight, pack
from smart_decoding.models.checkpoints.registry import shipped_head
from smart_decoding.models.cpu.kernel_check import use_native
from smart_decoding.models.families.config import ModelConfig
from smart_decoding.models.families.reading import config_from_hf
from smart_decoding.models.heads.eagle_head import EagleHead
from smart_decoding.models.heads.export import layout_of
from smart_decoding.models.heads.files import HeadFiles, head_path, load_head
from smart_decoding.models.torch.torch_layers import Linear
from smart_decoding.speculation import SCRATCH_PAGES

if TYPE_CHECKING:
    from smart_decoding.engine.protocols import Drafter

KERNEL_DTYPES = (torch.bfloat16, torch.float32)


class HostHead(EagleHead):
    """A head whose target is a transformers model. folder: its own."""

    def __init__(self, files: HeadFiles, folder: Path, model: PreTrainedModel) -> None:
        if files.fused:  # transformers' last state is after the final norm
            files = replace(files, aux_layers=(files.aux_layers[0] + 1,))
        super().__init__(files, HostWeights(files, model), 0, 0, 0)
        self.folder: Path | None = folder

    def drafter(self, pages: int, positions: int, tree: bool) -> Drafter:
        """Return a drafter for one call, with room for keys in so many pages and for positions
        below `positions`."""
        self.allocate(pages + SCRATCH_PAGES, positions + 64)
        drafter = EagleDrafter(self, pages, SCRATCH_PAGES)
        if not tree:
            drafter.widest = 1
        return drafter

    def check_length(self, max_length: int) -> None:
        """Do nothing: a head follows any text."""


class HostWeights:
    """The weights that a head shares with a transformers model (`TargetWeights`)."""

    final_norm: torch.Tensor | None = None
    graphs = False  # each call has a cache of its own
    quantized = False  # its weights are torch's

    def __init__(self, files: HeadFiles, model: PreTrainedModel) -> None:
        self.config, _ = host_config(model)
        self.dtype = model.dtype
        self._embedding: Any = model.get_input_embeddings()
        output: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        weight = output.weight.detach().to(self.dtype)
        bias = getattr(output, "bias", None)
        bias = None if bias is None else bias.detach().to(self.dtype)
        self.device: torch.device = weight.device
        # the kernels rank an EAGLE-1/2 head's logits only without a bias
        has_kernels = self.dtype in KERNEL_DTYPES and (bias is None or not files.fused)
        self.native = has_kernels and use_native(files.shape, self.device, allow_slow=True)
        self.work_dtype = torch.float32 if self.native else self.dtype
        packs = self.native and files.fused
        self.head: Linear | PackedWeight = pack([weight]) if packs else Linear(weight, bias)

    @property
    def embedding(self) -> torch.Tensor:
        """[vocab, hidden] as the model computes them: some scale what they look up."""
        table: torch.Tensor = self._embedding.weight.detach()
        if type(self._embedding) is not torch.nn.Embedding or table.device != self.device:
            table = self.embed(torch.arange(len(table)))
        return table.to(self.dtype).contiguous()

    def embed(self, token: torch.Tensor) -> torch.Tensor:
        """[n, hidden] in the working dtype."""
        with torch.inference_mode():  # a model in shards has its embeddings on another device
            states: torch.Tensor = self._embedding(token.to(self._embedding.weight.device))
            return states.to(self.device, self.work_dtype)


def load_host_head(model: PreTrainedModel, name: Any, trust_pickle: bool = False) -> HostHead:
    """Return the head in a folder, on the hub, or of a built-in model. Raises ConfigError,
    ModelError or DownloadError."""
    if not name:
        raise ConfigError(
            "method 'eagle' needs a head: give model=FOLDER, a hub id, or a built-in model such as "
            "'smollm2-135m'"
        )
    config, exact = host_config(model)
    folder = shipped_head(str(name)) or head_path(name, trust_pickle)
    files = load_head(folder, config, trust_pickle)
    if layout_of(files) == "smart" and not exact:
        raise ModelError(
            f"the head in {folder} has the shape of its target's layers, "
            f"which {type(model).__name__} has not: it was made for another model"
        )
    return HostHead(files, folder, model)


def host_config(model: PreTrainedModel) -> tuple[ModelConfig, bool]:
    """Return the config that a head must fit, and whether it describes the layers exactly."""
    text = model.config.get_text_config(decoder=True)
    described = {**text.to_dict(), "architectures": [type(model).__name__]}
    try:
        return config_from_hf(described), True
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
