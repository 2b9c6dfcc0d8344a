"""The whole controller in the simulated world: regret, when it drafts, a drafter that goes bad and
recovers."""

from dataclasses import replace

import numpy as np
import pytest

from smart_decoding.core.calibration import Calibration
from smart_decoding.core.cost import CostModel, Curve
from smart_decoding.core.overhead import Overhead
from smart_decoding.core.policies import make_policy
from smart_decoding.core.policies.base import DraftPlan, Round
from smart_decoding.core.policies.catch_up import MAX_ROUNDS
from smart_decoding.core.policies.modes import BEGIN_SPEEDUP, BURN_IN, CLEARLY_WORSE
from smart_decoding.core.policies.round_state import RoundState
from smart_decoding.core.tree import DraftTrees
from smart_lab.simulation import World, full_knowledge, run

DRAFT = {1: 1.2, 4: 1.4, 8: 1.7, 16: 2.3, 64: 5.0}
FLAT = CostModel.from_table({1: {1: 21.6, 8: 24.8, 16: 30.6, 32: 45.3, 64: 74.2}}, DRAFT)
STEEP = CostModel.from_table({1: {1: 10.0, 64: 640.0}}, DRAFT)
CHEAP_ROWS = CostModel.from_table({1: {1: 30.0, 512: 40.0}}, DRAFT)


@pytest.mark.parametrize(
    ("costs", "batch", "rounds"), [(FLAT, 1, 250), (FLAT, 3, 80), (CHEAP_ROWS, 2, 100)]
)
def test_regret_against_full_knowledge_is_small(costs: CostModel, batch: int, rounds: int) -> None:
    world = World(5, batch, costs)
    span = range(rounds)
    best = full_knowledge(world, span, levels=5)
    policy = make_policy("smart", cost=costs)
    mine = run(policy, world, span)
    plain = run(make_policy("off"), world, span)
    assert best.rate > 1.15 * plain.rate  # there is something to gain
    assert mine.rate > 0.94 * best.rate
    stats = policy.stats()
    assert stats["estimated_speedup"] == pytest.approx(mine.rate / plain.rate, rel=0.1)
    assert stats["share_off"] < 0.1
    assert abs(stats["calibration_error"]) < 0.2


def test_stays_off_where_rows_cost_too_much() -> None:
    world = World(5, 4, STEEP)
    policy = make_policy("smart", cost=STEEP)
    totals = run(policy, world, range(200))
    plain = run(make_policy("off"), world, range(200))
    assert totals.rate > 0.985 * plain.rate
    assert policy.stats()["share_off"] > 0.9


def test_drafts_at_batch_32_where_rows_are_cheap() -> None:
    world = World(5, 32, CHEAP_ROWS)
    policy = make_policy("smart", cost=CHEAP_ROWS)
    totals = run(policy, world, range(12))
    assert totals.off == 0
    assert totals.rate > 1.3 * run(make_policy("off"), world, range(12)).rate


def test_a_wrong_cost_table_is_corrected() -> None:
    world = World(5, 1, FLAT)
    policy = make_policy(
        "smart", cost=STEEP
    )  # the profile says that rows are dear; in truth they are cheap
    run(policy, world, range(400))
    later = run(policy, world, range(400, 600))
    assert later.rate > 1.4 * run(make_policy("off"), world, range(400, 600)).rate


def test_rounds_of_a_backoff_tell_what_the_machine_has_become() -> None:
    policy = make_policy("smart", cost=STEEP, exploration_budget=0.0)
    now = World(5, 4, STEEP).state()
    policy.modes.burn_in[(4).bit_length()] = BURN_IN
    none = (
        DraftTrees.empty(4),
        np.zeros(0, np.int64),
        np.zeros(0, np.int64),
        np.ones(4, np.int64),
        [],
        [],
        4,
    )
    plain = float(STEEP.verify_seconds(4, 4, 200))
    planned = 0
    for index in range(300):
        plan = policy.plan(now)
        planned += policy._planned(now) is not None
        assert not plan.speculate
        policy.observe(Round(now, plan, *none, plain if index < 200 else 1.5 * plain))
    assert planned < 0.4 * 300  # it backs off
    assert float(policy.cost.verify_seconds(4, 4, 200)) == pytest.approx(1.5 * plain, rel=0.05)


def test_a_return_is_charged_its_share_of_what_catching_up_takes() -> None:
    waiting = {
        0: 1e-9,
        64: 1.0,
        512: 8.0,
        1024: 100.0,
    }  # a table that rises ever faster, as caches overflow
    table = CostModel.from_table({1: {1: 20.0, 64: 60.0}}, DRAFT)
    cost = replace(table, first=table.draft, waiting=Curve(tuple(waiting), tuple(waiting.values())))
    policy = make_policy("smart", cost=cost)
    first = {rows: policy.predict(World(5, 1, cost).state(rows)).first for rows in (0, 1024)}
    assert first[1024] - first[0] == pytest.approx(100.0 / MAX_ROUNDS, rel=0.01)


