"""The vision part of a vision-language model: transformers' own vision tower and projector,
pictures in, rows out.

The language model of such a checkpoint is our decoder; this file finds its configuration and its
weights' names, too.
"""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smart_decoding.errors import ModelError
from smart_decoding.files import reading
from smart_decoding.models.checkpoints.weight_files import Weights
from smart_decoding.models.families.config import ModelConfig, check_shapes
from smart_decoding.models.families.reading import config_from_hf
from smart_decoding.progress import quiet_transformers

if TYPE_CHECKING:
    from smart_decoding.engine.media import Pixels

# Architecture: the parts of its checkpoint beside the language model's.
ARCHITECTURES = {
    "LlavaForConditionalGeneration": ("vision_tower", "multi_modal_projector"),
    "Qwen2VLForConditionalGeneration": ("visual",),
}
_TEXT_FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_vl_text": "Qwen2ForCausalLM",
}
_TOWERS = ("clip_vision_model", "siglip_vision_model", "qwen2_vl_vision")
CACHED = 32_768  # positions whose embeddings are kept for pictures that come again


@dataclass(frozen=True, slots=True)
class VisionFiles:
    """The vision part of a checkpoint. config: transformers'; names: the module's tensors ->
    the checkpoint's; weights: the checkpoint's tensors."""

    folder: Path
    config: Any
    names: Mapping[str, str]
    weights: Weights[Tensor]


class RenamedWeights(Weights[Tensor]):
    """Some of a checkpoint's tensors under other names."""

    def __init__(self, weights: Weights[Tensor], names: Mapping[str, str]) -> None:
        self._weights = weights
        self._names = names
        self.shapes = {name: weights.shapes[theirs] for name, theirs in names.items()}
        self.dtypes = {name: weights.dtypes[theirs] for name, theirs in names.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[self._names[name]]


def architecture_of(config: Mapping[str, Any]) -> str | None:
    """Return the architecture's name, if the contents of config.json are those of a vision-language
    model known here."""
    names = config.get("architectures") or [""]
    return names[0] if names[0] in ARCHITECTURES else None


def read_configs(folder: Path, generation: Mapping[str, Any] | None) -> tuple[ModelConfig, Any]:
    """Read the language model's shape, and transformers' configuration of the whole.

    Published configurations leave out what transformers takes for granted, so transformers reads
    them."""
    with quiet_transformers():
        from transformers import AutoConfig

        with reading(folder / "config.json"):
            config = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            text = config.text_config
            tower = config.vision_config.model_type
            of_text = text.to_dict()
    if text.model_type not in _TEXT_FAMILIES or tower not in _TOWERS:
        known = f"{', '.join(sorted(_TEXT_FAMILIES))} with {', '.join(_TOWERS)}"
        raise ModelError(
            f"a {text.model_type} behind a {tower} is not supported; supported: {known}"
        )
    given = {
        **of_text,
        "architectures": [_TEXT_FAMILIES[text.model_type]],
        "tie_word_embeddings": bool(config.tie_word_embeddings),
    }
    with reading(folder / "config.json"):
        return config_from_hf(given, generation), config


def split_names(found: Iterable[str], architecture: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return a checkpoint's tensors in two: the decoder's (our name -> theirs) and the vision
    part's, in both generations of names that transformers has written."""
    parts = ARCHITECTURES[architecture]
    text = {}
    vision = {}
    for name in found:
        plain = re.sub(
            r"^model\.(?=(language_model|vision_tower|multi_modal_projector|visual)\.)", "", name
        )
        if plain.startswith(tuple(f"{part}." for part in parts)):
            vision[plain] = name
        else:
            plain = re.sub(r"^language_model\.(?=(model|lm_head)\.)", "", plain)
            text[re.sub(r"^language_model\.", "model.", plain)] = name
    return text, vision


class VisionTower:
    """transformers' vision tower and projector in the target's dtype on its device."""

    def __init__(self, files: VisionFiles, dtype: torch.dtype, device: torch.device) -> None:
        with quiet_transformers():
            self._model = _module(files, dtype, device)
        self._dtype = dtype
        self._device = device
        self._cache: OrderedDict[bytes, Tensor] = OrderedDict()

    @torch.inference_mode()
    def encode_image(self, pixels: Pixels) -> Tensor:
        """[length, hidden] embeddings, kept for the next time."""
        key = pixels.key
        found = self._cache.get(key)
        if found is None:
            found = self._cache[key] = self._run(pixels)
        self._cache.move_to_end(key)
        while len(self._cache) > 1 and sum(map(len, self._cache.values())) > CACHED:
            self._cache.popitem(last=False)
        return found

    def forget(self) -> None:
        """Encode images anew that come again."""
        self._cache.clear()

    def _run(self, pixels: Pixels) -> Tensor:
        values = torch.from_numpy(pixels.values).to(self._device, self._dtype)
        if hasattr(self._model, "visual"):
            grid = torch.tensor([pixels.grid], device=self._device)
            if pixels.modality == "video":
                features = self._model.get_video_features(values, grid)
            else:
                features = self._model.get_image_features(values, grid)
        else:
            features = self._model.get_image_features(values[None])
        rows: Tensor = features.pooler_output[0]
        if len(rows) != pixels.length:
            raise ModelError(
                f"the vision tower gave {len(rows)} rows for a picture of {pixels.length} positions"
            )
        return rows.to(self._dtype)


def _module(files: VisionFiles, dtype: torch.dtype, device: torch.device) -> Any:
    """transformers' whole model without its language layers, holding the checkpoint's vision
    weights."""
    from transformers import AutoModel
    from transformers.initialization import no_init_weights

    config = copy.deepcopy(files.config)
    config.text_config.num_hidden_layers = 0
    config.text_config.vocab_size = 1
    config.text_config.pad_token_id = None
    with no_init_weights():
        build: Any = AutoModel.from_config
        model = build(config)
    del model.language_model
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    names = _fitted(files.names, expected)
    found = {name: files.weights.shapes[theirs] for name, theirs in names.items()}
    ignored = [name for name in names if name.endswith("position_ids")]
    check_shapes(str(files.folder), found, expected, ignored, "its vision part")
    model.load_state_dict({name: files.weights[names[name]] for name in expected})
    for weight in model.parameters():  # rotary frequencies, which are none, stay in float32
        weight.data = weight.data.to(dtype)
    return model.to(device).eval().requires_grad_(False)


def _fitted(names: Mapping[str, str], expected: Iterable[str]) -> dict[str, str]:
    """Return the names as the model has them: checkpoints written before transformers 5 have one
    more level in the tower's names, `vision_model`."""
    deeper = any(name.startswith("vision_tower.vision_model.") for name in expected)
    plain = {
        name.replace("vision_tower.vision_model.", "vision_tower."): theirs
        for name, theirs in names.items()
    }
    if not deeper:
        return plain
    return {
        name.replace("vision_tower.", "vision_tower.vision_model."): theirs
        for name, theirs in plain.items()
    }
