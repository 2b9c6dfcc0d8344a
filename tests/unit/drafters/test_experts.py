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


@functools.cache
def target() -> TorchTarget:
    return TorchTarget(checkpoint(CONFIG), "float32", "cpu", PAGES, LIMIT, allow_slow=True)


@functools.cache
def plain(temperature: float) -> list[list[int]]:
    """Each prompt alone."""
    return [
        answer(engine_of(target(), None, "off"), [prompt], temperature, TOKENS, seed)[0].output
        for seed, prompt in enumerate(prompts(8))
    ]


def test_tokens_differ() -> None:
    assert len({tuple(tokens) for tokens in plain(0.0)}) == 8
    assert plain(0.0) != plain(0.8)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("policy", ["off", "smart", "eagle2", "chain"])
def test_tokens_are_those_of_plain_decoding(policy: str, temperature: float) -> None:
    """The mixture drafts for itself."""
    for batch in (1, 2, 5, 8):
        drafter = None
        if policy != "off":
            model = DraftModel(checkpoint(CONFIG), target(), PAGES, SCRATCH)
            drafter = DraftModelDrafter(model, PAGES, SCRATCH)
        requests = answer(engine_of(target(), drafter, policy), prompts(batch), temperature, TOKENS)
        assert [r.output for r in requests] == plain(temperature)[:batch]
        if policy in ("eagle2", "chain"):  # others may do without drafts
            assert all(r.metrics.accepted > 0 for r in requests)
