"""gpt-oss: experts in MXFP4 and in stacks, answers as in transformers, what ends an answer, and
what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from smart_decoding.core.tree import DraftTrees
from smart_decoding.engine.rows import Span, build_rows
from smart_decoding.kernels.weights import QuantizedTensor, as_tensor
from smart_decoding.models.checkpoints.loading import load_checkpoint
from smart_decoding.models.checkpoints.memory import parameters, weight_bytes
from smart_decoding.models.cpu.kernel_check import unserved
from smart_decoding.models.families.decoder import Decoder
from smart_decoding.models.families.reading import config_from_gguf, config_from_hf, config_to_hf
from smart_decoding.models.text.tokenizer import Tokenizer

from .test_loading import (
    assert_answers_alike,
    assert_refused,
    change_config,
    change_weights,
    of_each_expert,
    own_cache,  # noqa: F401  # for each test here, too
    tiny_model,
    write_gguf,
)

if TYPE_CHECKING:
    from smart_decoding.models.families.config import ModelConfig

CPU = torch.device("cpu")
STACKS = ("gate_up_proj", "down_proj")


def in_mxfp4(folder: Path) -> transformers.PreTrainedModel:
    """Writes a tiny model with random experts in MXFP4, as OpenAI publishes it. Returns
    transformers' model of these weights, expanded by transformers itself."""
    model = tiny_model("gpt-oss").eval()
    model.save_pretrained(folder)
    rng = np.random.default_rng(0)
    blocks: dict[str, torch.Tensor] = {}
    for number, layer in enumerate(model.model.layers):
        for name in STACKS:
            stack = getattr(layer.mlp.experts, name)
            count, inputs, outputs = stack.shape
            shape = (count, outputs, inputs // 32)
            packed = torch.from_numpy(rng.integers(0, 256, (*shape, 16), np.uint8))
            scales = torch.from_numpy(rng.integers(122, 128, shape, np.uint8))
            stack.data = convert_moe_packed_tensors(packed, scales).float()
            published = f"model.layers.{number}.mlp.experts.{name}"
            blocks |= {f"{published}_blocks": packed, f"{published}_scales": scales}
    weights = load_file(folder / "model.safetensors")
    kept = {name: w for name, w in weights.items() if not name.endswith(STACKS)}
    save_file(kept | blocks, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(folder, quantization_config={"quant_method": "mxfp4"})
    return model


@pytest.mark.parametrize("quantization", [None, "off"])
def test_mxfp4_is_read_as_transformers_reads_it(quantization: str | None, tmp_path: Path) -> None:
    expected = of_each_expert(in_mxfp4(tmp_path).state_dict())
    checkpoint = load_checkpoint(tmp_path, quantization=quantization)
    assert set(checkpoint.weights) == set(expected)
    quants = set()
    for name, weight in checkpoint.weights.items():
        if isinstance(weight, QuantizedTensor):
            quants.add(name)
        assert torch.equal(as_tensor(weight).float(), expected[name]), name
    matrices = {name for name in expected if "experts." in name and name.endswith("weight")}
    assert quants == (matrices if quantization is None else set())


def test_the_estimate_of_mxfp4_is_what_is_read(tmp_path: Path) -> None:
    in_mxfp4(tmp_path)
    stored = load_checkpoint(tmp_path, quantization=None)
    size = sum(
        weight.rows.nbytes if isinstance(weight, QuantizedTensor) else 2 * weight.numel()
        for weight in stored.weights.values()
    )
    assert stored.weights.nbytes == size  # type: ignore[attr-defined]
    expanded = load_checkpoint(tmp_path)
    assert weight_bytes(stored, torch.bfloat16, CPU) == size
    for checkpoint in (stored, expanded):
        assert weight_bytes(checkpoint, torch.float32, CPU) == 4 * parameters(checkpoint.config)
    assert expanded.weights.nbytes == 2 * parameters(expanded.config)  # type: ignore[attr-defined]


def test_matrices_in_mxfp4_are_rounded_again_where_that_is_asked_for(tmp_path: Path) -> None:
    in_mxfp4(tmp_path)
    rounded = load_checkpoint(tmp_path, quantization="int8").weights
    for name in ("self_attn.q_proj", "mlp.experts.3.up_proj"):
        assert isinstance(matrix := rounded[f"model.layers.0.{name}.weight"], QuantizedTensor)
        assert matrix.format == "Q8_0"
    assert not isinstance(rounded["model.layers.0.mlp.gate.weight"], QuantizedTensor)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("source", ["folder", "mxfp4", "tiny.gguf"])
def test_answers_are_those_of_transformers(source: str, native: bool, tmp_path: Path) -> None:
    model = tiny_model("gpt-oss").eval()
    if source == "tiny.gguf":
        write_gguf(tmp_path / source, "gpt-oss")
    elif source == "mxfp4":
        model = in_mxfp4(tmp_path / source)
    else:
        model.save_pretrained(tmp_path / source)
    assert_answers_alike(load_checkpoint(tmp_path / source), model, native)


def test_the_kernels_compute_with_mxfp4_as_with_expanded_weights(tmp_path: Path) -> None:
    in_mxfp4(tmp_path)
    span = Span(list(range(5, 85)), 0, np.arange(80, dtype=np.int32), np.arange(16, dtype=np.int32))
    rows, _, _ = build_rows([span], DraftTrees.empty(1), [True])
    rows.logit_rows = None
    found = []
    for quantization in (None, "off"):
        checkpoint = load_checkpoint(tmp_path, quantization=quantization)
        decoder = Decoder(checkpoint.config, checkpoint.weights, torch.bfloat16, CPU, 16, 128, True)
        assert decoder.quantized == (quantization is None)
        found.append(decoder.forward(rows).logits.clone())
    assert torch.equal(found[0], found[1])
    assert found[0].isfinite().all()


def test_ollamas_files_are_those_of_llama_cpp_under_other_names(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", "gpt-oss")
    write_gguf(tmp_path / "ollama.gguf", "gpt-oss", architecture="gptoss")
    wanted, found = (load_checkpoint(tmp_path / f"{name}.gguf") for name in ("tiny", "ollama"))
    assert found.config == wanted.config
    assert set(found.weights) == set(wanted.weights)
    for name, weight in wanted.weights.items():
        assert torch.equal(as_tensor(found.weights[name]), as_tensor(weight)), name
    assert Tokenizer.load(found.tokenizer_source).encode("he<|eos|>") == [259, 2]


def test_ollamas_first_files_are_refused(tmp_path: Path) -> None:
    """Gate and up alternate in one tensor, and the numbers of a block lie in another order."""
    writer = gguf.GGUFWriter(tmp_path / "old.gguf", "gptoss")
    writer.add_tensor("blk.0.ffn_gate_up_exps.weight", np.zeros((4, 128, 32), np.float32))
    for key, value in METADATA.items():
        if isinstance(value, float):
            writer.add_float32(key.replace("gpt-oss", "gptoss"), value)
        elif isinstance(value, int):
            writer.add_uint32(key.replace("gpt-oss", "gptoss"), value)
    writer.add_token_list(METADATA["tokenizer.ggml.tokens"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_refused(tmp_path / "old.gguf", "blk.0.ffn_gate_up_exps.weight")


TOKENS = ["a", "<|end|>", "<|return|>", "<|endoftext|>", "<|call|>", "<|start|>"]
METADATA = {  # of gpt-oss-20b what llama.cpp's converter writes
    "general.architecture": "gpt-oss",
    "gpt-oss.block_count": 24,
    "gpt-oss.embedding_length": 2880,
    "gpt-oss.feed_forward_length": 2880,
    "gpt-oss.expert_feed_forward_length": 2880,
    "gpt-oss.expert_count": 32,
    "gpt-oss.expert_used_count": 4,
    "gpt-oss.attention.head_count": 64,
    "gpt-oss.attention.head_count_kv": 8,
    "gpt-oss.attention.key_length": 64,
    "gpt-oss.attention.layer_norm_rms_epsilon": 1e-5,
    "gpt-oss.attention.sliding_window": 128,
    "gpt-oss.context_length": 131_072,
    "gpt-oss.rope.freq_base": 150_000.0,
    "gpt-oss.rope.scaling.type": "yarn",
    "gpt-oss.rope.scaling.factor": 32.0,
    "gpt-oss.rope.scaling.original_context_length": 4096,
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.eos_token_id": 2,
}
HF_20B: dict[str, Any] = {  # its config.json
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "eos_token_id": 2,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131_072,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "quantization_config": {
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150_000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": len(TOKENS),
}


def from_gguf(**changes: Any) -> ModelConfig:
    """Changes: of the metadata, None: it is not there."""
    metadata = METADATA | changes
    there = {key: value for key, value in metadata.items() if value is not None}
    return config_from_gguf(there, ["output.weight"])


def test_the_published_configuration_is_read() -> None:
    config = config_from_hf(HF_20B, {"eos_token_id": [2, 3, 4]})
    assert config.windows == (128, 0) * 12
    assert (config.qkv_bias, config.o_bias, config.sinks, config.qk_norm) == (True,) * 3 + (False,)
    frequencies, factor = config.inverse_frequencies()
    assert factor == pytest.approx(1.3466, abs=1e-4)
    kept = 150_000.0 ** -(np.arange(32) / 32)
    np.testing.assert_allclose(frequencies[:9], kept[:9])
    np.testing.assert_allclose(frequencies[18:], kept[18:] / 32)
    shapes = config.expected_shapes()
    assert shapes["model.layers.23.self_attn.sinks"] == (64,)
    assert shapes["model.layers.0.mlp.experts.31.down_proj.bias"] == (2880,)
    assert parameters(replace(config, vocab=201_088)) == 20_914_757_184, "as published"
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config


def test_a_gguf_file_says_the_same_as_config_json() -> None:
    """But for the ramp of YaRN, which llama.cpp rounds: this follows transformers."""
    wanted = config_from_hf(HF_20B, {"eos_token_id": [2, 3, 4]})
    found = from_gguf()
    for config in (found, from_gguf(**{"gpt-oss.rope.scaling.type": None})):
        assert config.inverse_frequencies()[1] == wanted.inverse_frequencies()[1]
        np.testing.assert_array_equal(
            config.inverse_frequencies()[0], wanted.inverse_frequencies()[0]
        )
    assert replace(found, rope_scaling=wanted.rope_scaling) == wanted


def test_the_end_of_a_message_does_not_end_an_answer() -> None:
    assert from_gguf().eos_token_ids == (2, 3, 4)
    named = {"tokenizer.ggml.eos_token_id": 3, "tokenizer.ggml.eot_token_id": 1}
    assert from_gguf(**named).eos_token_ids == (3, 2, 4), "even where a file names it"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention_bias": False}, ["attention_bias = False"]),
        ({"swiglu_limit": 5.0}, ["swiglu_limit = 5.0", "7.0"]),
        ({"swiglu_alpha": 1.0}, ["swiglu_alpha = 1.0", "1.702"]),
        ({"hidden_act": "gelu"}, ["hidden_act = 'gelu'"]),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, ["'bitsandbytes'"]),
        ({"num_experts_per_tok": 5}, ["5 of 4 experts"]),
        ({"num_local_experts": 5}, ["mlp.gate.weight", "(4, 32)", "(5, 32)"]),
        ({"intermediate_size": 48}, ["mlp.experts.0.gate_proj.weight", "(64, 32)", "(48, 32)"]),
        ({"architectures": ["Qwen3ForCausalLM"]}, ["num_local_experts = 4", "Qwen3ForCausalLM"]),
    ],
)
def test_what_is_not_computed_is_refused_by_name(
    changes: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    tiny_model("gpt-oss").save_pretrained(tmp_path)
    change_config(tmp_path, **changes)
    assert_refused(tmp_path, *words)


@pytest.mark.parametrize(
    ("end", "tensor", "words"),
    [
        ("_blocks", torch.zeros(4, 32, 2, 8).byte(), ["down_proj_blocks", "(4, 32, 2, 8)"]),
        ("_blocks", torch.zeros(4, 32, 2, 16), ["down_proj_blocks", "bytes"]),
        ("_blocks", None, ["experts.0.down_proj.weight"]),
        ("_scales", torch.zeros(4, 32, 1).byte(), ["down_proj_scales", "(4, 32, 1)"]),
        ("_scales", None, ["has no", "down_proj_scales"]),
        ("_bias", torch.zeros(4), ["down_proj_bias", "(4,)"]),
        ("_bias", None, ["experts.0.down_proj.bias"]),
    ],
)
def test_stacks_of_other_shapes_are_refused_by_name(
    end: str, tensor: torch.Tensor | None, words: list[str], tmp_path: Path
) -> None:
    in_mxfp4(tmp_path)

    def change(weights: dict[str, torch.Tensor]) -> None:
        del weights[f"model.layers.0.mlp.experts.down_proj{end}"]
        if tensor is not None:
            weights[f"model.layers.0.mlp.experts.down_proj{end}"] = tensor

    change_weights(tmp_path, change)
    assert_refused(tmp_path, *words)


def test_bytes_are_no_weights_of_other_families(tmp_path: Path) -> None:
    tiny_model("llama3").save_pretrained(tmp_path)
    name = "model.layers.0.mlp.experts.down_proj_blocks"
    change_weights(tmp_path, lambda w: w.update({name: torch.zeros(2, 2, dtype=torch.uint8)}))
    assert_refused(tmp_path, name)


def test_the_cpu_kernels_serve_its_shape() -> None:
    assert unserved(config_from_hf(HF_20B)) is None
