"""A round's verification in one call of the kernels against the same step by step: tokens, paths,
features and keys."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smart_decoding.core.rule import Draft
from smart_decoding.core.tree import ROOT, DraftTrees
from smart_decoding.engine.history import TokenHistory
from smart_decoding.engine.kv import BlockTable, PagePool
from smart_decoding.engine.media import Media
from smart_decoding.engine.request import Request
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.engine.scheduler import Batch
from smart_decoding.engine.stopping import StopChecker
from smart_decoding.engine.verification import make_room
from smart_decoding.errors import ModelError
from smart_decoding.models.sampling.sampler import Sampler
from smart_decoding.models.target import TorchTarget

from .checkpoints import MODELS, PAGES, VOCAB, decoder

if TYPE_CHECKING:
    from smart_decoding.engine.protocols import Verified
    from smart_decoding.models.cpu.native_verification import NativeBatch, NativeVerified

pytestmark = pytest.mark.usefixtures("variant")
CONTEXTS = (5, 15, 63, 126)
AUX_LAYERS = (1, 2)
PROMPT = np.random.default_rng(8).integers(VOCAB, size=200).tolist()
ROUNDS = 30
GREEDY = SamplingParams(temperature=0.0, max_tokens=400)
COLD = 1e-3  # scores so far apart that rounding decides every token
MROPE = (2, 3, 3)  # of 8 frequencies
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def pictured(length: int) -> Media:
    """The rotary positions of a prompt whose second half is a picture and two words."""
    rotary = np.repeat(np.arange(length)[:, None], 3, axis=1)
    rotary[length // 2 : -2] = length // 2 + np.arange(3)
    rotary[-2:] = length // 2 + 3 + np.arange(2)[:, None]
    return Media([], rotary, int(rotary.max()) + 1 - length)


class World(Sampler):
    """Requests of several lengths on a tiny model, verified in one call or step by step."""

    verify = TorchTarget.verify
    forward = TorchTarget.forward
    move = TorchTarget.move
    clock = staticmethod(lambda: 0.0)
    eos_token_ids = ()

    def __init__(
        self,
        name: str,
        dtype: torch.dtype,
        whole: bool,
        params: Sequence[SamplingParams] = (GREEDY,) * len(CONTEXTS),
        pictures: Sequence[bool] = (),
    ) -> None:
        self.decoder = decoder(name, True, dtype, MROPE if any(pictures) else ())
        self.rounds: list[NativeVerified] = []
        self.native = None
        if whole:  # without recurrent states
            self.native = SimpleNamespace(verify=self._counted, advance_after=lambda rows: None)
        pool = PagePool(PAGES)
        self.requests = [
            Request(
                str(n),
                PROMPT[n : n + n],
                each,
                7 + n,
                BlockTable(pool),
                StopChecker(each, str),
                history=TokenHistory(PROMPT[n : n + n]) if each.needs_history else None,
            )
            for n, each in zip(CONTEXTS, params, strict=True)
        ]
        for request, has_picture in zip(self.requests, pictures, strict=False):
            request.media = pictured(len(request.prompt)) if has_picture else None
        for request in self.requests:
            request.table.cover(len(request.tokens))
        self.after(
            self.run(Batch([], [(r, len(r.tokens)) for r in self.requests]), DraftTrees.empty(0))
        )

    def _counted(self, batch: NativeBatch) -> NativeVerified:
        assert self.decoder.model is not None
        self.rounds.append(self.decoder.model.verify(batch))
        return self.rounds[-1]

    def run(self, batch: Batch, trees: DraftTrees, kept: np.ndarray | None = None) -> Verified:
        kept = np.arange(len(trees)) if kept is None else kept
        for request in batch.decode:
            request.table.cover(1)
        kept = make_room(batch, trees, kept)
        return self.verify(batch, Draft(trees, kept=kept), AUX_LAYERS)  # type: ignore[misc]

    def round(self, trees: DraftTrees | None = None, kept: np.ndarray | None = None) -> Verified:
        trees = DraftTrees.empty(len(self.requests)) if trees is None else trees
        return self.after(self.run(Batch(self.requests, []), trees, kept))

    def after(self, verified: Verified) -> Verified:
        for request, tokens in zip(verified.requests, verified.acceptance.emitted, strict=True):
            request.accept(tokens, 0.0)
            request.table.commit(request.tokens, len(request.tokens) - 1)
        return verified


def trees_around(answers: list[list[int]], rng: np.random.Generator, nodes: int) -> DraftTrees:
    """Trees that follow the target's own answers more often than not, branches beside them, and
    siblings that are equal."""
    trees = DraftTrees.empty(len(answers))
    for _ in range(nodes):
        owner = int(rng.integers(len(answers)))
        parent = int(rng.choice([ROOT, *trees.nodes_of(owner)[-5:]]))
        depth = 0 if parent == ROOT else int(trees.depth[parent])
        token = (
            answers[owner][depth]
            if rng.random() < 0.7 and depth < len(answers[owner])
            else int(rng.integers(9))
        )
        trees.append([owner], [token], [parent], [0.5])
    return trees


def some_of(trees: DraftTrees, rng: np.random.Generator) -> np.ndarray:
    """Most nodes, with all their ancestors."""
    chosen = {
        node for at in np.flatnonzero(rng.random(len(trees)) < 0.5) for node in trees.path(int(at))
    }
    return np.array(sorted(chosen), np.int64)


def assert_same(one: Verified, steps: Verified) -> None:
    assert one.acceptance.emitted == steps.acceptance.emitted
    assert one.acceptance.path == steps.acceptance.path
    assert (one.acceptance.root_next == steps.acceptance.root_next).all()
    assert (one.acceptance.next_token == steps.acceptance.next_token).all()
    assert one.rows == steps.rows
    for ours, theirs in zip(one.committed, steps.committed, strict=True):
        assert (ours.first, ours.count) == (theirs.first, theirs.count)
        assert (one.features[ours.rows] == steps.features[theirs.rows].numpy()).all()


def assert_worlds_agree(
    seed: int, turns: int, name: str, dtype: torch.dtype, **options: Any
) -> tuple[World, int]:
    """Run rounds of random trees in both ways; the tokens must equal plain decoding's. Returns the
    world of one call a round, and how many nodes were accepted there."""
    ahead = World(name, dtype, False, **options)
    for _ in range(2 * turns + 6):
        ahead.round()
    answers = [request.output for request in ahead.requests]
    worlds = [World(name, dtype, whole, **options) for whole in (True, False)]
    rng = np.random.default_rng(seed)
    accepted = 0
    for turn in range(turns):
        others = [
            answer[len(r.output) :] for answer, r in zip(answers, worlds[0].requests, strict=True)
        ]
        trees = trees_around(others, rng, (60, 24, 0, 1)[turn % 4])
        kept = some_of(trees, rng) if turn > 3 else np.arange(len(trees))
        one, steps = (world.round(copy.copy(trees), kept.copy()) for world in worlds)
        assert_same(one, steps)
        assert one.rows == len(CONTEXTS) + len(kept)
        accepted += sum(map(len, one.acceptance.path))
    assert len(worlds[0].rounds) == turns
    for request, answer in zip(worlds[0].requests, answers, strict=True):
        both = min(len(answer), len(request.output))
        assert request.output[:both] == answer[:both]
    return worlds[0], accepted


@DTYPES
@pytest.mark.parametrize(
    "name",
    [
        *("llama", "llama-tied", "qwen3", "head_dim 64, one query per key"),
        *("gemma3", "gemma3, head_dim 256, tied", "mistral, with a window"),
    ],
)
def test_one_call_equals_step_by_step(name: str, dtype: torch.dtype) -> None:
    assert name in MODELS
    world, accepted = assert_worlds_agree(4, 12, name, dtype)
    assert accepted > 15
    assert all(each.acceptance and each.scores.logits is None for each in world.rounds)


SAMPLED = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 0.8, 1.0, 2.0, COLD]),
    top_k=st.sampled_from([0, -1, 1, 2, 20, 64, 65, 200, VOCAB, 1000]),
    top_p=st.just(1.0) | st.floats(0.05, 1.0),
    min_p=st.just(0.0) | st.floats(0.0, 0.4),
    max_tokens=st.just(400),
)
SPEED = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@DTYPES
@SPEED
@given(st.lists(SAMPLED, min_size=4, max_size=4), st.integers(0, 2**31))
def test_drawn_tokens_are_those_of_the_reference(
    dtype: torch.dtype, params: list[SamplingParams], seed: int
) -> None:
    world, _ = assert_worlds_agree(seed, 5, "llama", dtype, params=params)
    greedy = all(each.greedy for each in params)
    assert all((each.scores.logits is None) == greedy for each in world.rounds)


@DTYPES
def test_most_rounds_are_decided_and_nodes_accepted(dtype: torch.dtype) -> None:
    params = [
        GREEDY,
        replace(GREEDY, temperature=0.8),
        replace(GREEDY, temperature=0.8, top_k=20, top_p=0.9),
        replace(GREEDY, temperature=0.3, min_p=0.05),
    ]
    world, accepted = assert_worlds_agree(5, 16, "qwen3", dtype, params=params)
    assert accepted > 20
    assert sum(each.acceptance is not None for each in world.rounds) > 12


@DTYPES
def test_the_reference_finishes_what_rounding_would_decide(dtype: torch.dtype) -> None:
    params = [GREEDY, replace(GREEDY, temperature=COLD), GREEDY, replace(GREEDY, temperature=COLD)]
    world, accepted = assert_worlds_agree(6, 12, "llama", dtype, params=params)
    assert accepted > 15
    assert all(each.acceptance is None for each in world.rounds)


@DTYPES
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_requests_with_pictures_among_others(temperature: float, dtype: torch.dtype) -> None:
    pictures = (True, False, True, True)
    params = [replace(GREEDY, temperature=temperature)] * 4
    options = {"params": params, "pictures": pictures}
    world, accepted = assert_worlds_agree(7, 12, "llama", dtype, **options)
    assert accepted > 15
    plain = World("llama", dtype, True, params)
    for _ in range(ROUNDS):
        plain.round()
    for with_picture, ours, theirs in zip(pictures, world.requests, plain.requests, strict=True):
        both = min(len(ours.output), len(theirs.output))
        assert (ours.output[:both] != theirs.output[:both]) == with_picture


@pytest.mark.parametrize(
    "change",
    [{"logprobs": 2}, {"presence_penalty": 0.5}, {"logit_bias": {3: 5.0}}, {"min_tokens": 60}],
    ids=str,
)
def test_what_one_call_does_not_know_goes_step_by_step(change: dict[str, Any]) -> None:
    params = [replace(GREEDY, temperature=0.8)] * 3 + [replace(GREEDY, **change)]
    one, steps = (World("llama", torch.float32, whole, params) for whole in (True, False))
    one.requests[3].logprobs = [] if "logprobs" in change else None
    for _ in range(4):
        assert_same(one.round(), steps.round())
    assert not one.rounds


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_broken_weights_are_reported(temperature: float) -> None:
    params = [replace(GREEDY, temperature=temperature)] * len(CONTEXTS)
    world = World("llama", torch.float32, True, params)
    world.decoder.kv.values.fill_(torch.nan)
    with pytest.raises(ModelError, match="NaN or infinite"):
        world.round()