@pytest.mark.parametrize("seed", [5, 6, 7])
def test_off_soon_when_the_head_goes_bad_and_on_again_when_it_is_good(seed: int) -> None:
    bad_from = 300
    good_again = 800
    world = World(seed, 1, FLAT, good=lambda index: not bad_from <= index < good_again)
    policy = make_policy("smart", cost=FLAT)
    run(policy, world, range(100, bad_from))
    noticing = run(policy, world, range(bad_from, bad_from + 50))
    later = run(policy, world, range(bad_from + 50, good_again))
    assert later.off > 0.85 * 450  # the others explore
    plain = run(make_policy("off"), world, range(bad_from, good_again))
    assert (noticing.tokens + later.tokens) / (
        noticing.seconds + later.seconds
    ) > 0.975 * plain.rate
    # Noticed after 20 to 150 rounds, by the luck of exploration.
    run(policy, world, range(good_again, good_again + 200))
    later = range(good_again + 200, good_again + 400)
    never_bad = make_policy("smart", cost=FLAT)
    run(never_bad, world, range(100, bad_from))
    assert run(policy, world, later).rate > 0.95 * run(never_bad, world, later).rate


def test_an_untrained_head_costs_little_from_the_first_round() -> None:
    world = World(5, 1, FLAT, good=lambda _: False)
    totals = run(make_policy("smart", cost=FLAT), world, range(400))
    plain = run(make_policy("off"), world, range(400))
    assert totals.rate > 0.97 * plain.rate


@pytest.mark.parametrize("overhead", [2.0, 6.0])
def test_what_a_drafting_round_takes_beyond_its_forwards_counts_in_exploration_too(
    overhead: float,
) -> None:
    """Drafts that would pay if deciding about them took no time."""
    costs = CostModel.from_table({1: {1: 10.0, 2: 10.2, 64: 640.0}}, DRAFT)
    world = World(5, 1, costs, ease=-0.6, overhead=overhead)
    policy = make_policy("smart", cost=costs)
    run(policy, world, range(300))  # while it learns the overhead, of which it knew nothing
    assert policy.costs.overhead.of(1)[1] == pytest.approx(overhead, rel=0.05)
    totals, plain = (run(each, world, range(300, 1500)) for each in (policy, make_policy("off")))
    assert totals.rate > 0.985 * plain.rate
    assert (totals.off > 0.95 * 1200) == (overhead > 3.0)


def test_overhead_is_learned_apart_for_small_and_large_batches() -> None:
    overhead = Overhead(0.4)
    assert overhead.of(2) == (0.0, 0.4)
    for _ in range(8):
        overhead.observe(2, 1.5, speculated=True)
        overhead.observe(2, 0.2, speculated=False)
    assert overhead.of(2) == pytest.approx((0.2, 1.3), rel=0.01)
    for _ in range(8):
        overhead.observe(16, 6.0, speculated=True)
        overhead.observe(16, 2.0, speculated=False)
    assert overhead.of(16) == pytest.approx((2.0, 4.0))
    assert overhead.of(3) == pytest.approx((0.2, 1.3), rel=0.01)
    assert overhead.of(64) == overhead.of(3)  # nothing is known: as learned last


def test_backoffs_of_batches_of_different_sizes_are_learned_from_apart() -> None:
    policy = make_policy("smart", cost=STEEP, exploration_budget=0.0)
    table = {}
    for size in (16, 1):
        world = World(5, size, STEEP)
        plain = table[size] = float(STEEP.verify_seconds(size, size, 200))
        none = (
            DraftTrees.empty(size),
            np.zeros(0, np.int64),
            np.zeros(0, np.int64),
            np.ones(size, np.int64),
            [],
            [],
        )
        for _ in range(60):
            policy.observe(Round(now := world.state(), policy.plan(now), *none, size, plain))
        if size == 16:
            policy.modes.backoff.begin(8, 16)
            for _ in range(4):  # of these eight, and then fifteen requests end at once
                policy.observe(Round(now := world.state(), policy.plan(now), *none, size, plain))
    for size, plain in table.items():
        assert float(policy.cost.verify_seconds(size, size, 200)) == pytest.approx(plain, rel=0.02)


def test_greedy_and_sampled_requests_have_forecasts_of_their_own() -> None:
    policy = make_policy("smart", cost=FLAT)
    state = World(5, 1, FLAT).state()
    greedy, sampled = (replace(state, temperature=np.array([t])) for t in (0.0, 1.0))
    forecasts = [
        policy.forecaster.kept_or_new(RoundState.of(batch), 0)
        for batch in (greedy, sampled, greedy)
    ]
    assert forecasts[0] is forecasts[2] is not forecasts[1]


