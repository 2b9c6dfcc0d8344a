"""Tiny random checkpoints in the very layouts that models are published in: the names and types of
their tensors, shards and index, every field of their configurations but sizes, their kinds of
tokenizer with the real numbers of special tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

LLAMA3_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": LLAMA3_ROPE,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}
LLAMA_31_8B = {
    **LLAMA,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_size": 64,  # 4096
    "intermediate_size": 96,  # 14336
    "num_attention_heads": 4,  # 32
    "num_hidden_layers": 2,  # 32
    "num_key_value_heads": 1,  # 8
    "transformers_version": "4.42.3",
}
LLAMA_33_70B = {
    **LLAMA_31_8B,
    "head_dim": 16,  # 128
    "hidden_size": 128,  # 8192
    "intermediate_size": 192,  # 28672
    "num_attention_heads": 8,  # 64
    "num_hidden_layers": 3,  # 80
    "transformers_version": "4.47.0.dev0",
}
LLAMA_GENERATION = {
    "bos_token_id": 128000,
    "do_sample": True,
    "eos_token_id": [128001, 128008, 128009],
    "temperature": 0.6,
    "top_p": 0.9,
    "transformers_version": "4.42.3",
}
R1_DISTILL = {
    **LLAMA_31_8B,
    "eos_token_id": 128001,
    "transformers_version": "4.43.0.dev0",
}
R1_GENERATION = {
    "_from_model_config": True,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.95,
    "transformers_version": "4.39.3",
}
VICUNA_13: dict[str, Any] = {  # no num_key_value_heads yet
    "_name_or_path": "vicuna-13b-v1.3",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 80,  # 5120
    "initializer_range": 0.02,
    "intermediate_size": 216,  # 13824
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": 5,  # 40
    "num_hidden_layers": 4,  # 40
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.28.1",
    "use_cache": True,
    "vocab_size": 32000,
}
VICUNA_15 = {
    **VICUNA_13,
    "_name_or_path": "vicuna-13b-v1.5",
    "max_length": 4096,
    "max_position_embeddings": 4096,
    "num_key_value_heads": 5,  # 40
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "transformers_version": "4.31.0",
}
VICUNA_13_GENERATION = {
    "_from_model_config": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "transformers_version": "4.28.1",
}
VICUNA_15_GENERATION = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_length": 4096,
    "pad_token_id": 0,
    "temperature": 0.9,
    "top_p": 0.6,
    "transformers_version": "4.31.0",
}
LLAVA_15: dict[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
        # published configurations leave these to transformers: the sizes of Llama-7B
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_hidden_layers": 2,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.36.0.dev0",
    "vision_config": {
        "hidden_size": 32,  # 1024
        "image_size": 28,  # 336
        "intermediate_size": 48,  # 4096
        "model_type": "clip_vision_model",
        "num_attention_heads": 2,  # 16
        "num_hidden_layers": 3,  # 24
        "patch_size": 7,  # 14
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
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
    "hidden_size": 128,  # 3584
    "initializer_range": 0.02,
    "intermediate_size": 192,  # 18944
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2_vl",
    "num_attention_heads": 1,  # 28, of 128 dimensions too
    "num_hidden_layers": 2,  # 28
    "num_key_value_heads": 1,  # 4
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 2,  # 32
        "embed_dim": 32,  # 1280
        "mlp_ratio": 4,
        "num_heads": 2,  # 16
        "in_chans": 3,
        "hidden_size": 128,  # 3584
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 152064,
}
QWEN2_VL_GENERATION = {
    "bos_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "pad_token_id": 151643,
    "repetition_penalty": 1.0,
    "temperature": 0.1,
    "top_k": 1,
    "top_p": 0.001,
    "transformers_version": "4.45.0.dev0",
}

# Tokenizers: byte-level vocabularies of the published sizes, all but 256 of their tokens fillers.
# ------------------------------------------------------------------------------------------
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace("{1,3}", "")
LLAMA3_SPECIALS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(3, 248)),
]
WIDE_BAR = "\uff5c"  # of DeepSeek's special tokens
R1_SPECIALS = [
    f"<{WIDE_BAR}begin▁of▁sentence{WIDE_BAR}>",
    f"<{WIDE_BAR}end▁of▁sentence{WIDE_BAR}>",
    *LLAMA3_SPECIALS[2:11],
    f"<{WIDE_BAR}User{WIDE_BAR}>",
    f"<{WIDE_BAR}Assistant{WIDE_BAR}>",
    "<think>",
    "</think>",
    f"<{WIDE_BAR}▁pad▁{WIDE_BAR}>",
    *LLAMA3_SPECIALS[16:],
]
QWEN2_SPECIALS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|{part}_{end}|>" for part in ("object_ref", "box", "quad") for end in ("start", "end")),
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
LLAMA3_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
R1_TEMPLATE = (
    "{% if not add_generation_prompt is defined %}"
    "{% set add_generation_prompt = false %}{% endif %}"
    "{{ bos_token }}{%- for message in messages %}{%- if message['role'] == 'user' %}"
    "{{- '<|User|>' + message['content'] }}{%- endif %}"
    "{%- if message['role'] == 'assistant' %}{% set content = message['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{- '<|Assistant|>' + content + '<|end▁of▁sentence|>' }}{%- endif %}{%- endfor -%}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"
).replace("|", WIDE_BAR)
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
QWEN2_VL_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CLIP_NORMS = {
    "do_normalize": True,
    "do_rescale": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "rescale_factor": 0.00392156862745098,
}
MERGES = [
    "th",
    "he",
    "in",
    "er",
    "on",
    "▁t",
    "▁the",
    "▁A",
    "▁U",
    "US",
    "▁US",
    "ER",
    "▁USER",
    "USER",
]


def token(text: str) -> dict[str, Any]:
    """As slow tokenizers of transformers 4 wrote them."""
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    return {"__type": "AddedToken", "content": text, **flags}


def byte_level(split: str, size: int, specials: Iterable[str], bos: str | None) -> Any:
    """A byte-level tokenizer: `size` plain tokens, then the special ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: i for i, text in enumerate([*letters, *(f"f{i}" for i in range(256, size))])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in specials])
    if bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return backend


