"""What LLaVA-1.5 and Qwen2-VL publish: configurations, names of tensors, chat templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from smart_decoding.models.families.vision import read_configs, split_names
from smart_decoding.models.text import chat_template

CLIP = {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}
VICUNA = {
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "rms_norm_eps": 1e-05,
    "torch_dtype": "float16",
    "vocab_size": 32064,
}
LLAVA: dict[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vision_config": CLIP,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
}
LARGER = {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 40,
}
QWEN2_VL: dict[str, Any] = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2_vl",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "mlp_ratio": 4,
        "num_heads": 16,
        "in_chans": 3,
        "hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}


@pytest.mark.parametrize(
    ("published", "shape"),
    [
        (
            {**LLAVA, "text_config": VICUNA},
            (32, 4096, 32, 32, 128, 11008, 32064, 10_000.0, 4096, (), False),
        ),
        (
            {**LLAVA, "text_config": {**VICUNA, **LARGER}},
            (40, 5120, 40, 40, 128, 13824, 32064, 1e4, 4096, (), False),
        ),
        (QWEN2_VL, (28, 3584, 28, 4, 128, 18944, 152064, 1_000_000.0, 32768, (16, 24, 24), True)),
    ],
)
def test_published_configurations(
    published: dict[str, Any], shape: tuple[Any, ...], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(published))
    c, whole = read_configs(tmp_path, {"eos_token_id": [7]})
    found = (
        c.layers,
        c.hidden,
        c.heads,
        c.kv_heads,
        c.head_dim,
        c.ffn,
        c.vocab,
        c.rope_theta,
        c.max_positions,
        c.mrope,
    )
    assert (*found, c.qkv_bias) == shape
    assert c.eos_token_ids == ((151645, 7) if c.mrope else (2, 7))
    assert c.windows == ()
    assert whole.vision_config.patch_size == 14


def test_both_generations_of_names_are_told_apart() -> None:
    old = [
        "language_model.model.layers.0.mlp.up_proj.weight",
        "language_model.lm_head.weight",
        "vision_tower.vision_model.post_layernorm.bias",
        "multi_modal_projector.linear_1.bias",
    ]
    new = [
        "model.language_model.layers.0.mlp.up_proj.weight",
        "lm_head.weight",
        "model.vision_tower.post_layernorm.bias",
        "model.multi_modal_projector.linear_1.bias",
    ]
    for names in (old, new):
        text, vision = split_names(names, "LlavaForConditionalGeneration")
        assert list(text) == ["model.layers.0.mlp.up_proj.weight", "lm_head.weight"]
        assert list(text.values()) == names[:2]
        assert [name.split(".")[0] for name in vision] == ["vision_tower", "multi_modal_projector"]
    for visual, norm in (("visual", "model.norm"), ("model.visual", "model.language_model.norm")):
        text, vision = split_names(
            [f"{visual}.merger.ln_q.bias", f"{norm}.weight"], "Qwen2VLForConditionalGeneration"
        )
        assert text == {"model.norm.weight": f"{norm}.weight"}
        assert list(vision) == ["visual.merger.ln_q.bias"]


LLAVA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def test_llavas_template_renders_what_training_marks() -> None:
    def said(role: str, *parts: dict[str, str]) -> dict[str, Any]:
        return {"role": role, "content": list(parts)}

    messages = [
        said("user", {"type": "text", "text": "What is it?"}, {"type": "image"}),
        said("assistant", {"type": "text", "text": "A cat."}),
        said("user", {"type": "text", "text": "Sure?"}),
    ]
    text = chat_template.render(LLAVA_TEMPLATE, messages, {"add_generation_prompt": True})
    assert text == "USER: <image>\nWhat is it? ASSISTANT: A cat. USER: Sure? ASSISTANT:"