def test_what_free_drafters_propose_to_requests_that_may_not_use_it_counts_for_nothing() -> None:
    forecast = make_policy("smart", cost=FLAT).forecast
    trees = DraftTrees.empty(8)
    trees.append(np.arange(8), np.zeros(8, np.int64), np.full(8, -1), np.full(8, 0.3))
    trees.accept_prob = np.full(8, 0.3)
    for _ in range(200):
        forecast.observe_free(trees, np.array([4, 0, 0, 0, 0, 0, 0, 0]))
    assert forecast.free[0] == pytest.approx(0.3, rel=0.01)


def test_exploration_keeps_to_its_budget() -> None:
    world = World(5, 1, FLAT, good=lambda _: False)
    policy = make_policy("smart", cost=FLAT, exploration_budget=0.01)
    run(policy, world, range(200))
    spent = policy.exploration.spent
    totals = run(policy, world, range(200, 900))
    assert 0 < policy.exploration.spent - spent < 0.012 * totals.seconds
    silent = make_policy("smart", cost=FLAT, exploration_budget=0.0)
    run(silent, world, range(200))
    assert silent.exploration.count == 0


def test_round_slowdown_is_bounded_for_several_requests() -> None:
    world = World(5, 4, CHEAP_ROWS)
    plain = float(CHEAP_ROWS.verify_seconds(4, 4, 200))
    slow = []

    class Watched:
        name = "watched"
        policy = make_policy("smart", cost=CHEAP_ROWS, max_round_slowdown=1.2)

        def __getattr__(self, call: str):
            return getattr(self.policy, call)

        def observe(self, round: Round) -> None:
            slow.append((round.verify_seconds + sum(round.level_seconds)) / plain)
            self.policy.observe(round)

    run(Watched(), world, range(60))
    assert (
        max(slow) < 1.2 * 1.02
    )  # 2 %: forecasts are kept for some rounds while costs are corrected
    assert np.mean(np.array(slow) > 1.05) > 0.5  # and drafting does go on below it


def test_free_drafters_alone_are_used_and_learned() -> None:
    policy = make_policy("smart", cost=FLAT)
    now = World(5, 2, FLAT).state()
    now = type(now)(
        now.context,
        now.remaining,
        now.temperature,
        now.may_speculate,
        has_model=False,
        has_free=True,
    )
    drafted = 0
    for _ in range(200):
        plan = policy.plan(now)
        trees = DraftTrees.empty(2)
        if plan.speculate:
            assert plan.levels == 0
            trees.append([0, 0], [1, 2], [-1, 0], [0.9, 0.9], source=1)
            drafted += 1
        kept = policy.select(plan, now, trees)
        next_token = np.full(len(trees), -1)
        next_token[kept] = [2, 9][: len(kept)]
        policy.observe(
            Round(now, plan, trees, kept, next_token, np.array([1, 7]), [], [], 2 + len(kept), 22.0)
        )
    assert drafted > 150
    assert policy.forecast.free[0] == pytest.approx(
        0.5, abs=0.05
    )  # one request of the two proposes, and is right


def test_survives_a_caller_that_skips_the_plan_and_absurd_times() -> None:
    policy = make_policy("smart", cost=FLAT)
    now = World(5, 1, FLAT).state()
    trees = DraftTrees.empty(1)
    trees.append([0], [1], [-1], [0.9])
    assert policy.select(DraftPlan(True, 1), now, trees).tolist() == [0]
    for seconds in (float("nan"), 0.0, -1.0):
        plan = policy.plan(now)
        policy.observe(
            Round(
                now,
                plan,
                trees,
                np.array([0]),
                np.array([3]),
                np.array([1]),
                [1],
                [seconds],
                2,
                seconds,
            )
        )
    assert np.isfinite(policy.predict(now).plain)
    assert policy.plan(now).speculate


def test_starts_from_the_shipped_prior() -> None:
    good = Calibration()
    hopeless = Calibration(good.prior * 0.02)
    now = World(5, 1, FLAT).state()
    assert make_policy("smart", cost=FLAT, calibration=good).plan(now).speculate
    policy = make_policy("smart", cost=FLAT, calibration=hopeless)
    assert policy.predict(now).predicted_speedup < BEGIN_SPEEDUP
    policy.modes.burn_in[1] = BURN_IN
    assert not policy.plan(now).speculate


def test_what_nearly_pays_is_tried_once_at_each_size() -> None:
    """Predictions are off by a few per cent, and what is not drafted teaches nothing."""
    costs = CostModel.from_table({8: {8: 10.0, 9: 10.7, 16: 15.6, 64: 60.0}}, {1: 0.2, 64: 1.0})
    real = CostModel.from_table({8: {8: 10.0, 9: 10.4, 16: 13.0, 64: 60.0}}, {1: 0.2, 64: 1.0})
    world = World(5, 8, real)
    policy = make_policy("smart", cost=costs, exploration_budget=0.0)
    predicted = policy.predict(world.state()).predicted_speedup
    assert CLEARLY_WORSE < predicted < BEGIN_SPEEDUP
    totals, plain = (run(each, world, range(400)) for each in (policy, make_policy("off")))
    assert totals.off < 100
    assert totals.rate > 1.02 * plain.rate
