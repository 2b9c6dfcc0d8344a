"""A fair comparison: rivals tuned by replay, one contestant for each tree, policy gain beside
wall-clock gain."""

from dataclasses import replace
from typing import Any, cast

import pytest

from smart_decoding.bench.options import Arm
from smart_decoding.core.costs import CostModel
from smart_decoding.errors import ConfigError
from smart_lab import tuning
from smart_lab.options import LabOptions
from smart_lab.replay import replay
from smart_lab.synthetic import synthetic
from smart_lab.trace import Trace
from smart_lab.tuning import (
    CHAINS,
    LENGTHS,
    Tuner,
    best_chain,
    gains,
    prompts_needed,
)

COST = CostModel.from_table(
    {1: {1: 1.0, 8: 1.05, 64: 3.0}, 8: {8: 1.1, 64: 3.1}}, {1: 0.05, 64: 0.3}, 0.01
)


@pytest.fixture(scope="module")
def trace() -> Trace:
    return Trace(synthetic(3.0, answers=8, length=24, context=50), {}, (), COST)


@pytest.mark.parametrize("policy", CHAINS)
def test_a_chain_is_tuned_over_its_length(trace: Trace, policy: str) -> None:
    found = best_chain(trace, policy, 2)
    rates = {}
    for length in LENGTHS:
        made = trace.policy(policy, COST, **{CHAINS[policy]: length})
        rates[length] = replay(made, trace.recording, COST, 2).tokens_per_s
    (length,) = found.options.values()
    assert rates[length] == max(rates.values()) > 1.02 * min(rates.values())
    assert found.label == f"{policy} tuned"


def test_policy_gains_are_replays_over_plain_decoding(trace: Trace) -> None:
    arms = [Arm("off"), Arm("smart"), Arm("smart", {"method": "union"}), Arm("chain")]
    found = gains(trace, arms, 2)
    assert list(found) == ["off", "smart", "chain"]  # another drafter is not in the recording
    assert found["off"] == 1.0
    rates = [
        replay(trace.policy(n, COST), trace.recording, COST, 2).tokens_per_s
        for n in ("smart", "off")
    ]
    assert found["smart"] == pytest.approx(rates[0] / rates[1])


def test_rivals_are_tuned_on_prompts_that_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"prompt {number}" for number in range(100)]
    monkeypatch.setattr(tuning, "load_task", lambda task, count: texts[:count])
    options = LabOptions(tasks=("code", "maths"), limit=20, batch_sizes=(16,))
    tuner = Tuner(cast("Any", None), options)
    measured = set(texts[:20])
    for others in tuner._other_texts().values():
        assert len(others) == prompts_needed(options) == 16
        assert not measured & set(others)
    with pytest.raises(ConfigError, match="no code prompts beyond the first 100"):
        Tuner(cast("Any", None), replace(options, limit=100))._other_texts()
