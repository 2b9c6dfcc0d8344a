"""Tiny random vision-language checkpoints of transformers' real classes, whole folders as the hub
has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from PIL import Image
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from smart_decoding.models.text.tokenizer import Tokenizer

TEXT: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 200,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
SPECIALS = ["<bos>", "<eos>", "<image>", "<video>", "<see>", "<seen>"]
BOS, EOS, IMAGE, VIDEO, SEE, SEEN = range(256, 262)
VOCAB = 272
LISTS = (  # as published templates of such models: contents are lists of parts
    "{% for m in messages %}{{ m['role'] }}: {% for p in m['content'] %}"
    "{% if p['type'] == 'text' %}{{ p['text'] }}"
    "{% elif p['type'] == 'video' %}<see><video><seen>"
    "{% else %}<see><image><seen>{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)
STRINGS = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)
NORMS = {
    "image_mean": [0.48, 0.46, 0.41],
    "image_std": [0.27, 0.26, 0.28],
    "do_rescale": True,
    "do_normalize": True,
}


def save_llava(folder: Path, template: str = STRINGS, **more: Any) -> transformers.PreTrainedModel:
    """LLaVA-1.5's layout: 16 positions an image. Returns transformers' model."""
    text = transformers.LlamaConfig(**TEXT, vocab_size=VOCAB, rms_norm_eps=1e-5)
    tower = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
        patch_size=7,
        initializer_factor=3.0,
    )
    config = transformers.LlavaConfig(
        text_config=text, vision_config=tower, image_token_index=IMAGE, image_seq_length=16, **more
    )
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 28},
        "do_resize": True,
        "do_center_crop": True,
        "crop_size": {"height": 28, "width": 28},
        "do_convert_rgb": True,
    }
    return _save(folder, transformers.LlavaForConditionalGeneration, config, processor, template)


def save_text(folder: Path) -> None:
    """A text model, without a tokenizer."""
    config = transformers.LlamaConfig(**TEXT, vocab_size=VOCAB, rms_norm_eps=1e-5)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def save_qwen2_vl(folder: Path, template: str = LISTS, **text: Any) -> transformers.PreTrainedModel:
    """Qwen2-VL's layout: a position for each 14 x 14 pixels. Returns transformers' model."""
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "vocab_size": VOCAB, "rope_parameters": rope, **text},
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 96,
            "num_heads": 2,
            "patch_size": 7,
            "initializer_range": 0.1,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=SEE,
        vision_end_token_id=SEEN,
        tie_word_embeddings=text.get("tie_word_embeddings", False),
    )
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": 28 * 28,
        "max_pixels": 84 * 84,
        "patch_size": 7,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }
    return _save(folder, transformers.Qwen2VLForConditionalGeneration, config, processor, template)


def _save(folder: Path, kind: Any, config: Any, processor: dict[str, Any], template: str) -> Any:
    torch.manual_seed(0)
    model = kind(config).float().eval()
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({**NORMS, **processor}))
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    Tokenizer(backend, {"bos_token": "<bos>", "eos_token": "<eos>"}, template).save(folder)
    return model


def picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    """Random blocks of colour."""
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)
