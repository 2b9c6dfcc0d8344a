"""Each variant changes the one thing that it says."""

import numpy as np
import pytest

from smart_decoding.core.costs import CostModel
from smart_decoding.core.tree import DraftTrees
from smart_lab.ablations import (
    ABLATIONS,
    VARIANTS,
    EvenKeep,
    FrozenCosts,
    askew,
    flat,
    raw,
    smart,
)
from smart_lab.regret import MACHINES
from smart_lab.replay import Replayed, Walk, draft, replay
from smart_lab.simulation import World, run
from smart_lab.synthetic import synthetic
from smart_lab.trace import Trace

FLAT = CostModel.from_table(
    {1: {1: 1.0, 8: 1.05, 64: 3.0}, 8: {8: 1.1, 64: 3.1}}, {1: 0.2, 64: 0.3}, 0.01
)


@pytest.fixture(scope="module")
def trace() -> Trace:
    return Trace(synthetic(3.0, answers=16, length=30, context=50), {}, (), FLAT)


@pytest.fixture(scope="module")
def speeds(trace):
    return {
        name: replay(make(trace, FLAT), trace.recording, FLAT, 4)
        for name, make in ABLATIONS.items()
    }


def test_every_variant_decodes_all_answers_and_smart_is_no_worse_than_the_clumsy_ones(speeds):
    assert all(
        result.tokens >= 4 * result.rounds and result.missing < result.rounds
        for result in speeds.values()
    )
    best = speeds["smart"].tokens_per_s
    assert best > 1.02 * speeds["stop rule: always 8 levels"].tokens_per_s
    assert best > 0.93 * max(result.tokens_per_s for result in speeds.values())
    assert levels_of(speeds["stop rule: always 8 levels"]) > 6


def levels_of(result: Replayed) -> float:
    """Levels of a round that drafts."""
    return result.levels / (result.rounds - result.off)


def test_an_even_budget_gives_every_request_as_many_nodes(trace):
    policy = ABLATIONS["even budget"](trace, FLAT)
    done = draft(policy, Walk(trace.recording, 8))
    counts = np.bincount(done.trees.owner[done.kept], minlength=8)
    pooled = draft(smart(trace, FLAT), Walk(trace.recording, 8))
    others = np.bincount(pooled.trees.owner[pooled.kept], minlength=8)
    assert counts.min() == counts.max() > 0
    assert others.min() < others.max()


def test_the_greedy_rule_is_caught_by_a_step_that_the_scan_sees_over(trace):
    steps = {1: {n: 1.0 + 0.6 * (n > 4) + 0.001 * n for n in range(1, 200)}}
    step = CostModel.from_table(steps, {1: 0.01, 64: 0.02})
    exact, greedy = (
        draft(ABLATIONS[name](trace, step), Walk(trace.recording, 4))
        for name in ("smart", "greedy rule")
    )
    assert len(greedy.kept) == 0 < len(exact.kept)


def test_raw_confidence_is_taken_for_the_truth_and_nothing_is_learned():
    trees = DraftTrees.empty(1)
    trees.append([0, 0], [1, 2], [-1, -1], [0.6, 0.2])
    calibration = raw()
    assert calibration.score(trees, np.array([True])) == pytest.approx([0.6, 0.2], abs=0.03)
    before = calibration.counts.copy()
    for _ in range(50):
        calibration.observe(trees, np.array([0, 1]), np.array([False, False]), np.array([True]))
    assert (calibration.counts == before).all()
    assert calibration.score(trees, np.array([True]))[0] > 0.5


def test_flat_costs_know_no_context():
    cost = CostModel(FLAT.verify, FLAT.draft, 1e-4, 1e-3, 1e-4)
    made = flat(cost)
    assert made.verify_seconds(4, 9, 128.0) == pytest.approx(cost.verify_seconds(4, 9, 128.0))
    assert (
        made.verify_seconds(4, 9, 5000.0)
        == made.verify_seconds(4, 9, 128.0)
        < cost.verify_seconds(4, 9, 5000.0)
    )
    assert made.draft_seconds(6, 9000.0) == pytest.approx(cost.draft_seconds(6, 128.0))


def test_frozen_costs_stay_as_they_were_believed(trace):
    assumed = CostModel.from_table({1: {1: 2.0, 64: 9.0}}, {1: 0.5, 64: 0.9})
    frozen, learning = FrozenCosts(smart(trace, assumed)), smart(trace, assumed)
    replay(frozen, trace.recording, FLAT, 2)
    replay(learning, trace.recording, FLAT, 2)
    assert frozen.inner.cost is assumed
    error = [
        abs(float(c.verify_seconds(2, 4, 60.0)) - float(FLAT.verify_seconds(2, 4, 60.0)))
        for c in (assumed, learning.cost)
    ]
    assert error[1] < 0.3 * error[0]


def test_a_wrong_profile_keeps_the_smallest_forward():
    wrong = askew(FLAT, 5.0, 4.0)
    assert float(wrong.verify_seconds(1, 1, 0.0)) == pytest.approx(1.0)
    assert float(wrong.verify_seconds(1, 64, 0.0)) == pytest.approx(1 + 5 * 2.0)
    assert float(wrong.draft_seconds(1, 0.0)) == pytest.approx(0.8)


def test_variants_wrap_a_running_policy(trace):
    own = replay(smart(trace, FLAT), trace.recording, FLAT, 4, rounds=60)
    for name, wrap in VARIANTS.items():
        found = replay(wrap(smart(trace, FLAT)), trace.recording, FLAT, 4, rounds=60)
        assert found.tokens >= 4 * found.rounds, name
        if name.startswith("expensive"):  # drafting seems not to pay, until rounds tell otherwise
            assert found.off > own.off + 10


def test_a_variant_exchanges_data_that_executes_by_itself(trace):
    """Whoever follows the rule, in one call or level by level, follows the variant."""
    batch = Walk(trace.recording, 2).state()
    own = smart(trace, FLAT).plan(batch)
    exchanged = VARIANTS["all_levels"](smart(trace, FLAT)).plan(batch)
    assert own.expand != exchanged.expand
    assert isinstance(exchanged.keep, type(own.keep))
    assert isinstance(VARIANTS["even_budget"](smart(trace, FLAT)).plan(batch).keep, EvenKeep)


def test_looking_back_stops_at_the_level_that_made_the_round_worse(trace):
    expensive = CostModel.from_table({1: {1: 1.0, 64: 1.5}}, {1: 0.5, 64: 0.6})
    back, all_of_them = (
        replay(ABLATIONS[name](trace, expensive), trace.recording, expensive, 2, rounds=40)
        for name in ("stop rule: look back", "stop rule: always 8 levels")
    )
    assert 1 < levels_of(back) < 4
    assert levels_of(all_of_them) > 6


@pytest.mark.parametrize(("name", "noticed"), [("smart", True), ("no test for change", False)])
def test_without_its_test_a_drafter_that_becomes_bad_is_not_said_to_have_changed(
    trace, name, noticed
):
    costs = MACHINES["cheap rows"]
    policy = ABLATIONS[name](trace, costs)
    run(policy, World(1, 4, costs, good=lambda index: index < 20), range(60))
    assert (policy.state.calibration.changes > 0) == noticed


def test_forecasts_that_are_not_corrected_are_believed(trace):
    costs = MACHINES["cheap rows"]
    policies = [ABLATIONS[name](trace, costs) for name in ("smart", "forecasts: not corrected")]
    for policy in policies:
        run(policy, World(1, 4, costs), range(40))
    corrected, believed = (policy.state.with_model.of(4) for policy in policies)
    assert believed == 1.0 != corrected
