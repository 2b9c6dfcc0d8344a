"""EAGLE-3 heads that people have, in the layouts that they are published in: names and types of
tensors, every field of their configurations but sizes. Their targets are tiny models of the
families that they were trained for.

Sources: configurations and converters in Tencent/AngelSlim, sgl-project/SpecForge, vLLM's
speculators 0.9 and llama.cpp, read in December 2026. The files themselves were not at hand."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from torch import Tensor

from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.errors import ModelError
from smart_decoding.kernels import library
from smart_decoding.llm import LLM
from smart_decoding.models.checkpoints.loading import load_checkpoint
from smart_decoding.models.cpu import kernel_check
from smart_decoding.models.families.decoder import Decoder
from smart_decoding.models.heads.eagle_head import EagleHead
from smart_decoding.models.heads.export import write_head
from smart_decoding.models.heads.files import load_head
from smart_decoding.training.head import form_of

from .reference_head import (
    PAGES,
    SCRATCH,
    Drafting,
    ReferenceHead,
    eagle3_tensors,
    random,
    write,
)

LAYERS, VOCAB, DRAFT = 8, 97, 40
PROMPTS = [np.random.default_rng(n).integers(0, VOCAB, 20 + n).tolist() for n in range(3)]
DEFAULT = (2, LAYERS // 2, LAYERS - 3)
CPU = torch.device("cpu")

COMMON: dict[str, Any] = {
    "num_hidden_layers": LAYERS,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 80,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
TARGETS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {}),
    "qwen3": (transformers.Qwen3Config, {"tie_word_embeddings": True}),
    "qwen3 of 160": (transformers.Qwen3Config, {"hidden_size": 160, "tie_word_embeddings": True}),
    "qwen3 of experts": (
        transformers.Qwen3MoeConfig,
        {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
        | {"norm_topk_prob": True},
    ),
    "gpt-oss": (
        transformers.GptOssConfig,
        {"num_local_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 40}
        | {"sliding_window": 12},
    ),
}


@functools.cache
def target_model(name: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config_class, own = TARGETS[name]
    config = config_class(**{**COMMON, **own})
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    return model


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a target, by its name in TARGETS."""

    @functools.cache
    def saved(name: str) -> Path:
        folder = tmp_path_factory.mktemp("target")
        target_model(name).save_pretrained(folder)
        words = tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0")
        tokenizers.Tokenizer(words).save(str(folder / "tokenizer.json"))
        return folder

    return saved


@dataclass(frozen=True)
class Known:
    """A published head. layers: of whose inputs it reads; the target's number of layers is the
    input of its last norm. normed: its residual is the normed features."""

    target: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    layers: tuple[int, ...] = DEFAULT
    normed: bool = False
    pickled: bool = False