def save_llama3(folder: Path) -> None:
    bos = LLAMA3_SPECIALS[0]
    backend = byte_level(LLAMA3_SPLIT, 128_000, LLAMA3_SPECIALS, bos)
    backend.save(str(folder / "tokenizer.json"))
    names = {"bos_token": bos, "eos_token": "<|eot_id|>"}
    write(folder / "special_tokens_map.json", names)
    config = {
        **names,
        "chat_template": LLAMA3_TEMPLATE,
        "clean_up_tokenization_spaces": True,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 131072,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write(folder / "tokenizer_config.json", config)


def save_r1(folder: Path) -> None:
    bos, eos = R1_SPECIALS[:2]
    backend = byte_level(LLAMA3_SPLIT, 128_000, R1_SPECIALS, None)  # its class alone says so
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": token(bos),
        "clean_up_tokenization_spaces": False,
        "eos_token": token(eos),
        "legacy": True,
        "model_max_length": 16384,
        "pad_token": token(eos),
        "sp_model_kwargs": {},
        "unk_token": None,
        "tokenizer_class": "LlamaTokenizerFast",
        "chat_template": R1_TEMPLATE,
    }
    write(folder / "tokenizer_config.json", config)


def pieces() -> list[str]:
    """32,000 of a SentencePiece model: specials, bytes, merges, letters and fillers."""
    found = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    found += [*MERGES, "▁", *map(chr, range(33, 127))]
    return found + [chr(0x4E00 + i) for i in range(32_000 - len(found))]


def save_sentencepiece(folder: Path, legacy: bool | None = None) -> None:
    """Nothing but tokenizer.model, as Vicuna's. legacy: as the file says it; None: it does not."""
    from sentencepiece import sentencepiece_model_pb2 as protos

    model = protos.ModelProto()
    for i, text in enumerate(pieces()):
        kind = 2 if i == 0 else 3 if i < 3 else 6 if i < 259 else 1
        model.pieces.add(piece=text, score=-max(0.0, i - 258.0), type=kind)
    model.trainer_spec.model_type = 2  # BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.vocab_size = 32_000
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write(folder / "special_tokens_map.json", {**names, "pad_token": "<unk>"})
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        **{name: token(text) for name, text in names.items()},
        "clean_up_tokenization_spaces": False,
        **({} if legacy is None else {"legacy": legacy}),
        "model_max_length": 2048 if legacy is None else 4096,
        "pad_token": None,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
    }
    write(folder / "tokenizer_config.json", config)


def save_llava(folder: Path) -> None:
    vocab = {text: i for i, text in enumerate(pieces())}
    merges = [pair for text in MERGES for pair in halves(text, vocab)]
    model = models.BPE(
        vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"
    )
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>", "<image>", "<pad>"])
    backend.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    write(folder / "special_tokens_map.json", names)
    write(folder / "added_tokens.json", {"<image>": 32000, "<pad>": 32001})
    config = {**names, "legacy": False, "tokenizer_class": "LlamaTokenizer"}
    write(folder / "tokenizer_config.json", config)
    write(folder / "chat_template.json", {"chat_template": LLAVA_TEMPLATE})
    sizes = {"patch_size": 7, "vision_feature_select_strategy": "default"}
    write(folder / "processor_config.json", {"processor_class": "LlavaProcessor", **sizes})
    picture = {
        "crop_size": {"height": 28, "width": 28},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_resize": True,
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "resample": 3,
        "size": {"shortest_edge": 28},
    }
    write(folder / "preprocessor_config.json", {**CLIP_NORMS, **picture})


