"""A head with prefix caching proposes what it proposes without, wherever it can know the cached
tokens' features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from smart_decoding.drafters.eagle import EagleDrafter
from smart_decoding.engine.kv import PAGE
from smart_decoding.models.heads.eagle_head import EagleHead
from smart_decoding.models.heads.export import smart_config
from smart_decoding.models.heads.files import load_head
from smart_decoding.training.head import Form, TrainableHead

from ...parity.test_device_draft import as_on_a_gpu
from .tiny import (
    PAGES,
    SCRATCH,
    TARGET,
    VOCAB,
    answer,
    ask,
    engine_of,
    finish,
    mtp_layer,
    plain,
    prompts,
    target_of,
)

if TYPE_CHECKING:
    from smart_decoding.engine.engine import Engine
    from smart_decoding.engine.request import Request

TAPS = (1, 2, 4)
WIDE = {"depth": 2, "top_k": 4, "total_tokens": 12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("head")
    torch.manual_seed(1)
    head = TrainableHead(Form(TARGET, len(TAPS)))
    for parameter in head.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    ids = torch.arange(0, VOCAB, 2).int()
    save_file({**head.exported(), "draft_ids": ids}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(smart_config(TARGET, TAPS, len(ids))))
    return folder


@pytest.fixture(params=["kernels", "torch", "device", "mtp", "mtp on torch"])
def engine(request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """device: torch's levels, chosen where they are drafted as on a GPU. mtp: a layer for
    multi-token prediction, as a dense model could have one."""
    if request.param not in ("kernels", "mtp"):
        monkeypatch.setattr("smart_decoding.models.target.use_native", lambda *_args: False)

    def make(pages: int = PAGES, policy: str = "eagle2", **more: Any) -> Engine:
        target = target_of(pages)
        is_mtp = request.param.startswith("mtp")
        files = mtp_layer(TARGET) if is_mtp else load_head(folder, TARGET)
        head = EagleHead(files, target.decoder, pages, SCRATCH, 600)
        if request.param == "device":
            as_on_a_gpu(head)
        more = {"options": WIDE if policy == "eagle2" else {}, **more}
        return engine_of(target, EagleDrafter(head, pages, SCRATCH), policy, pages, **more)

    return make


Drafts: TypeAlias = dict[
    int, tuple[list[int], Any]
]  # a tree's tokens and probabilities, by the length of its text


def same(found: Drafts, expected: Drafts) -> bool:
    """Whether all trees have the same tokens, and their probabilities agree to 1e-4."""
    return found.keys() == expected.keys() and all(
        tokens == expected[at][0] and np.allclose(probs, expected[at][1], atol=1e-4)
        for at, (tokens, probs) in found.items()
    )


def drafts(
    engine: Engine, prompt: list[int], tokens: int = 24, cut_every: int = 0
) -> tuple[Drafts, Request]:
    """The trees of all rounds of one request. Where its length divides by `cut_every`, drafting
    stops for somebody."""
    (request,) = ask(engine, [prompt], tokens=tokens, first_seed=len(prompt))
    trees: Drafts = {}
    while engine.has_unfinished_requests:
        length = len(request.tokens)
        comes = cut_every > 0 and length % cut_every == 0
        touched = engine.step(lambda comes=comes: [""] * comes)
        done = engine.last_round.round  # type: ignore[union-attr]
        if touched and len(done.trees):
            trees[length] = done.trees.token.tolist(), done.trees.draft_prob
    finish(engine)
    return trees, request


def test_a_draft_that_is_dropped_for_a_newcomer_changes_no_later_one(engine: Any) -> None:
    prompt = prompts(1, seed=2)[0]
    expected, _ = drafts(engine(), prompt, tokens=40)
    found, request = drafts(engine(), prompt, tokens=40, cut_every=3)
    assert request.output == plain([prompt])[0]
    assert not any(length % 3 == 0 for length in found)
    common = found.keys() & expected.keys()
    assert len(common) > 15
    assert same({at: found[at] for at in common}, {at: expected[at] for at in common})


@pytest.mark.parametrize("common", [52, 48, 64, 33])
def test_a_shared_prefix_drafts_as_without_caching(engine: Any, common: int) -> None:
    """48 and 64 end with a page: the next token differs, and the page's last pair reads it."""
    first, second = prompts(2, seed=1, common=common)
    assert first[common] != second[common]
    expected, _ = drafts(engine(prefix_caching=False), second)
    caching = engine()
    drafts(caching, first)
    found, request = drafts(caching, second)
    assert request.metrics.cached_tokens == common // PAGE * PAGE
    assert same(found, expected)
    assert len(caching.drafter._spare) == SCRATCH // 8


def test_a_conversation_that_branched_earlier(engine: Any) -> None:
    """The third's cached pages are partly the first's, whose text went on differently behind the
    third page."""
    first, second = prompts(2, seed=1, common=48)
    caching = engine()
    drafts(caching, first)
    _, answered = drafts(caching, second, tokens=60)
    third = [*answered.tokens, 7, 8]
    expected, _ = drafts(engine(prefix_caching=False), third)
    found, request = drafts(caching, third)
    assert request.metrics.cached_tokens >= 64
    assert same(found, expected)


def test_requests_that_share_pages_at_the_same_time(engine: Any) -> None:
    """The first still drafts while the second runs the border pair again: neither disturbs the
    other."""
    first, second = prompts(2, seed=1, common=48)
    expected = [drafts(engine(prefix_caching=False), prompt)[0] for prompt in (first, second)]
    caching = engine()
    found: list[Drafts] = [{}, {}]
    requests = ask(caching, [first], tokens=24)
    while caching.has_unfinished_requests:
        lengths = [len(request.tokens) for request in requests]
        caching.step()
        trees = caching.last_round.round.trees
        running = caching.last_round.requests
        for owner in range(trees.batch if len(trees) else 0):
            nodes = trees.nodes_of(owner)
            which = requests.index(running[owner])
            found[which][lengths[which]] = trees.token[nodes].tolist(), trees.draft_prob[nodes]
        if len(found[0]) == 3 and len(requests) == 1:
            requests += ask(caching, [second], tokens=24, first_seed=9)
    assert requests[1].metrics.cached_tokens == 48
    for mine, alone in zip(found, expected, strict=True):
        early = sorted(mine.keys() & alone.keys())[
            :-4
        ]  # towards its end a request alone drafts fewer levels
        assert len(early) > 10
        assert same({at: mine[at] for at in early}, {at: alone[at] for at in early})


def test_keys_of_other_text_are_never_taken_for_the_prefix(engine: Any) -> None:
    """Requests that end with their prompt's round leave pages that the head never saw; it had other
    keys there."""
    caching = engine(pages=12, max_model_len=160)
    for seed in (11, 12, 13):
        drafts(caching, prompts(1, seed=seed, common=100)[0])
    first, second = prompts(2, seed=1, common=50)
    answer(caching, [first], tokens=1)
    (request,) = ask(caching, [second], tokens=8)
    caching.step()
    assert request.metrics.cached_tokens == 48
    state = caching.drafter._states[id(request)]
    assert (state.start, state.length) == (48, 48)
    finish(caching)


def test_a_preempted_request_goes_on_with_its_keys(engine: Any) -> None:
    many = [prompt + [1] * 30 for prompt in prompts(3, seed=3)]
    tight = engine(pages=14, max_model_len=112, policy="eagle2")
    requests = answer(tight, many, tokens=40)
    assert sum(r.metrics.preemptions for r in requests) > 0
    assert [r.output for r in requests] == plain(many)
    assert np.unique(tight.drafter._spare).size == SCRATCH // 8
