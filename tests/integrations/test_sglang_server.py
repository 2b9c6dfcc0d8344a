"""SMART in SGLang's own scheduler, workers, models and attention, on a CPU: tiny random models,
every kernel by Triton's interpreter. Slow, and only in `make test-sglang`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton is to interpret: make test-sglang", allow_module_level=True)
pytest.importorskip("sglang", reason="SGLang is not installed here: make test-sglang")

import torch
from safetensors.torch import save_file

HIDDEN, HEADS, KV_HEADS, HEAD, INNER, VOCABULARY = (
    32,
    2,
    1,
    16,
    48,
    8,
)  # so few words that random drafts are accepted now and then
PROMPTS = [[[5, 6, 7, 3, 4], 7], [[1, 2, 3], 9], [[4, 3, 5, 7, 2, 1, 0], 11]]
CONFIG = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD,
    "intermediate_size": INNER,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "torch_dtype": "float32",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def layer(prefix: str, width: int) -> dict[str, torch.Tensor]:
    """Random weights of a decoder layer whose attention reads `width` numbers."""
    shapes = {
        "self_attn.q_proj": (HEADS * HEAD, width),
        "self_attn.k_proj": (KV_HEADS * HEAD, width),
        "self_attn.v_proj": (KV_HEADS * HEAD, width),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }
    weights = {f"{prefix}{name}.weight": 0.2 * torch.randn(shape) for name, shape in shapes.items()}
    for name in ("input_layernorm", "post_attention_layernorm"):
        weights[f"{prefix}{name}.weight"] = torch.ones(HIDDEN)
    return weights


def written(folder: Path, weights: dict[str, torch.Tensor], **config: Any) -> str:
    folder.mkdir()
    save_file(weights, str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Options that name a target of three layers and an EAGLE-3 head."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sglang")
    head = 0.4 * torch.randn(VOCABULARY, HIDDEN)
    target = {
        "model.embed_tokens.weight": torch.randn(VOCABULARY, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": head,
    }
    for index in range(3):
        target |= layer(f"model.layers.{index}.", HIDDEN)
    draft = {
        "fc.weight": 0.1 * torch.randn(HIDDEN, 3 * HIDDEN),
        "norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": head.clone(),
        "midlayer.hidden_norm.weight": torch.ones(HIDDEN),
        "d2t": torch.zeros(VOCABULARY, dtype=torch.int64),
        "t2d": torch.ones(VOCABULARY, dtype=torch.bool),
        **layer("midlayer.", 2 * HIDDEN),
    }
    return {
        "model_path": written(
            folder / "target", target, architectures=["LlamaForCausalLM"], num_hidden_layers=3
        ),
        "speculative_draft_model_path": written(
            folder / "draft",
            draft,
            architectures=["LlamaForCausalLMEagle3"],
            num_hidden_layers=1,
            draft_vocab_size=VOCABULARY,
            target_hidden_size=HIDDEN,
        ),
    }


def serve(options: dict[str, Any], costs: Path | None = None) -> dict[str, Any]:
    """Answers of a server in a process of its own."""
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}
    if costs is not None:
        environment["SMART_SGLANG_COSTS"] = str(costs)
    script = str(Path(__file__).with_name("sglang_server.py"))
    run = subprocess.run(
        [sys.executable, script, json.dumps(options), json.dumps(PROMPTS)],
        env=environment,
        text=True,
        capture_output=True,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    answer: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return answer


@pytest.fixture(scope="module")
def plain(models) -> list[list[int]]:
    """What the target says without speculation."""
    tokens: list[list[int]] = serve({"model_path": models["model_path"]})["tokens"]
    assert [len(answer) for answer in tokens] == [length for _, length in PROMPTS]
    return tokens


@pytest.mark.parametrize(("topk", "nodes"), [(1, {}), (2, {"1": 2, "2": 5})])
def test_chains_and_tiers_switch_and_say_what_the_target_says(
    models, plain, tmp_path, topk: int, nodes: dict[str, int]
) -> None:
    """A step for three requests and two for fewer."""
    steps, costs = tmp_path / "steps.json", tmp_path / "costs.json"
    steps.write_text('{"1": {"candidate_steps": [2]}, "3": {"candidate_steps": [1]}}')
    seconds = {batch: {"0": 1.0, "1": 1.1, "2": 1.2} for batch in ("1", "3")}
    costs.write_text(json.dumps({"seconds": seconds, "nodes": nodes}))
    options = {
        **models,
        "speculative_algorithm": "EAGLE3",
        "speculative_adaptive": True,
        "speculative_adaptive_config": str(steps),
        "speculative_num_steps": 2,
        "speculative_eagle_topk": topk,
        "speculative_num_draft_tokens": 1 + nodes.get("2", 2),
    }
    found = serve(options, costs)
    assert found["tokens"] == plain
    assert found["steps"][0] == 1
    assert found["steps"][-1] == 2
