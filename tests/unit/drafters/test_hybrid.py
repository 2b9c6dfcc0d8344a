"""A model with recurrent states decodes the same tokens under every policy, whatever rows run
beside, however its prompt is cut and however often it is preempted."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from smart_decoding.core.rule import Draft
from smart_decoding.core.tree import ROOT, DraftTrees
from smart_decoding.drafters.free import FreeDrafter
from smart_decoding.drafters.ngram import NgramDrafter
from smart_decoding.engine.engine import BETWEEN_COPIES
from smart_decoding.engine.rows import Span, build_rows
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.errors import ModelError
from smart_decoding.models.draft_model import DraftModel
from smart_decoding.models.families.config import ModelConfig
from smart_decoding.models.families.layer import LinearAttention
from smart_decoding.models.target import TorchTarget

from .tiny import LIMIT, VOCAB, answer, ask, checkpoint, engine_of, finish, prompts

if TYPE_CHECKING:
    from smart_decoding.core.rule import TreeRule
    from smart_decoding.engine.engine import Engine
    from smart_decoding.engine.request import Request

CONFIG = ModelConfig(
    *("qwen3_5", 4, 32, 4, 2, 16, 48, VOCAB, 1e4, 1e-5, 1024),
    qk_norm=True,
    gated=True,
    rotary_dim=4,
    linear=LinearAttention(2, 4, 8, 8, 4),
    attention_layers=(3,),
)
SEQS = 16
PAGES = 12 * SEQS
TOKENS = 40
POLICIES = ["off", "chain", "eagle2", "smart"]


path = "kernels"


@pytest.fixture(params=["kernels", "torch"], autouse=True)
def on(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "path", request.param)


def target() -> TorchTarget:
    return _target(path)


@functools.cache
def _target(path: str) -> TorchTarget:
    with pytest.MonkeyPatch.context() as patch:
        if path == "torch":
            patch.setattr("smart_decoding.models.target.use_native", lambda *given: False)
        made = TorchTarget(checkpoint(CONFIG), "float32", "cpu", PAGES, LIMIT, max_num_seqs=SEQS)
    assert made.decoder.native == (path == "kernels")
    return made


def engine(policy: str, pages: int = PAGES, **more: Any) -> Engine:
    drafter = None if policy == "off" else NgramDrafter()
    return engine_of(target(), drafter, policy, pages, **{"max_num_seqs": SEQS, **more})


def many(count: int) -> list[list[int]]:
    """Prompts that repeat themselves, so that n-grams find something."""
    return [prompt * 3 for prompt in prompts(count)]


def plain(temperature: float) -> list[list[int]]:
    """Each prompt alone."""
    return _plain(temperature, path)


@functools.cache
def _plain(temperature: float, _: str) -> list[list[int]]:
    return [
        answer(engine("off"), [prompt], temperature, TOKENS, seed)[0].output
        for seed, prompt in enumerate(many(SEQS))
    ]


def test_tokens_differ() -> None:
    assert len({tuple(tokens) for tokens in plain(0.0)}) == SEQS
    assert plain(0.0) != plain(0.8)


@pytest.mark.parametrize("chunk", [64, 7])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("policy", POLICIES)
def test_tokens_are_those_of_plain_decoding(policy: str, temperature: float, chunk: int) -> None:
    accepted = 0
    for batch in (1, 5, SEQS):
        made = engine(policy, max_num_batched_tokens=chunk)
        requests = answer(made, many(batch), temperature, TOKENS)
        assert [r.output for r in requests] == plain(temperature)[:batch]
        accepted += sum(r.metrics.accepted for r in requests)
    if policy in ("chain", "eagle2") and temperature == 0:  # draws of a random model repeat nothing
        assert accepted > 0


class RaggedTrees(FreeDrafter):
    """Proposes random trees, all of whose nodes are verified: some contain the true continuation,
    at any place among wrong ones."""

    name = "ragged"

    def __init__(self, truth: list[list[int]], seed: int = 0) -> None:
        self._truth = truth
        self._rng = np.random.default_rng(seed)

    def draft(
        self, requests: Sequence[Request], rule: TreeRule, interrupted: Callable[[], bool]
    ) -> Draft:
        trees = DraftTrees.empty(len(requests))
        for owner, request in enumerate(requests):
            assert request.params.seed is not None
            answer = self._truth[request.params.seed][len(request.output) :]
            self._grow(trees, owner, answer[: self._rng.integers(0, 6)])
        return Draft(trees, rule, np.arange(len(trees)))

    def _grow(self, trees: DraftTrees, owner: int, path: Sequence[int]) -> None:
        parents = [ROOT]
        for true in [*path, -1]:
            wrong = self._rng.integers(0, VOCAB, self._rng.integers(0, 4)).tolist()
            children = [each for each in dict.fromkeys(wrong) if each != true]
            at = int(self._rng.integers(0, len(children) + 1))
            if true >= 0:
                children.insert(at, true)
            first = len(trees)
            for token in children:
                trees.append([owner], [token], [parents[-1]], [0.5])
            if len(children) > 1:  # below a wrong one, too
                below = first + (at == 0 and true >= 0)
                trees.append([owner], [int(self._rng.integers(0, VOCAB))], [below], [0.5])
            parents.append(first + at)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("batch", [1, 5, SEQS])
def test_ragged_trees_change_no_token(batch: int, temperature: float) -> None:
    drafter = RaggedTrees(plain(temperature), seed=batch)
    made = engine("eagle2", max_num_batched_tokens=max(16, 6 * batch))
    made.drafter = drafter
    requests = answer(made, many(batch), temperature, TOKENS)
    assert [r.output for r in requests] == plain(temperature)[:batch]
    assert all(r.metrics.accepted > 10 for r in requests)
    assert sum(r.metrics.verified for r in requests) > 2 * sum(r.metrics.accepted for r in requests)


@pytest.mark.parametrize("policy", ["off", "eagle2"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_preempted_request_computes_its_state_again(policy: str, temperature: float) -> None:
    pages = 12
    made = engine(policy, pages, max_model_len=16 * pages)
    if policy != "off":
        made.drafter = RaggedTrees(plain(temperature))
    requests = answer(made, many(8), temperature, TOKENS)
    assert [r.output for r in requests] == plain(temperature)[:8]
    assert sum(r.metrics.preemptions for r in requests) > 0


def test_requests_that_come_and_go_share_the_places_of_states() -> None:
    """More requests than places, some of them aborted."""
    made = engine("eagle2", max_num_seqs=3)
    made.drafter = RaggedTrees(plain(0.0))
    requests = ask(made, many(8), 0.0, TOKENS)
    for _ in range(4):
        made.step()
        made.check_integrity()
    made.abort("r1")
    finish(made)
    assert [r.output for i, r in enumerate(requests) if i != 1] == [
        tokens for i, tokens in enumerate(plain(0.0)[:8]) if i != 1
    ]


def test_a_step_that_raises_leaves_nothing_in_a_state(monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine("eagle2")
    made.drafter = RaggedTrees(plain(0.8))
    requests = ask(made, many(3), 0.8, TOKENS)
    for _ in range(6):
        made.step()
    verify = target().verify
    with monkeypatch.context() as patch:
        patch.setattr(target(), "verify", lambda *round_: [verify(*round_), 1 / 0])
        with pytest.raises(ZeroDivisionError):
            finish(made)
    made.suspend()
    finish(made)
    assert [r.output for r in requests] == plain(0.8)[:3]


def test_forwards_without_a_place_for_a_state_change_none() -> None:
    """Costs are measured between the rounds of running requests."""
    made = engine("off")
    requests = ask(made, many(3), 0.0, TOKENS)
    for _ in range(5):
        made.step()
    pages = made.pool.borrow(4)
    slots = np.arange(16 * pages[0], 16 * pages[0] + 16, dtype=np.int32)
    spans = [Span(range(8), start, slots, np.array(pages, np.int32)) for start in (0, 3)]
    rows = build_rows(spans, DraftTrees.empty(2), [True] * 2).rows
    assert rows.states is None
    target().forward(rows, ())
    made.pool.put_back(pages)
    finish(made)
    assert [r.output for r in requests] == plain(0.0)[:3]


def test_no_prefix_is_reused_on_torch_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    if path == "kernels":
        pytest.skip("they keep snapshots")
    with caplog.at_level(logging.INFO, "smart.engine"):
        made = engine("off")
    assert "no prefixes are reused" in caplog.text
    assert not made.config.prefix_caching
    prompt = many(8)[-1]
    assert len(prompt) > 32
    for seed in (7, 7):
        (request,) = answer(made, [prompt], 0.0, TOKENS, seed)
        assert request.output == plain(0.0)[7]
        assert request.metrics.cached_tokens == 0


LONG = np.random.default_rng(5).integers(0, VOCAB, 150).tolist()


@pytest.fixture
def kernels() -> None:
    if path == "torch":
        pytest.skip("no snapshots are kept there")


def fresh(prompt: list[int], temperature: float) -> list[int]:
    made = engine("off", prefix_caching=False)
    return answer(made, [prompt], temperature, TOKENS)[0].output


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("chunk", [64, 512])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_prompt_begins_with_the_state_behind_an_earlier_one(
    policy: str, temperature: float, chunk: int
) -> None:
    """The state behind the first prompt's last whole page serves the same prompt, and the next
    turn; not a prompt that leaves it earlier."""
    turn = [*LONG, *fresh(LONG, temperature), 3, 1, 4]
    other = [*LONG[:140], *LONG[:20]]
    asked = [(LONG, 0), (LONG, 144), (turn, 144), (other, 0), (other, 144)]
    expected = [fresh(prompt, temperature) for prompt, _ in asked]
    made = engine(policy, max_num_batched_tokens=chunk)  # in the same memory as the others
    for (prompt, cached), tokens in zip(asked, expected, strict=True):
        (request,) = answer(made, [prompt], temperature, TOKENS)
        assert request.output == tokens
        assert request.metrics.cached_tokens == cached


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_next_turn_begins_within_a_long_answer(policy: str, temperature: float) -> None:
    """With the state behind one of its pages, wherever rounds ended."""
    off = engine("off", prefix_caching=False)
    said = answer(off, [LONG], temperature, 200)[0].output
    turn = [*LONG, *said, 3, 1, 4]
    params = SamplingParams(
        temperature=temperature, seed=1, max_tokens=TOKENS, logprobs=2, ignore_eos=True
    )
    (expected,) = off.add_request("next", turn, params)
    finish(off)
    made = engine(policy)
    if policy == "eagle2":  # rounds end anywhere
        made.drafter = RaggedTrees([said, expected.output])
    assert answer(made, [LONG], temperature, 200)[0].output == said
    assert len(made.pool._snapshots) == 2  # behind the prompt, and the answer's last
    (request,) = made.add_request("next", turn, params)
    finish(made)
    assert 144 + 200 - 2 * BETWEEN_COPIES < request.metrics.cached_tokens < len(turn)
    assert request.output == expected.output
    # exactly, for tiny models forgive much
    assert [repr(each) for each in request.logprobs or ()] == [*map(repr, expected.logprobs or ())]
    (request,) = answer(made, [LONG], temperature, TOKENS)  # the prompt's is still there
    assert request.metrics.cached_tokens == 144
    made.check_integrity()


@pytest.mark.usefixtures("kernels")
def test_answers_of_many_requests_take_no_snapshots() -> None:
    made = engine("off")
    several = [[seed, *LONG[:40]] for seed in range(target().snapshots)]
    answer(made, several, 0.0, 100)
    assert not made.pool._snapshots


@pytest.mark.usefixtures("kernels")
def test_the_snapshot_unused_for_the_longest_time_makes_way() -> None:
    made = engine("off")
    room = target().snapshots
    assert room == (SEQS + 7) // 4
    several = [[seed, *LONG] for seed in range(room + 1)]

    def cached(number: int) -> int:
        (request,) = answer(made, [several[number]], 0.0, 2)
        return request.metrics.cached_tokens

    assert not any(cached(number) for number in range(room))
    assert cached(0) == 144
    assert cached(room) == 0  # in place of the second
    assert cached(0) == 144
    assert cached(1) == 0
    made.check_integrity()


@pytest.mark.usefixtures("kernels")
def test_snapshots_go_with_their_pages() -> None:
    """Requests that take all pages, in between."""
    pages = 24
    first = [fresh(LONG, 0.0), fresh([5, *LONG], 0.0)]
    expected = plain(0.0)[:8]
    made = engine("eagle2", pages, max_model_len=16 * pages)
    for _ in range(2):
        assert [r.output for r in answer(made, [LONG, [5, *LONG]], 0.0, TOKENS)] == first
        assert [r.output for r in answer(made, many(8), 0.0, TOKENS)] == expected
        made.check_integrity()


def test_long_paths_are_accepted_at_once() -> None:
    """On the kernels accepted rows wait for the next forward, in room that grows with them."""
    truth = plain(0.0)

    class Chains(FreeDrafter):
        name = "chains"

        def draft(
            self, requests: Sequence[Request], rule: TreeRule, interrupted: Callable[[], bool]
        ) -> Draft:
            trees = DraftTrees.empty(len(requests))
            for owner, request in enumerate(requests):
                answer = truth[request.params.seed or 0][len(request.output) :]
                for token in answer[:30]:
                    parent = ROOT if trees.counts()[owner] == 0 else len(trees) - 1
                    trees.append([owner], [token], [parent], [0.5])
            return Draft(trees, rule, np.arange(len(trees)))

    made = engine("eagle2", max_num_batched_tokens=256)
    made.drafter = Chains()
    requests = answer(made, many(3), 0.0, TOKENS)
    assert [r.output for r in requests] == truth[:3]
    assert all(r.metrics.accepted > 30 for r in requests)


def test_a_hybrid_drafts_for_nobody() -> None:
    with pytest.raises(ModelError, match="recurrent states"):
        DraftModel(checkpoint(CONFIG), target(), PAGES, 4)
