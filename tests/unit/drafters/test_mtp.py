"""A layer for multi-token prediction drafts for a model with recurrent states: the same tokens
under every policy, whatever rows run beside and however often a request is preempted."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest

from smart_decoding.drafters.eagle import EagleDrafter
from smart_decoding.drafters.ngram import NgramDrafter
from smart_decoding.drafters.union import UnionDrafter
from smart_decoding.models.heads.eagle_head import EagleHead
from smart_decoding.models.target import TorchTarget

from ...parity.test_device_draft import as_on_a_gpu
from .test_hybrid import CONFIG
from .tiny import (
    LIMIT,
    PAGES,
    SCRATCH,
    VOCAB,
    answer,
    ask,
    checkpoint,
    engine_of,
    mtp_layer,
    prompts,
)

if TYPE_CHECKING:
    from smart_decoding.engine.engine import Engine

SEQS = 16
TOKENS = 24
WIDE = {"depth": 3, "top_k": 4, "total_tokens": 16}


@functools.cache
def target() -> TorchTarget:
    return TorchTarget(
        checkpoint(CONFIG), "float32", "cpu", PAGES, LIMIT, allow_slow=True, max_num_seqs=SEQS
    )


def drafter_of(tokens: int = VOCAB, on_a_gpu: bool = False, pages: int = PAGES) -> EagleDrafter:
    head = EagleHead(mtp_layer(CONFIG, tokens), target().decoder, pages, SCRATCH, 600)
    if on_a_gpu:
        as_on_a_gpu(head)
    return EagleDrafter(head, pages, SCRATCH)


def engine(policy: str, drafter: Any = None, pages: int = PAGES, **more: Any) -> Engine:
    options = WIDE if policy == "eagle2" else {}
    return engine_of(
        target(), drafter, policy, pages, options=options, **{"max_num_seqs": SEQS, **more}
    )


@functools.cache
def plain(temperature: float, tokens: int = TOKENS) -> list[list[int]]:
    """Each prompt alone."""
    return [
        answer(engine("off"), [prompt], temperature, tokens, seed)[0].output
        for seed, prompt in enumerate(prompts(SEQS))
    ]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("policy", ["off", "chain", "eagle2", "smart"])
def test_tokens_are_those_of_plain_decoding(policy: str, temperature: float) -> None:
    verified = accepted = 0
    for batch in (1, 2, 5, 16):
        requests = answer(engine(policy, drafter_of()), prompts(SEQS)[:batch], temperature, TOKENS)
        assert [r.output for r in requests] == plain(temperature)[:batch]
        verified += sum(r.metrics.verified for r in requests)
        accepted += sum(r.metrics.accepted for r in requests)
    assert (verified > 0) == (policy != "off")
    if policy == "eagle2":
        assert accepted > 0


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(
    "drafter",
    [
        lambda: drafter_of(on_a_gpu=True),
        lambda: drafter_of(tokens=40),
        lambda: UnionDrafter([drafter_of(), NgramDrafter()]),
    ],
    ids=["levels that a device chooses", "fewer tokens", "beside n-grams"],
)
def test_it_drafts_otherwise_and_changes_no_token(drafter: Any, temperature: float) -> None:
    requests = answer(engine("eagle2", drafter()), prompts(SEQS), temperature, TOKENS)
    assert [r.output for r in requests] == plain(temperature)
    assert sum(r.metrics.accepted for r in requests) > 0


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_preempted_request_changes_no_token(temperature: float) -> None:
    pages = 12
    made = engine("eagle2", drafter_of(pages=pages), pages, max_model_len=16 * pages)
    requests = answer(made, prompts(SEQS), temperature, 60)
    assert [r.output for r in requests] == plain(temperature, 60)
    assert sum(r.metrics.preemptions for r in requests) > 0


def test_it_proposes_the_first_tokens_only() -> None:
    made = engine("eagle2", drafter_of(tokens=40))
    ask(made, prompts(3), 0.0, TOKENS)
    drafted: set[int] = set()
    while made.has_unfinished_requests:
        made.step()
        assert made.last_round is not None
        drafted |= {*made.last_round.round.trees.token.tolist()}
    assert 10 < len(drafted) <= 40
    assert max(drafted) < 40


def test_a_random_layer_is_hardly_used() -> None:
    made = engine("smart", drafter_of())
    (request,) = ask(made, [prompts(SEQS)[3]], 0.8, 300)
    with_drafts = 0
    while made.has_unfinished_requests:
        made.step()
        assert made.last_round is not None
        with_drafts += len(made.last_round.round.trees) > 0
    assert 0 < with_drafts < 45  # of 300 rounds: others decode plainly
    assert request.metrics.accepted < 30
