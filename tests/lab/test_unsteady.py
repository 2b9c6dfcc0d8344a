"""A machine that changes: the same work in the same state for everyone, and `smart` follows it."""

import numpy as np
import pytest

from smart_decoding.core.costs import CostModel
from smart_decoding.core.policies.off import Off
from smart_lab.ablations import askew, smart
from smart_lab.replay import replay
from smart_lab.synthetic import synthetic
from smart_lab.trace import Trace
from smart_lab.unsteady import Unsteady

DRAFT = {1: 0.3, 64: 1.2}
# Milliseconds of the two states of one machine: further rows are nearly free where all wait for the
# memory.
FAST = CostModel.from_table({8: {8: 6.1, 16: 9.3, 24: 12.0, 48: 20.0}}, DRAFT, 0.6)
SLOW = CostModel.from_table({8: {8: 8.0, 16: 8.8, 24: 10.5, 48: 19.0}}, DRAFT, 0.6)


@pytest.fixture(scope="module")
def trace() -> Trace:
    return Trace(synthetic(2.3, answers=80, length=60, context=100), {}, (), FAST)


def speedup(
    trace: Trace, states: list[CostModel], profile: CostModel, seed: int
) -> tuple[float, float]:
    """`smart` over plain decoding, and the share of its rounds without drafting."""
    ours, plain = (
        replay(policy, trace.recording, FAST, 8, costs=Unsteady(states, 8, 2000.0, seed=seed))
        for policy in (smart(trace, profile), Off())
    )
    return ours.tokens_per_s / plain.tokens_per_s, ours.off / ours.rounds


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.7])
def test_never_slower_where_drafting_does_not_pay_whatever_the_profile_says(trace, factor):
    found, off = speedup(trace, [FAST], askew(FAST, factor, factor), seed=1)
    assert found > 0.98
    assert off > 0.9


def test_drafts_in_the_state_where_it_pays(trace):
    known, off = speedup(trace, [SLOW], SLOW, seed=2)
    # From the other state's profile only plain rounds tell, when is a matter of luck.
    found, later = np.mean([speedup(trace, [SLOW], FAST, seed=seed) for seed in range(4)], axis=0)
    turning, _ = speedup(trace, [FAST, SLOW], FAST, seed=2)
    assert known > 1.08
    assert off < 0.3  # a request that has little by its drafts holds up the others
    assert found > 1.04
    assert later < 0.6
    assert turning > 0.985
