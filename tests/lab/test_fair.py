"""A fair comparison: rivals tuned by replay, one contestant for each tree, policy gain beside
wall-clock gain."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import worlds

from smart_decoding.bench.options import Arm
from smart_decoding.core.costs import CostModel
from smart_decoding.errors import ConfigError
from smart_decoding.measuring.resume import Progress
from smart_lab import tuning
from smart_lab.bench import Bench
from smart_lab.options import LabOptions
from smart_lab.recorder import AT_ONCE, record_wide
from smart_lab.replay import replay
from smart_lab.sections import UNKNOWN, RatioCell
from smart_lab.sweep import likelihood_settings
from smart_lab.synthetic import synthetic
from smart_lab.tables import over
from smart_lab.trace import Trace
from smart_lab.tuning import (
    CHAINS,
    LENGTHS,
    Tuner,
    best_chain,
    distinct,
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


def test_settings_that_verify_the_same_trees_are_one_contestant(
    trace: Trace, capsys: pytest.CaptureFixture[str]
) -> None:
    chain = Arm("chain", {"length": 2})
    same = Arm("eagle2", {"depth": 1, "top_k": 1, "total_tokens": 3})
    other = Arm("eagle2", {"depth": 1, "top_k": 2, "total_tokens": 3})
    assert distinct([chain, same, other], trace, 2) == [chain, other]
    assert f"{same.label} verifies the trees of {chain.label}" in capsys.readouterr().err
    assert distinct([same, Arm("smart"), chain], trace, 2) == [same, Arm("smart")]


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


def test_a_run_gets_both_gains(trace: Trace) -> None:
    bench = Bench.__new__(Bench)
    bench.options = LabOptions(policies=("off", "smart", "chain"))
    bench.progress = Progress(None, {})
    bench.tuner = Tuner(cast("Any", None), bench.options)
    bench.tuner._traces["own"] = trace  # recorded when first asked for
    bench._compared = {2: bench.options.arms}
    found = [
        {"policy": policy, "batch_size": 2, "task": task}
        for policy in ("off", "smart", "chain")
        for task in ("code", "all")
    ]
    bench._add_policy_gains(found)
    assert not any("policy_gain" in run for run in found if run["task"] == "code")
    plain, smart, chain = (run for run in found if run["task"] == "all")
    assert plain["policy_gain"] == 1.0
    assert smart["policy_gain"] > 1.1
    assert "smart_policy_over" not in smart
    assert chain["smart_policy_over"] == smart["policy_gain"] / chain["policy_gain"]


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


def test_tuning_and_gains_end_when_the_time_is_over(
    trace: Trace, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was begun is finished, the rest is left out and tried when a run goes on."""
    lab_options = LabOptions(tune_eagle2=2, tune_paper=True, tune_chains=True, batch_sizes=(1, 2))
    seconds = 0.0

    def clock() -> float:  # each look at it takes a second
        nonlocal seconds
        seconds += 1.0
        return seconds

    tuner = Tuner(cast("Any", None), lab_options, clock)
    tuner._traces = {"own": trace, "others": trace}
    arms = tuner.arms(2, Progress(None, {}), 30.0)
    assert {arm.policy for arm in arms} <= {"eagle2", "paper", *CHAINS}
    assert any(arm.policy == "eagle2" for arm in arms)
    assert seconds < 40
    assert "the time limit came before all settings were tried" in capsys.readouterr().err
    assert len(likelihood_settings()) > 100
    contestants = [*lab_options.arms, Arm("chain"), Arm("eagle2")]
    progress = Progress(None, {})
    assert tuner.gains(contestants, 2, progress, seconds) == {}
    assert not progress.units("policy gains, batch 2")
    assert list(tuner.gains(contestants, 2, progress, seconds + 3.0)) == ["off", "smart"]
    assert not progress.units("policy gains, batch 2")
    assert len(tuner.gains(contestants, 2, progress, seconds + 99.0)) == 4
    assert len(progress.units("policy gains, batch 2")[0]) == 4


def test_a_recording_ends_when_the_time_is_over() -> None:
    engine = worlds.engine(worlds.Clock(), drafter=worlds.RuleDrafter(worlds.Clock()))
    late = iter([False, True])
    prompts = {"code": worlds.prompts(count=20)}
    found = record_wide(cast("Any", SimpleNamespace(engine=engine)), prompts, lambda: next(late))
    assert len(found.answers) == 2 * AT_ONCE


def runs() -> list[dict[str, Any]]:
    shared = {"batch_size": 1, "task": "all", "identical": True, "blocks": 2}
    ratios = {"speedup_low": 1.1, "speedup_high": 1.4}
    plain = {**shared, "policy": "off", "speedup": 1.0, "policy_gain": 1.0, "noise": 1.0}
    smart = {**shared, **ratios, "policy": "smart", "speedup": 1.3, "policy_gain": 1.27}
    rival = {**shared, **ratios, "policy": "chain", "speedup": 1.21, "policy_gain": 1.25}
    rival |= {"smart_over": 1.08, "smart_policy_over": 1.016}
    return [plain, smart, rival]


def test_the_tables_show_both_gains() -> None:
    assert over(runs()).rows == [("chain", "1", RatioCell(1.08), "1.02")]
    kept = ("policy_gain", "smart_policy_over")
    bare = [{name: v for name, v in run.items() if name not in kept} for run in runs()]
    assert over(bare).rows == [("chain", "1", RatioCell(1.08), UNKNOWN)]
