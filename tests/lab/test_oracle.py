"""The dynamic programme against exhaustive search, and against policies."""

from functools import cache

import numpy as np
import pytest

from smart_decoding.core.cost import CostModel
from smart_decoding.core.policies import make_policy
from smart_lab.oracle import oracle, reachable
from smart_lab.recording import Recording
from smart_lab.replay import HostCosts, StepCosts, replay
from smart_lab.synthetic import synthetic

COST = CostModel.from_table(
    {b: {n: 1.0 + 0.001 * n * n for n in range(1, 200)} for b in (1, 4)},
    {1: 0.08, 4: 0.1, 64: 0.7},
    0.05,
)
HOST = HostCosts(0.02, 0.01, 0.05, 0.01)


@pytest.fixture(scope="module")
def recording() -> Recording:
    return synthetic(2.5, answers=10, length=14, context=7)


def best_by_search(recording: Recording, number: int) -> float:
    """Least seconds for one answer, trying everything."""
    depth, costs, answer = reachable(recording), StepCosts(COST, 1), recording.answers[number]

    @cache
    def least(at: int, pending: int) -> float:
        if at == answer.positions:
            return 0.0
        context = answer.prompt_length + at
        options = [costs.verify(1, context) + HOST.seconds(1, False) + least(at + 1, pending + 1)]
        for k in range(1, depth[answer.first + at] + 1):
            emitted = min(k + 1, answer.positions - at)
            spent = costs.draft(pending, context) + (k - 1) * costs.draft(1, context)
            options.append(
                spent
                + costs.verify(1 + k, context)
                + HOST.seconds(1, True)
                + least(at + emitted, emitted)
            )
        return min(options)

    return least(0, answer.prompt_length)


def test_the_programme_finds_what_exhaustive_search_finds(recording):
    for number in (0, 3):
        one = recording.take([number])
        found = oracle(one, COST, 1, HOST)
        assert found.reached == found.bound
        assert one.answers[0].positions / found.reached == pytest.approx(
            best_by_search(recording, number)
        )


def test_reachable_is_what_an_unlimited_tree_accepts(recording):
    depth = reachable(recording)
    policy = make_policy("eagle2", depth=7, top_k=10, total_tokens=4096)
    wide = replay(policy, recording, COST, 1)
    assert depth.max() > 3
    assert depth.min() == 0
    walked = at = 0
    for answer in recording.answers:
        at = 0
        while at < answer.positions:
            walked, at = walked + 1, at + 1 + int(depth[answer.first + at])
    assert (
        wide.rounds <= walked * 1.1
    )  # the policy's own beam is a little narrower than the recording


@pytest.mark.parametrize("batch", [1, 4])
def test_no_policy_beats_the_bound_and_the_plan_beats_the_policies(recording, batch):
    found = oracle(recording, COST, batch, HOST)
    rates = [
        replay(make_policy(name, {"cost": COST}), recording, COST, batch, HOST).tokens_per_s
        for name in ("off", "smart", "eagle2", "paper")
    ]
    assert max(rates) < found.reached <= found.bound * (1 + 1e-9)
    assert found.bound < 9 * rates[0]


def test_where_drafting_never_pays_hindsight_decodes_plainly(recording):
    dear = CostModel.from_table({1: {1: 1.0, 2: 1.0, 3: 90.0, 64: 900.0}}, {1: 10.0, 64: 90.0})
    plain = replay(make_policy("off"), recording, dear, 2)
    found = oracle(recording, dear, 2)
    assert found.reached == pytest.approx(plain.tokens_per_s)
    assert np.isfinite(found.bound)