# what all of them have, of Llama's layer
LAYER: dict[str, Any] = {
    "hidden_act": "silu",
    "hidden_size": 64,  # 2048 to 4096
    "initializer_range": 0.02,
    "intermediate_size": 96,  # 6144 to 17280
    "num_attention_heads": 4,  # 16 to 64
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,  # 8
    "use_cache": True,
    "vocab_size": VOCAB,  # 128256 to 201088
}
# angelslim/compressor/speculative/train/configs/qwen3-1.7b-eagle3.json
ANGELSLIM: dict[str, Any] = {
    **LAYER,
    "architectures": ["Eagle3LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 32,  # 128
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "transformers_version": "4.51.0",
    "use_sliding_window": False,
    "draft_vocab_size": DRAFT,  # 32000
}
ANGELSLIM_4B = {
    **ANGELSLIM,
    "architectures": ["LlamaForCausalLMEagle3"],
    "head_dim": 80,
    "hidden_size": 160,  # 2560
    "num_attention_heads": 2,  # 32
    "num_key_value_heads": 1,  # 8
}
ANGELSLIM_8B = {**ANGELSLIM, "max_window_layers": 36, "tie_word_embeddings": False}
YUHUILI: dict[str, Any] = {  # EAGLE3-LLaMA3.1-Instruct-8B: no head_dim, no rope_theta
    **LAYER,
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.28.1",
    "draft_vocab_size": DRAFT,  # 32000
}
LLAMA_LAYER: dict[str, Any] = {
    **LAYER,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 32,  # 64
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 150000,
    "tie_word_embeddings": False,
}
REDHAT: dict[str, Any] = {  # gpt-oss-20b-speculator.eagle3
    "architectures": ["Eagle3Speculator"],
    "auto_map": {"": "eagle3.Eagle3SpeculatorConfig"},
    "draft_vocab_size": DRAFT,
    "dtype": "bfloat16",
    "eagle_aux_hidden_state_layer_ids": [2, 3, 6],
    "embed_requires_grad": False,
    "has_no_defaults_at_init": False,
    "norm_before_residual": True,
    "speculators_config": {
        "algorithm": "eagle3",
        "default_proposal_method": "greedy",
        "proposal_methods": [
            {
                "accept_tolerance": 0.0,
                "proposal_type": "greedy",
                "speculative_tokens": 3,
                "verifier_accept_k": 1,
            }
        ],
        "verifier": {
            "architectures": ["GptOssForCausalLM"],
            "name_or_path": "openai/gpt-oss-20b",
        },
    },
    "speculators_model_type": "eagle3",
    "speculators_version": "0.3.0",
    "target_hidden_size": None,
    "transformer_layer_config": LLAMA_LAYER,
    "transformers_version": "4.57.1",
}
SILENT = {name: value for name, value in REDHAT.items() if name != "norm_before_residual"}
# speculators 0.9: each layer as in Qwen3, whose queries and keys are normed
QWEN3_LAYER = {
    **LLAMA_LAYER,
    "layer_types": ["full_attention"],
    "model_type": "qwen3",
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "sliding_window": None,
    "use_sliding_window": False,
}
QWEN3_LAYER = {k: v for k, v in QWEN3_LAYER.items() if k not in ("rope_theta", "rope_scaling")}
SPECULATORS_09 = {
    **REDHAT,
    "fc_norm": False,
    "norm_before_fc": False,
    "norm_output": False,
    "norm_before_residual": False,
    "transformer_layer_config": QWEN3_LAYER,
}
# SpecForge: layers whose outputs are read. NVIDIA's third version: whose inputs are.
SPECFORGE = {
    **LAYER,
    "architectures": ["LlamaForCausalLMEagle3"],
    "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 5]},
    "head_dim": 32,  # 64
    "num_local_experts": 16,  # left over: its layer is dense
    "max_position_embeddings": 4096,
    "model_type": "gpt_oss",
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.52.3",
    "experts_per_token": 4,
    "draft_vocab_size": DRAFT,  # 32000
}
EAGLE_31 = {**SPECFORGE, "fc_norm": True, "norm_output": True}  # of SpecForge and speculators
NVIDIA_V3 = {
    **SPECFORGE,
    "eagle_config": {
        "eagle_aux_hidden_state_layer_ids": [4, 6, LAYERS],  # 24, 30, 36
        "use_aux_hidden_state": True,
    },
    "norm_before_fc": True,
}


def tensors_of(
    config: dict[str, Any], prefix: str, dtype: torch.dtype = torch.bfloat16, **options: bool
) -> dict[str, Tensor]:
    layer = config.get("transformer_layer_config", config)
    layer = {"head_dim": layer["hidden_size"] // layer["num_attention_heads"], **layer}
    tensors = eagle3_tensors(prefix, layer, DRAFT, **options)
    return {k: w.to(dtype) if w.is_floating_point() else w for k, w in tensors.items()}


def normed_together(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(5)
    return {**tensors, "input_norm.weight": 1 + random(tensors["fc.weight"].shape[1])}


def normed_each(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(6)
    return {**tensors, **{f"fc_norm.{i}.weight": 1 + random(64) for i in range(3)}}


def normed_heads(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(7)
    return {
        **tensors,
        "layers.0.self_attn.q_norm.weight": 1 + random(32),
        "layers.0.self_attn.k_norm.weight": 1 + random(32),
    }


OF_REDHAT = tensors_of(REDHAT, "layers.0.", embedding=True)
HEADS = {
    "AngelSlim Qwen3-1.7B": Known("qwen3", ANGELSLIM, tensors_of(ANGELSLIM, "midlayer.")),
    "AngelSlim Qwen3-4B, head_dim 80": Known(
        "qwen3 of 160", ANGELSLIM_4B, tensors_of(ANGELSLIM_4B, "midlayer.")
    ),
    "AngelSlim Qwen3-8B": Known(
        "qwen3", ANGELSLIM_8B, tensors_of(ANGELSLIM_8B, "midlayer.", embedding=True)
    ),
    "AngelSlim Qwen3-a3B": Known("qwen3 of experts", ANGELSLIM, tensors_of(ANGELSLIM, "midlayer.")),
    "yuhuili Llama-3.1-8B": Known(
        "llama", YUHUILI, tensors_of(YUHUILI, "midlayer.", torch.float16), pickled=True
    ),
    "RedHatAI gpt-oss-20b": Known("gpt-oss", REDHAT, OF_REDHAT, (2, 3, 6), normed=True),
    "speculators, norm_before_residual left out": Known(
        "gpt-oss", SILENT, OF_REDHAT, (2, 3, 6), normed=True
    ),
    "RedHatAI gpt-oss-120b": Known(
        "gpt-oss",
        {**REDHAT, "norm_before_fc": True},
        normed_together(OF_REDHAT),
        (2, 3, 6),
        normed=True,
    ),
    "speculators 0.9": Known(
        "llama", SPECULATORS_09, normed_heads(tensors_of(SPECULATORS_09, "layers.0.")), (2, 3, 6)
    ),
    "speculators 0.9, fc_norm": Known(
        "llama",
        {**SPECULATORS_09, "fc_norm": True},
        normed_each(normed_heads(tensors_of(SPECULATORS_09, "layers.0."))),
        (2, 3, 6),
    ),
    "SpecForge gpt-oss": Known("gpt-oss", SPECFORGE, tensors_of(SPECFORGE, "midlayer."), (2, 3, 6)),
    "EAGLE 3.1 gpt-oss-20b": Known(
        "gpt-oss",
        EAGLE_31,
        normed_each(tensors_of(EAGLE_31, "midlayer.")),
        (2, 3, 6),
    ),
    "NVIDIA gpt-oss, third version": Known(
        "gpt-oss",
        NVIDIA_V3,
        normed_together(tensors_of(NVIDIA_V3, "midlayer.")),
        (4, 6, LAYERS),
    ),
}


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", HEADS)
def test_proposals_are_those_of_the_conventions(
    name: str, native: bool, targets: Any, tmp_path: Path
) -> None:
    known = HEADS[name]
    checkpoint = load_checkpoint(targets(known.target))
    files = load_head(
        write(tmp_path, known.config, known.tensors, known.pickled),
        checkpoint.config,
        known.pickled,
    )
    assert files.aux_layers == known.layers
    decoder = Decoder(checkpoint.config, checkpoint.weights, torch.float32, CPU, PAGES, 128, native)
    run = Drafting(decoder, EagleHead(files, decoder, PAGES, SCRATCH, 128), PROMPTS[0])
    layer = {"head_dim": 16, **known.config.get("transformer_layer_config", known.config)}
    layer |= layer.get("rope_parameters", {}) | {"norm_output": known.config.get("norm_output")}
    tokens = list(PROMPTS[0])

    def reference() -> ReferenceHead:
        model = target_model(known.target)
        return ReferenceHead(model, layer, known.tensors, known.layers, tokens, known.normed)

    trees = run.round()
    reference().check(trees)
    tokens += [int(trees.token[1]), 7]
    run.request.tokens.extend(tokens[-2:])
    reference().check(run.round())


def answers(llm: LLM, temperature: float) -> list[list[int]]:
    params = SamplingParams(temperature=temperature, max_tokens=16, seed=5, ignore_eos=True)
    prompts: Any = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]


def drafts(llm: LLM) -> float:
    """Trees of which nodes were verified so far."""
    found = {metric.name: metric for metric in llm.get_metrics()}
    return found["vllm:spec_decode_num_drafts"].value


ON_TORCH = ["AngelSlim Qwen3-1.7B", "speculators 0.9, fc_norm", "EAGLE 3.1 gpt-oss-20b"]


@pytest.mark.parametrize(
    ("name", "native"), [*((name, True) for name in HEADS), *((name, False) for name in ON_TORCH)]
)
def test_answers_are_those_of_plain_decoding(
    name: str, native: bool, targets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under each policy, greedy and sampled, three requests at once."""
    if not native:
        monkeypatch.setattr(library, "unavailable", lambda: "left out here")
        kernel_check._warn.cache_clear()
    known = HEADS[name]
    head = write(tmp_path / "head", known.config, known.tensors, known.pickled)
    plain = LLM(
        targets(known.target),
        speculative_config=False,
        dtype="float32",
        max_model_len=64,
        max_num_seqs=3,
        trust_pickle=known.pickled,
        enable_prefix_caching=False,
        allow_slow=not native,
    )
    expected = [answers(plain, temperature) for temperature in (0.0, 0.8)]
    for policy in ("chain", "eagle2", "smart"):
        config = {"method": "eagle", "model": str(head), "policy": policy}
        llm = plain.sharing_weights(config)
        before = drafts(llm)
        assert [answers(llm, temperature) for temperature in (0.0, 0.8)] == expected
        assert llm.speculation.description == "eagle head head"
        if policy != "smart":  # which need not draft
            assert drafts(llm) > before


@pytest.mark.parametrize(
    "name", ["RedHatAI gpt-oss-120b", "speculators 0.9, fc_norm", "EAGLE 3.1 gpt-oss-20b"]
)
def test_a_head_is_written_as_it_was_read(name: str, targets: Any, tmp_path: Path) -> None:
    """But training cannot start from it."""
    known = HEADS[name]
    checkpoint = load_checkpoint(targets(known.target))
    files = load_head(write(tmp_path / "a", known.config, known.tensors), checkpoint.config)
    write_head(files, checkpoint, "speculators", tmp_path / "b")
    again = load_head(tmp_path / "b", checkpoint.config)
    assert (again.aux_layers, again.norm_before_residual) == (known.layers, known.normed)
    assert again.form == files.form
    assert again.shape == replace(files.shape, max_positions=again.shape.max_positions)
    assert again.weights.keys() == files.weights.keys()
    assert all(torch.equal(again.weights[key], weight) for key, weight in files.weights.items())
    with pytest.raises(ModelError, match="training cannot start from a head with norm"):
        form_of(files)


def test_what_a_layout_has_no_words_for_is_not_written(targets: Any, tmp_path: Path) -> None:
    known = HEADS["speculators 0.9"]
    checkpoint = load_checkpoint(targets(known.target))
    files = load_head(write(tmp_path, known.config, known.tensors), checkpoint.config)
    with pytest.raises(ModelError, match=r"norms queries and keys, .* as 'speculators'"):
        write_head(files, checkpoint, "eagle3", tmp_path / "b")
