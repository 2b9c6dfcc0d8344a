"""Tiny random models and engines on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from smart_decoding.core.policies import make_policy
from smart_decoding.engine.engine import Engine, EngineConfig
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.models.checkpoints.loading import Checkpoint
from smart_decoding.models.cpu.kernel_check import unserved
from smart_decoding.models.families.config import ModelConfig
from smart_decoding.models.families.mtp import mtp_shapes
from smart_decoding.models.heads.mtp import mtp_files
from smart_decoding.models.target import TorchTarget

if TYPE_CHECKING:
    from smart_decoding.engine.protocols import Drafter
    from smart_decoding.engine.request import Request
    from smart_decoding.models.heads.eagle_head import EagleHead
    from smart_decoding.models.heads.files import HeadFiles

VOCAB = 97
PAGES = 64
SCRATCH = 16
LIMIT = 512
TARGET = ModelConfig("llama", 4, 32, 4, 2, 16, 48, VOCAB, 10_000.0, 1e-5, 1024, tie_embeddings=True)
SMALL = ModelConfig("qwen2", 2, 32, 2, 1, 16, 40, VOCAB, 50_000.0, 1e-5, 1024, qkv_bias=True)


def checkpoint(config: ModelConfig, seed: int = 0) -> Checkpoint:
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.randn(shape, generator=generator) * 0.3
        for name, shape in config.expected_shapes().items()
    }
    return Checkpoint(config, weights, Path("nowhere"), {"model": f"tiny-{seed}"})


def mtp_layer(model: ModelConfig, tokens: int = VOCAB) -> HeadFiles:
    """A random layer for multi-token prediction, which proposes the first tokens."""
    generator = torch.Generator().manual_seed(5)
    tensors = {
        name: torch.randn(shape, generator=generator) * 0.3 + ("norm" in name)
        for name, shape in mtp_shapes(model).items()
    }
    return mtp_files(model, tensors, tokens)


def ways_to_run(model: ModelConfig) -> list[bool]:
    """On torch, and where they serve the model on the CPU kernels: `native` of what runs it."""
    return [False] if unserved(model) else [False, True]


def target_of(pages: int = PAGES) -> TorchTarget:
    return TorchTarget(checkpoint(TARGET), "float32", "cpu", pages, min(LIMIT, 16 * pages))


def outputs_of(head: EagleHead) -> torch.Tensor:
    """[outputs, hidden] of the round so far."""
    return head.levels.outputs


def engine_of(
    target: TorchTarget, drafter: Drafter | None, policy: str, pages: int = PAGES, **more: Any
) -> Engine:
    """`more`: EngineConfig's options and the policy's, as `options`."""
    options = more.pop("options", {})
    limits = {"max_model_len": target.max_positions, "max_num_batched_tokens": 64, **more}
    return Engine(
        target,
        make_policy(policy, **options),
        drafter,
        EngineConfig(pages, **limits),
        lambda skip: lambda ids: "",
    )


def prompts(count: int, seed: int = 0, common: int = 0) -> list[list[int]]:
    """Random prompts of `common` equal tokens and 1 to 40 others."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(0, VOCAB, common).tolist()
    return [shared + rng.integers(0, VOCAB, rng.integers(1, 41)).tolist() for _ in range(count)]


def answer(
    engine: Engine,
    many: Sequence[Sequence[int]],
    temperature: float = 0.0,
    tokens: int = 40,
    first_seed: int = 0,
) -> list[Request]:
    """Runs the prompts together to their ends, with the seeds first_seed, first_seed + 1, ..."""
    requests = ask(engine, many, temperature, tokens, first_seed)
    finish(engine)
    return requests


def ask(
    engine: Engine,
    many: Sequence[Sequence[int]],
    temperature: float = 0.0,
    tokens: int = 40,
    first_seed: int = 0,
) -> list[Request]:
    requests: list[Request] = []
    for seed, prompt in enumerate(many, start=first_seed):
        params = SamplingParams(
            temperature=temperature, seed=seed, max_tokens=tokens, ignore_eos=True
        )
        requests += engine.add_request(f"r{seed}", prompt, params)
    return requests


def plain(
    many: Sequence[Sequence[int]], temperature: float = 0.0, tokens: int = 40
) -> list[list[int]]:
    """The outputs of plain decoding, each prompt alone."""
    return [
        answer(engine_of(target_of(), None, "off"), [prompt], temperature, tokens, seed)[0].output
        for seed, prompt in enumerate(many)
    ]


def finish(engine: Engine) -> None:
    while engine.has_unfinished_requests:
        engine.step()
        engine.check_integrity()
    assert not getattr(engine.drafter, "_states", None)
