"""What the controller believes of seconds is what happens, whatever rounds there are."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from simulation import World, run

from smart_decoding.core.batch import BatchState, Round
from smart_decoding.core.calibration import HORIZON
from smart_decoding.core.costs import CostModel, VerifySample
from smart_decoding.core.policies import make_policy
from smart_decoding.core.policies.smart import Mode, Shape
from smart_decoding.core.tree import DraftTrees

DRAFT = {1: 1.2, 4: 1.4, 8: 1.7, 16: 2.3, 64: 5.0}
FLAT = CostModel.from_table({1: {1: 21.6, 8: 24.8, 16: 30.6, 32: 45.3, 64: 74.2}}, DRAFT)


def batch_of(size: int, **more: object) -> BatchState:
    each = np.full(size, 200)
    return BatchState(
        each, each, np.zeros(size), np.ones(size, np.bool_), requests=range(size), **more
    )


def undrafted(batch: BatchState, seconds: float) -> Round:
    """A round without drafts."""
    none = np.zeros(0, np.int64)
    rows = batch.size + batch.prefill_rows
    trees = DraftTrees.empty(batch.size)
    root_next = np.full(batch.size, 7)
    return Round(batch, None, trees, none, none, root_next, [], [], rows, seconds)


@pytest.mark.parametrize("size", [4, 16, 32])
def test_rounds_with_prompts_teach_no_costs(size: int) -> None:
    """Rows of prompts take 0.75 of the table's price, so such rounds would make trees look cheap
    and plain decoding slow."""
    policy = make_policy("smart", cost=FLAT)
    now = batch_of(size)
    shape = Shape.of(now, now.limits)
    before = policy.predict(shape)
    mixed = replace(now, prefill_rows=200)
    price = float(FLAT.verify_seconds(size, size + 200, 200))
    for _ in range(HORIZON):
        policy.observe(undrafted(mixed, 0.75 * price))
        policy.plan(now)
    after = policy.predict(shape)
    assert after.plain == before.plain
    assert after.rates[Mode.MODEL] == before.rates[Mode.MODEL]
    fresh = make_policy("smart", cost=FLAT).state.credit
    assert policy.state.credit.longest_round(now.requests) >= fresh.longest_round(now.requests)
    assert policy.stats()["prompts_predicted_seconds"] == pytest.approx(1 / 0.75, rel=0.01)


@pytest.mark.parametrize(("size", "rows"), [(1, 8), (8, 24), (16, 48), (32, 64)])
@pytest.mark.parametrize("error", [-0.2, 0.07, 0.2])
def test_trees_that_take_more_or_less_than_the_table_says_are_learned(
    size: int, rows: int, error: float
) -> None:
    """Also beyond the rows where the table has doubled, in which memory has no part."""
    rng = np.random.default_rng(0)
    cost = FLAT
    believed = []
    for step in range(600):
        for count, factor in ((rows, 1 + error), (size, 1.0)):
            seconds = factor * float(FLAT.verify_seconds(size, count, 100))
            noisy = seconds * math.exp(0.03 * rng.standard_normal())
            cost = cost.corrected(VerifySample(size, count, 100, noisy))
        if step >= 300:
            ratio = cost.verify_seconds(size, rows, 100) / cost.verify_seconds(size, size, 100)
            believed.append(float(ratio))
    table = FLAT.verify_seconds(size, rows, 100) / FLAT.verify_seconds(size, size, 100)
    assert np.mean(believed) == pytest.approx((1 + error) * float(table), rel=0.015)


@pytest.mark.parametrize(("longest", "drafts"), [(1.0, False), (1.5, True)])
def test_what_a_rounds_limit_does_not_allow_is_no_option(longest: float, drafts: bool) -> None:
    """Rounds that may not have any node would unlearn n-grams for all requests."""
    policy = make_policy("smart", cost=FLAT)
    now = batch_of(2, has_free=True)
    rates = policy.predict(Shape.of(now, now.limits, longest)).rates
    assert (rates.keys() - {Mode.PLAIN} != set()) is drafts
    alone = policy.predict(replace(Shape.of(now, now.limits, longest), has_model=False)).rates
    assert (Mode.FREE in alone) is drafts


@pytest.mark.parametrize("waiting", [0, 400])
def test_catching_up_is_predicted_where_it_runs(waiting: int) -> None:
    """Later rounds have their share of it in the decision alone: requests wait for all of it."""
    policy = make_policy("smart", cost=FLAT, max_round_slowdown=math.inf)
    now = batch_of(2, catch_up_rows=waiting)
    rule = policy.plan(now)
    assert rule is not None
    trees = DraftTrees.empty(2)
    none = np.zeros(0, np.int64)
    first = float(FLAT.first_seconds(2, waiting, 200))
    plain = float(FLAT.verify_seconds(2, 2, 200))
    done = Round(now, rule, trees, none, none, np.full(2, 7), [2 + waiting], [first], 2, plain)
    policy.observe(done)
    assert policy.stats()["model_predicted_seconds"] == pytest.approx(1.0, rel=0.01)


def test_other_costs_begin_without_what_was_learned_of_the_first() -> None:
    policy = make_policy("smart", cost=FLAT)
    policy.state.with_model.observe(4, 10.0, 40.0)
    policy.state.free.observe(4, 10.0, 40.0)
    fresh = make_policy("smart", cost=FLAT).state
    policy.cost = FLAT
    assert policy.state.with_model.of(4) == fresh.with_model.of(4)
    assert policy.state.free.of(4) == fresh.free.of(4)


def test_a_dropped_draft_counts_against_the_model() -> None:
    policy = make_policy("smart", cost=FLAT)
    now = batch_of(1)
    assert policy.plan(now) is not None
    before = policy.state.with_model.of(1)
    policy.observe(replace(undrafted(now, 22.0), lost_seconds=30.0))
    assert policy.state.with_model.of(1) == before  # until a draft has come to its end
    policy.state.with_model.observe(1, 2.0, 2.0)
    assert before / 2 < policy.state.with_model.of(1) < before


def test_a_round_that_nothing_predicted_is_no_figure_of_predictions() -> None:
    """Its own seconds in place of predicted ones would say that all is well."""
    policy = make_policy("smart", cost=FLAT)
    policy.observe(undrafted(batch_of(8), 22.0))
    assert "plain_predicted_seconds" not in policy.stats()
    policy.plan(batch_of(4))
    policy.observe(undrafted(batch_of(8), 22.0))
    assert "plain_predicted_seconds" not in policy.stats()


@pytest.mark.parametrize("size", [1, 4])
def test_the_books_agree_with_what_happened(size: int) -> None:
    """A world 1.3 times as slow as its table, in which each level takes twice as long."""
    real = CostModel.from_table(
        {1: {1: 28.0, 8: 32.2, 16: 39.8, 32: 58.9, 64: 96.5}},
        {rows: 2 * seconds for rows, seconds in DRAFT.items()},
    )
    world = World(5, size, real)
    policy = make_policy("smart", cost=FLAT)
    mine = run(policy, world, range(400))
    plain = run(make_policy("off"), world, range(400))
    stats = policy.stats()
    assert stats["model_predicted_seconds"] == pytest.approx(1.0, abs=0.04)
    assert stats["model_expected_tokens"] == pytest.approx(1.0, abs=0.06)
    assert stats["estimated_speedup"] == pytest.approx(mine.rate / plain.rate, rel=0.06)


def test_no_estimate_exceeds_the_tokens_of_a_round() -> None:
    """A plain round takes no longer than one that drafts, whatever a wrong table says."""
    slow = CostModel.from_table({1: {1: 60.0, 64: 61.0}}, DRAFT)
    world = World(5, 1, FLAT)
    policy = make_policy("smart", cost=slow)
    mine = run(policy, world, range(6))
    assert policy.stats()["estimated_speedup"] <= mine.tokens / 6 + 1e-9
