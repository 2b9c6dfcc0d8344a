"""A level as one call of the CPU kernels is the level that torch computes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from smart_decoding.core.cost import CostModel
from smart_decoding.core.policies.protocol import BatchState, DraftPlan
from smart_decoding.core.policies.smart import Smart
from smart_decoding.core.tree import DraftTrees
from smart_decoding.drafters.eagle import EagleDrafter
from smart_decoding.drafters.levels import Asked
from smart_decoding.engine.kv import BlockTable, PagePool
from smart_decoding.engine.request import Request
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.engine.stopping import StopChecker
from smart_decoding.kernels import ops as kernels
from smart_decoding.kernels.chooser import NativeChooser
from smart_decoding.models.decoder import Decoder
from smart_decoding.models.eagle_head import EagleHead
from smart_decoding.models.head_files import HeadFiles
from smart_decoding.models.linear import Linear
from smart_decoding.profiling.measure import fake_rows
from smart_decoding.training.head import Form, TrainableHead

from .tiny import PAGES, SCRATCH, TARGET, VOCAB, checkpoint, outputs_of

pytestmark = pytest.mark.usefixtures("variant")
TAPS = (1, 2, 4)
WIDTH = len(TAPS) * TARGET.hidden


@pytest.fixture(scope="module")
def files() -> HeadFiles:
    torch.manual_seed(1)
    trained = TrainableHead(Form(TARGET, len(TAPS)))
    weights = {
        name: tensor + torch.randn_like(tensor) * 0.1 for name, tensor in trained.exported().items()
    }
    return HeadFiles(
        {}, weights | {"draft_ids": torch.arange(0, VOCAB, 2)}, TAPS, replace(TARGET, layers=1)
    )


def head_of(files: HeadFiles, native: bool, dtype: torch.dtype = torch.float32) -> EagleHead:
    weights = checkpoint(TARGET).weights
    decoder = Decoder(TARGET, weights, dtype, torch.device("cpu"), PAGES, 128, native)
    head = EagleHead(files, decoder, PAGES, SCRATCH, 128)
    assert head.grows == native
    return head


def waiting(head: EagleHead, temperatures: tuple[float, ...]) -> tuple[EagleDrafter, list[Request]]:
    """Requests of which pairs wait, some with features from rounds that were logged."""
    drafter = EagleDrafter(head, PAGES, SCRATCH)
    pool = PagePool(PAGES)
    rng = np.random.default_rng(0)
    torch_rng = torch.Generator().manual_seed(0)
    requests = []
    for i, temperature in enumerate(temperatures):
        params = SamplingParams(temperature=temperature)
        tokens = rng.integers(0, VOCAB, 20 + 9 * i).tolist()
        request = Request(
            str(i), tokens, params, i, BlockTable(pool), StopChecker(params, lambda ids: "")
        )
        count = len(tokens) - 1
        request.table.reserve(count)
        request.table.commit(tokens, count)
        drafter.extend(
            request,
            torch.randn(count, WIDTH, generator=torch_rng).to(head.work_dtype),
            0,
            tokens[:count],
        )
        requests.append(request)
    for _ in range(3):  # plain rounds
        for request in requests:
            request.table.reserve(1)
            request.tokens += rng.integers(0, VOCAB, 1).tolist()
            request.table.commit(request.tokens, len(request.tokens) - 1)
        drafter.extend_each(
            requests, torch.randn(len(requests), WIDTH, generator=torch_rng).to(head.work_dtype)
        )
    return drafter, requests


def cost_of(row: float) -> CostModel:
    verify = {batch: {rows: 1.0 + row * rows for rows in (1, 2, 100, 1000)} for batch in (1, 8)}
    return CostModel.from_table(verify, {rows: row * rows / 5 for rows in (1, 2, 1000)})


def drafted(head: EagleHead, temperatures: tuple[float, ...]) -> DraftTrees:
    """Two levels below the roots of several requests."""
    drafter, requests = waiting(head, temperatures)
    plan = DraftPlan(True, levels=3, children=4)
    trees = drafter.start(requests, plan)
    drafter.expand(requests, trees, np.arange(0, len(trees), 2), plan)
    drafter.expand(requests, trees, np.flatnonzero(trees.depth == 2)[::3], plan)
    return trees


@pytest.mark.parametrize("temperatures", [(0.0,), (0.0, 0.8, 1.2)])
def test_as_torch(files: HeadFiles, temperatures: tuple[float, ...]) -> None:
    found, expected = (drafted(head_of(files, native), temperatures) for native in (True, False))
    for column in ("owner", "parent", "token"):
        assert getattr(found, column).tolist() == getattr(expected, column).tolist()
    np.testing.assert_allclose(found.draft_prob, expected.draft_prob, atol=2e-4)


@pytest.mark.parametrize("temperatures", [(0.0,), (0.8,), (0.0, 0.8, 1.2), (0.0,) * 5])
@pytest.mark.parametrize("row", [1e-9, 0.01, 0.2])
@pytest.mark.parametrize("slots", [None, 7])
def test_trees_grown_in_one_call_are_those_grown_by_level(
    files: HeadFiles, temperatures: tuple[float, ...], row: float, slots: int | None
) -> None:
    """row: what a verified row costs, over a forward; a drafted one costs a fifth. slots: room for
    expanded nodes."""
    found = []
    for whole in (True, False):
        drafter, requests = waiting(head_of(files, True), temperatures)
        drafter._scratch_size = drafter._scratch_size if slots is None else slots
        policy = Smart(
            cost_of(row), max_levels=5, children=4, eos_token_ids=(3, 8), chooser=NativeChooser()
        )
        state = BatchState(
            context=np.array([r.table.length for r in requests]),
            remaining=np.array([3, 30, 30, 2, 30][: len(requests)])
            if len(requests) > 1
            else np.array([30]),
            temperature=np.array(temperatures),
            may_speculate=np.ones(len(requests), np.bool_),
        )
        plan = policy.plan(state)
        if not plan.speculate:
            plan = policy._start(policy._round, policy._round.forecast, (3, 1))
        assert plan.growth is not None
        assert drafter.grow is not None
        if whole:
            trees, expanded, seconds, choosing = drafter.grow(requests, plan)
            assert len(seconds) == 1 + len(expanded)
            assert min(seconds) > 0
            assert choosing > 0
        else:
            trees = drafter.start(requests, plan)
            expanded = []
            for level in range(1, plan.levels):
                nodes = policy.frontier(plan, state, trees, level)
                width = drafter.expand(requests, trees, nodes, plan) if nodes is not None else 0
                if not width:
                    break
                expanded.append(width)
        found.append((expanded, trees, policy.select(plan, state, trees).tolist()))
    (expanded, trees, kept), (expanded_, trees_, kept_) = found
    assert expanded == expanded_
    assert kept == kept_
    assert len(trees) == len(trees_)
    assert np.array_equal(trees.ints[:, : len(trees)], trees_.ints[:, : len(trees)])
    assert np.array_equal(trees.floats[:, : len(trees)], trees_.floats[:, : len(trees)])
    assert row > 1e-6 or (len(expanded) == 4 if slots is None else sum(expanded) <= slots)


def test_hundreds_of_waiting_rows_are_run_in_parts(files: HeadFiles) -> None:
    rows = fake_rows(6, 600, 0, PAGES)
    assert rows is not None
    torch.manual_seed(0)
    features = torch.randn(600, WIDTH)
    last = np.arange(99, 600, 100)
    asked = Asked(4, np.zeros(6))
    ours, plain = (
        head_of(files, native).first(rows, [features], last, asked) for native in (True, False)
    )
    assert np.array_equal(ours[0], plain[0])
    np.testing.assert_allclose(ours[1], plain[1], atol=2e-4)


def test_pictures_stand_in_for_tokens(files: HeadFiles) -> None:
    torch.manual_seed(0)
    features = torch.randn(6, WIDTH)
    part = torch.randn(2, TARGET.hidden)
    found = []
    for native in (True, False):
        for mm_embeds in ([(2, part)], []):
            rows = fake_rows(1, 6, 0, PAGES)
            assert rows is not None
            rows.mm_embeds = mm_embeds
            found.append(
                head_of(files, native).first(
                    rows, [features], np.array([5]), Asked(4, np.zeros(1))
                )[1]
            )
    np.testing.assert_allclose(found[:2], found[2:], atol=2e-4)
    assert not np.allclose(found[0], found[1], atol=1e-3)


def test_8_bits_change_probabilities_little(
    files: HeadFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = fake_rows(3, 15, 0, PAGES)
    assert rows is not None
    torch.manual_seed(0)
    features = torch.randn(15, WIDTH)
    asked = Asked(len(files.weights["draft_ids"]), np.zeros(3))
    found = []
    for in_bytes in (True, False):
        if not in_bytes:
            monkeypatch.setattr(
                kernels, "pack_bytes", lambda w: (Linear(w, native=True).packed, None, None)
            )
        head = head_of(files, True, torch.bfloat16)
        ids, probs = head.first(rows, [features], np.array([4, 9, 14]), asked)
        order = np.argsort(ids, axis=1)
        found.append((outputs_of(head), np.take_along_axis(probs, order, axis=1)))
    assert torch.equal(found[0][0], found[1][0])
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=0.1, atol=1e-4)
    assert not np.array_equal(found[0][1], found[1][1])
