"""A mixture of experts decodes the same tokens under every policy, whatever rows run beside."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import pytest

from smart_decoding.drafters.draft_model import DraftModelDrafter
from smart_decoding.models.draft_model import DraftModel
from smart_decoding.models.families.config import ModelConfig
from smart_decoding.models.families.layer import Experts, FeedForward
from smart_decoding.models.target import TorchTarget

from .tiny import LIMIT, PAGES, SCRATCH, VOCAB, answer, checkpoint, engine_of, prompts

if TYPE_CHECKING:
    from smart_decoding.models.checkpoints.loading import Checkpoint

EXPERTS = Experts(count=4, per_token=2, normalised=True, each=FeedForward(24, gelu=False))
QWEN3_MOE = ModelConfig(
    *("qwen3_moe", 2, 32, 4, 2, 16, 48, VOCAB, 1e4, 1e-5, 1024), qk_norm=True, experts=EXPERTS
)
CLAMPED = Experts(
    count=4,
    per_token=2,
    normalised=True,
    each=FeedForward(24, gelu=False, clamped=True, bias=True),
    router_bias=True,
)
GPT_OSS = ModelConfig(
    *("gpt_oss", 2, 32, 4, 2, 16, 24, VOCAB, 1e4, 1e-5, 1024),
    qkv_bias=True,
    o_bias=True,
    windows=(16, 0),
    sinks=True,
    experts=CLAMPED,
)
CONFIGS = {"qwen3_moe": QWEN3_MOE, "gpt_oss": GPT_OSS}
TOKENS = 16


@pytest.fixture(params=["qwen3_moe", "gpt_oss"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["kernels", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        for module in ("target", "draft_model"):
            monkeypatch.setattr(f"smart_decoding.models.{module}.use_native", lambda *given: False)
    return str(request.param)


def weights(family: str) -> Checkpoint:
    return checkpoint(CONFIGS[family], seed=2)


@functools.cache
def target(family: str, path: str) -> TorchTarget:
    target = TorchTarget(weights(family), "float32", "cpu", PAGES, LIMIT)
    assert target.decoder.native == (path == "kernels")
    return target


@functools.cache
def plain(family: str, path: str, temperature: float) -> list[list[int]]:
    """Each prompt alone."""
    engine = functools.partial(engine_of, target(family, path), None, "off")
    return [
        answer(engine(), [prompt], temperature, TOKENS, seed)[0].output
        for seed, prompt in enumerate(prompts(8))
    ]


def test_tokens_differ(family: str, path: str) -> None:
    assert len({tuple(tokens) for tokens in plain(family, path, 0.0)}) == 8
    assert plain(family, path, 0.0) != plain(family, path, 0.8)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("policy", ["off", "smart", "eagle2", "chain"])
def test_tokens_are_those_of_plain_decoding(
    family: str, path: str, policy: str, temperature: float
) -> None:
    """The mixture drafts for itself."""
    for batch in (1, 3, 8):
        drafter = None
        if policy != "off":
            model = DraftModel(weights(family), target(family, path), PAGES, SCRATCH)
            drafter = DraftModelDrafter(model, PAGES, SCRATCH)
        requests = answer(
            engine_of(target(family, path), drafter, policy), prompts(batch), temperature, TOKENS
        )
        assert [r.output for r in requests] == plain(family, path, temperature)[:batch]
        if policy in ("eagle2", "chain"):  # others may do without drafts
            assert all(r.metrics.accepted > 0 for r in requests)
