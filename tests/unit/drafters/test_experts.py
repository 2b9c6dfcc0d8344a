"""A mixture of experts decodes the same tokens under every policy, whatever rows run beside."""

from __future__ import annotations

import functools

import pytest

from smart_decoding.drafters.draft_model import DraftModelDrafter
from smart_decoding.models.draft_model import DraftModel
from smart_decoding.models.families.config import ModelConfig
from smart_decoding.models.families.layer import Experts, FeedForward
from smart_decoding.models.target import TorchTarget

from .tiny import LIMIT, PAGES, SCRATCH, VOCAB, answer, checkpoint, engine_of, prompts

EXPERTS = Experts(count=4, per_token=2, normalised=True, each=FeedForward(24, gelu=False))
CONFIG = ModelConfig(
    *("qwen3_moe", 2, 32, 4, 2, 16, 48, VOCAB, 1e4, 1e-5, 1024), qk_norm=True, experts=EXPERTS
)
TOKENS = 16


@pytest.fixture(params=["kernels", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        for module in ("target", "draft_model"):
            monkeypatch.setattr(f"smart_decoding.models.{module}.use_native", lambda *given: False)
    return str(request.param)


@functools.cache
def target(path: str) -> TorchTarget:
    target = TorchTarget(checkpoint(CONFIG), "float32", "cpu", PAGES, LIMIT)
    assert target.decoder.native == (path == "kernels")
    return target


@functools.cache
def plain(path: str, temperature: float) -> list[list[int]]:
    """Each prompt alone."""
    return [
        answer(engine_of(target(path), None, "off"), [prompt], temperature, TOKENS, seed)[0].output
        for seed, prompt in enumerate(prompts(8))
    ]


def test_tokens_differ(path: str) -> None:
    assert len({tuple(tokens) for tokens in plain(path, 0.0)}) == 8
    assert plain(path, 0.0) != plain(path, 0.8)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("policy", ["off", "smart", "eagle2", "chain"])
def test_tokens_are_those_of_plain_decoding(path: str, policy: str, temperature: float) -> None:
    """The mixture drafts for itself."""
    for batch in (1, 2, 5, 8):
        drafter = None
        if policy != "off":
            model = DraftModel(checkpoint(CONFIG), target(path), PAGES, SCRATCH)
            drafter = DraftModelDrafter(model, PAGES, SCRATCH)
        requests = answer(
            engine_of(target(path), drafter, policy), prompts(batch), temperature, TOKENS
        )
        assert [r.output for r in requests] == plain(path, temperature)[:batch]
        if policy in ("eagle2", "chain"):  # others may do without drafts
            assert all(r.metrics.accepted > 0 for r in requests)
