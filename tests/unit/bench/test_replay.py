"""A replay gives what the live engine gives, rows and tokens, round by round."""

from types import SimpleNamespace

import pytest
import worlds

from smart_decoding.bench.blocks import run_block
from smart_decoding.bench.replay import Wide, likelihood_settings, rank, record, replay
from smart_decoding.bench.tuning import best_likelihood, cost_of, record_wide
from smart_decoding.core.cost import CostModel
from smart_decoding.core.policies import make_policy
from smart_decoding.core.policies.off import Off
from smart_decoding.errors import ConfigError

ROW, LEVEL, LEVEL_ROW = 0.1, 0.25, 0.01
COST = CostModel.from_table(
    {b: {n: 1.0 + ROW * n for n in range(1, 400)} for b in (1, 2)},
    {n: LEVEL + LEVEL_ROW * n for n in range(1, 400)},
)


@pytest.fixture(scope="module")
def recording():
    clock = worlds.Clock()
    engine = worlds.engine(clock, drafter=worlds.RuleDrafter(clock))
    engine.policy = Wide(levels=3, children=2, width=4)
    return record(engine, worlds.prompts(count=4, tokens=30))


def test_every_position_has_its_tree(recording):
    for i, answer in enumerate(recording):
        assert len(answer.tokens) == 30 + i % 3 and len(answer.trees) == len(answer.tokens) - 1
        for t, tree in enumerate(answer.trees):
            assert tree.token[tree.children(-1, 1)[0]] == answer.tokens[t + 1]


@pytest.mark.parametrize("setting", [(0, 1, 2), (1, 2, 5), (2, 2, 4)])
def test_a_replay_equals_the_live_run(recording, setting):
    options = dict(zip(("depth", "top_k", "total_tokens"), setting, strict=True))
    clock = worlds.Clock()
    target = worlds.RuleTarget(clock, ROW)
    live = worlds.engine(clock, "likelihood", worlds.RuleDrafter(clock, True, LEVEL, LEVEL_ROW), target, **options)
    tokens, seconds, rounds = 0.0, 0.0, 0
    for prompt in worlds.prompts(count=4, tokens=30):
        counts = run_block(live, [prompt], [], 1, clock).counts
        tokens, seconds, rounds = tokens + counts.tokens, seconds + counts.seconds, rounds + counts.rounds
    found = replay(make_policy("likelihood", **options), recording, COST, 1)
    assert (found.tokens, found.rounds, found.missing) == (tokens, rounds, 0)
    assert found.seconds == pytest.approx(seconds)


def test_plain_decoding_and_batches(recording):
    found = replay(Off(), recording, COST, 2)
    assert found.tokens == 2 * found.rounds and found.tokens_per_s == pytest.approx(2 / 1.2)
    with pytest.raises(ConfigError, match="batch size 9"):
        replay(Off(), recording, COST, 9)


def test_what_the_recording_lacks_is_counted(recording):
    found = replay(make_policy("likelihood", depth=5, top_k=2), recording, COST, 1)
    assert found.missing > 0


def test_settings_are_ranked_by_throughput(recording):
    chosen = [{"depth": d, "top_k": 1, "total_tokens": d + 2} for d in range(3)]
    ranked = rank(recording, COST, 1, chosen)
    # Every draft is right: (d + 2) tokens in 1 + 0.1 (d + 2) + 0.26 (d + 1) seconds and more: the deepest is best.
    assert [setting["depth"] for setting, _ in ranked] == [2, 1, 0]


def test_the_grid_has_at_least_90_distinct_settings():
    grid = [tuple(s.values()) for s in likelihood_settings()]
    assert len(grid) == len(set(grid)) >= 90


def test_recording_needs_a_drafter():
    with pytest.raises(ConfigError, match="drafter"):
        record(worlds.engine(worlds.Clock()), worlds.prompts())


def test_tuning_records_once_and_leaves_the_policy_alone():
    clock = worlds.Clock()
    engine = worlds.engine(clock, "smart", worlds.RuleDrafter(clock), cost=COST)
    arm, policy = SimpleNamespace(engine=engine, policy=engine.policy), engine.policy
    tasks = {"code": worlds.prompts("code", 2, tokens=12), "maths": worlds.prompts("maths", 1, 2, tokens=12)}
    recording = record_wide(arm, tasks)
    assert engine.policy is policy and [len(a.tokens) for a in recording] == [12, 14, 13]
    arms = best_likelihood(recording, cost_of([arm]), 1, 3, ())
    assert len({a.label for a in arms}) == 3 and {a.policy for a in arms} == {"likelihood"}
    with pytest.raises(ConfigError, match="add smart"):
        cost_of([SimpleNamespace(policy=Off())])