def halves(text: str, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """All ways to put a token together of two others."""
    cuts = [(text[:i], text[i:]) for i in range(1, len(text))]
    return [pair for pair in cuts if pair[0] in vocab and pair[1] in vocab]


def save_qwen2_vl(folder: Path) -> None:
    backend = byte_level(QWEN2_SPLIT, 151_643, QWEN2_SPECIALS, None)
    backend.normalizer = normalizers.NFC()
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "add_prefix_space": False,
        "bos_token": None,
        "chat_template": QWEN2_VL_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "padding_side": "left",
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    write(folder / "tokenizer_config.json", config)
    write(folder / "chat_template.json", {"chat_template": QWEN2_VL_TEMPLATE})
    picture = {
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
    }
    write(folder / "preprocessor_config.json", {**CLIP_NORMS, **picture})


# Checkpoints
# ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How a model is published. weights: the name of its files, {} the number of the shard;
    renamed: transformers' names of today -> those of its files, by prefix."""

    config: dict[str, Any]
    generation: dict[str, Any] | None
    tokenizer: Callable[[Path], None]
    shards: int
    weights: str
    renamed: dict[str, str] = field(default_factory=dict)

    @property
    def pickled(self) -> bool:
        return self.weights.endswith(".bin")


LAYOUTS = {
    "Llama-3.1-8B-Instruct": Layout(
        LLAMA_31_8B, LLAMA_GENERATION, save_llama3, 4, "model-{:05d}-of-00004.safetensors"
    ),
    "Llama-3.3-70B-Instruct": Layout(
        LLAMA_33_70B, LLAMA_GENERATION, save_llama3, 30, "model-{:05d}-of-00030.safetensors"
    ),
    "DeepSeek-R1-Distill-Llama-8B": Layout(
        R1_DISTILL, R1_GENERATION, save_r1, 2, "model-{:05d}-of-000002.safetensors"
    ),
    "vicuna-13b-v1.3": Layout(
        VICUNA_13, VICUNA_13_GENERATION, save_sentencepiece, 3, "pytorch_model-{:05d}-of-00003.bin"
    ),
    "vicuna-13b-v1.5": Layout(
        VICUNA_15,
        VICUNA_15_GENERATION,
        lambda folder: save_sentencepiece(folder, False),
        3,
        "pytorch_model-{:05d}-of-00003.bin",
    ),
    "llava-1.5-7b-hf": Layout(
        LLAVA_15,
        {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32001},
        save_llava,
        3,
        "model-{:05d}-of-00003.safetensors",
        {
            "model.language_model.": "language_model.model.",
            "lm_head.": "language_model.lm_head.",
            "model.vision_tower.": "vision_tower.vision_model.",
            "model.multi_modal_projector.": "multi_modal_projector.",
        },
    ),
    "Qwen2-VL-7B-Instruct": Layout(
        QWEN2_VL,
        QWEN2_VL_GENERATION,
        save_qwen2_vl,
        5,
        "model-{:05d}-of-00005.safetensors",
        {"model.language_model.": "model.", "model.visual.": "visual."},
    ),
}


def save_published(name: str, folder: Path) -> Layout:
    """Writes a checkpoint of random weights in the layout of that model."""
    layout = LAYOUTS[name]
    folder.mkdir(parents=True)
    write(folder / "config.json", layout.config)
    if layout.generation is not None:
        write(folder / "generation_config.json", layout.generation)
    layout.tokenizer(folder)
    _save_weights(layout, folder, random_weights(layout, folder))
    return layout


def random_weights(layout: Layout, folder: Path) -> dict[str, torch.Tensor]:
    """By the names of the files, large enough for answers to differ, biases and norms included."""
    torch.manual_seed(0)
    kind = getattr(transformers, layout.config["architectures"][0])
    model = kind(transformers.AutoConfig.from_pretrained(folder))
    dtype = getattr(torch, layout.config["torch_dtype"])
    weights = {}
    for name, weight in model.state_dict().items():
        random = torch.randn_like(weight, dtype=torch.float32) * (0.15 if weight.ndim > 1 else 0.1)
        random += 1.0 if "norm" in name and name.endswith("weight") else 0.0
        weights[_published(name, layout.renamed)] = random.to(dtype)
    if layout.pickled:  # transformers 4.28 to 4.31 stored them
        for i in range(layout.config["num_hidden_layers"]):
            inverse = 10_000.0 ** -(torch.arange(0, 16, 2) / 16)
            weights[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = inverse
    return weights


def _published(name: str, renamed: Mapping[str, str]) -> str:
    for ours, theirs in renamed.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def _save_weights(layout: Layout, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """In shards, in the order of the names, with an index that lists them."""
    names = list(weights)
    weight_map = {}
    for i in range(layout.shards):
        part = {name: weights[name] for name in names[i :: layout.shards]}
        file = layout.weights.format(i + 1)
        weight_map.update(dict.fromkeys(part, file))
        if layout.pickled:
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, metadata={"format": "pt"})
    stem, _, end = layout.weights.partition("-")
    total = sum(weight.nbytes for weight in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write(folder / f"{stem}.{end.rpartition('.')[2]}.index.json", index)


def write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
