"""Quants as they are stored, and expanded: the same tokens whatever was drafted."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest

from smart_decoding.drafters.draft_model import DraftModelDrafter
from smart_decoding.kernels.weights import Matrix, QuantizedTensor, as_tensor
from smart_decoding.models.checkpoints.loading import Checkpoint
from smart_decoding.models.draft_model import DraftModel
from smart_decoding.models.families.config import ModelConfig
from smart_decoding.models.families.layer import Experts, FeedForward
from smart_decoding.models.target import TorchTarget

from .tiny import LIMIT, PAGES, SCRATCH, VOCAB, answer, engine_of, prompts

SIZES = (2, 256, 4, 2, 64, 512, VOCAB, 1e4, 1e-5, 1024)
CONFIGS = {
    "dense": ModelConfig("qwen2", *SIZES, qkv_bias=True),
    "experts": ModelConfig(
        *("qwen3_moe", *SIZES), qk_norm=True, experts=Experts(4, 2, True, FeedForward(256, False))
    ),
}
BATCH, TOKENS = 3, 16
# format in a Q4_K_M file -> k and bytes of a block, and the offsets of its float16 numbers
BLOCKS = {
    "Q4_K": (256, 144, (0, 2)),
    "Q6_K": (256, 210, (208,)),
    "Q5_0": (32, 22, (0,)),
    "Q8_0": (32, 34, (0,)),
}
KINDS = {"v_proj": "Q6_K", "down_proj": "Q6_K", "o_proj": "Q5_0", "embed_tokens": "Q8_0"}
Answers = tuple[list[list[int]], int]


def checkpoint(name: str, stored: bool) -> Checkpoint:
    rng = np.random.default_rng(1)
    weights: dict[str, Matrix] = {}
    for key, shape in CONFIGS[name].expected_shapes().items():
        kind = KINDS.get(key.split(".")[-2], "Q4_K")
        n, k = (shape[0], 256) if len(shape) == 1 else shape
        size, count, halves = BLOCKS[kind]
        scale = 0.0002 if key == "lm_head.weight" else 0.002  # no token is certain
        blocks = rng.integers(0, 256, (n, k // size, count), dtype=np.uint8)
        for at in halves:
            scales = (rng.normal(size=(n, k // size, 1)) * scale).astype(np.float16)
            blocks[:, :, at : at + 2] = scales.view(np.uint8)
        matrix = QuantizedTensor(blocks.reshape(n, -1), kind, k)
        if len(shape) == 1:
            weights[key] = as_tensor(matrix)[:, 0] + 1
        else:
            weights[key] = matrix if stored else as_tensor(matrix)
    return Checkpoint(CONFIGS[name], weights, Path("nowhere"), {"model": "tiny"})


@functools.cache
def target_of(name: str, stored: bool) -> TorchTarget:
    return TorchTarget(checkpoint(name, stored), "bfloat16", "cpu", PAGES, LIMIT)


def answers(name: str, stored: bool, policy: str, temperature: float) -> Answers:
    """The tokens, and how many drafted nodes were verified. The model is its own draft model."""
    target = target_of(name, stored)
    drafter = None
    if policy != "off":
        model = DraftModel(checkpoint(name, stored), target, PAGES, SCRATCH)
        drafter = DraftModelDrafter(model, PAGES, SCRATCH)
    engine = engine_of(target, drafter, policy)
    requests = answer(engine, prompts(BATCH), temperature, TOKENS)
    return [r.output for r in requests], sum(r.metrics.verified for r in requests)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_hold_something_to_tell_apart(name: str) -> None:
    greedy, _ = answers(name, True, "off", 0.0)
    assert len({tuple(tokens) for tokens in greedy}) == BATCH
    assert greedy != answers(name, True, "off", 0.8)[0]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("policy", ["off", "chain", "eagle2", "smart"])
@pytest.mark.parametrize("name", CONFIGS)
def test_no_policy_tells_stored_from_expanded(name: str, policy: str, temperature: float) -> None:
    expected, _ = answers(name, False, "off", temperature)
    for stored in (True, False):
        found, verified = answers(name, stored, policy, temperature)
        assert found == expected
        assert policy == "off" or verified > 0
