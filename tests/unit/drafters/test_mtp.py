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
    ways_to_run,
)

if TYPE_CHECKING:
    from smart_decoding.engine.engine import Engine

SEQS = 16
TOKENS = 24
WIDE = {"depth": 3, "top_k": 4, "total_tokens": 16}


WAYS = ways_to_run(CONFIG)


@functools.cache
def target(native: bool) -> TorchTarget:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("smart_decoding.models.target.use_native", lambda *_args: native)
        return TorchTarget(
            checkpoint(CONFIG), "float32", "cpu", PAGES, LIMIT, allow_slow=True, max_num_seqs=SEQS
        )


def drafter_of(native: bool = False, tokens: int = VOCAB, pages: int = PAGES) -> EagleDrafter:
    head = EagleHead(mtp_layer(CONFIG, tokens), target(native).decoder, pages, SCRATCH, 600)
    return EagleDrafter(head, pages, SCRATCH)


def on_a_gpu() -> EagleDrafter:
    """Levels on torch, chosen where they are drafted."""
    head = EagleHead(mtp_layer(CONFIG), target(False).decoder, PAGES, SCRATCH, 600)
    as_on_a_gpu(head)
    return EagleDrafter(head, PAGES, SCRATCH)


def engine(
    policy: str, drafter: Any = None, native: bool = False, pages: int = PAGES, **more: Any
) -> Engine:
    options = WIDE if policy == "eagle2" else {}
    return engine_of(
        target(native), drafter, policy, pages, options=options, **{"max_num_seqs": SEQS, **more}
    )


@functools.cache
def plain(temperature: float, native: bool = False, tokens: int = TOKENS) -> list[list[int]]:
    """Each prompt alone."""
    return [
        answer(engine("off", native=native), [prompt], temperature, tokens, seed)[0].output
        for seed, prompt in enumerate(prompts(SEQS))
    ]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("policy", ["off", "chain", "eagle2", "smart"])
@pytest.mark.parametrize("native", WAYS)
def test_tokens_are_those_of_plain_decoding(native: bool, policy: str, temperature: float) -> None:
    verified = accepted = 0
    for batch in (1, 5, 16):
        made = engine(policy, drafter_of(native), native)
        requests = answer(made, prompts(SEQS)[:batch], temperature, TOKENS)
        assert [r.output for r in requests] == plain(temperature, native)[:batch]
        verified += sum(r.metrics.verified for r in requests)
        accepted += sum(r.metrics.accepted for r in requests)
    assert (verified > 0) == (policy != "off")
    if policy == "eagle2":
        assert accepted > 0


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(
    "drafter",
    [
        on_a_gpu,
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
@pytest.mark.parametrize("native", WAYS)
def test_a_preempted_request_changes_no_token(native: bool, temperature: float) -> None:
    pages = 12
    drafter = drafter_of(native, pages=pages)
    made = engine("eagle2", drafter, native, pages, max_model_len=16 * pages)
    requests = answer(made, prompts(SEQS), temperature, 60)
    assert [r.output for r in requests] == plain(temperature, native, 60)
    assert sum(r.metrics.preemptions for r in requests) > 0


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("native", WAYS)
def test_a_prompt_that_comes_again_changes_no_token(native: bool, temperature: float) -> None:
    """On the kernels it begins with the state behind its last whole page."""
    prompt = max(prompts(SEQS), key=len) * 2
    (alone,) = answer(engine("off", native=native), [prompt], temperature, TOKENS, 7)
    made = engine("eagle2", drafter_of(native), native)
    cached = []
    for _ in range(2):
        (request,) = answer(made, [prompt], temperature, TOKENS, 7)
        assert request.output == alone.output
        cached.append(request.metrics.cached_tokens)
    assert cached[0] == 0
    assert (cached[1] > 0) == native


@pytest.mark.parametrize("native", WAYS)
def test_it_proposes_the_first_tokens_and_those_that_were_said(native: bool) -> None:
    made = engine("eagle2", drafter_of(native, tokens=40), native)
    ask(made, prompts(3), 0.0, TOKENS)
    drafted: set[int] = set()
    said: set[int] = set()
    while made.has_unfinished_requests:
        made.step()
        assert made.last_round is not None
        said |= {token for each in made.last_round.requests for token in each.tokens}
        drafted |= {*made.last_round.round.trees.token.tolist()}
    assert len(drafted) > 10
    assert drafted <= {*range(40)} | said
    assert drafted & (said - {*range(40)})
