"""A replay gives what the live engine gives, rows and tokens, round by round."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import worlds

from smart_decoding.bench.blocks import Counts, run_block
from smart_decoding.core.costs import CostModel
from smart_decoding.core.policies import make_policy
from smart_decoding.core.policies.off import Off
from smart_decoding.core.tree import DraftTrees
from smart_decoding.drafters.free import FreeDrafter
from smart_decoding.drafters.ngram import NgramDrafter
from smart_decoding.drafters.union import UnionDrafter
from smart_decoding.errors import ConfigError
from smart_lab.recorder import record_wide
from smart_lab.recording import Recording, Wide, record
from smart_lab.replay import HostCosts, Prompts, StepCosts, replay
from smart_lab.sweep import Fixed, add_up

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
    for i, answer in enumerate(recording.answers):
        assert len(answer.tokens) == answer.limit == 30 + i % 3
        assert answer.prompt_length == 3
        for t in range(answer.positions):
            first = recording.child[answer.first + t]  # the drafter's first choice is right
            assert recording.token[first] == answer.tokens[t + 1]
    assert recording.positions == sum(a.positions for a in recording.answers)
    assert set(recording.sizes.tolist()) == {2 + 4 + 8}


def test_trees_are_kept_breadth_first_and_answers_can_be_picked(recording):
    tree = DraftTrees.empty(1)
    tree.append([0, 0], [5, 6], [-1, -1], [0.5, 0.25])
    tree.append(
        [0, 0, 0], [7, 8, 9], [1, 0, 1], [0.5, 0.25, 0.125]
    )  # children of the second node first
    made = Recording.of([(1, 9, [1, 2], [tree], "code")])
    assert made.token.tolist() == [5, 6, 8, 7, 9]
    assert made.count.tolist() == [2, 1, 2, 0, 0, 0]
    assert made.child[[0, 1, 2]].tolist() == [0, 2, 3]
    picked = recording.take([2, 0])
    assert [a.tokens.tolist() for a in picked.answers] == [
        recording.answers[i].tokens.tolist() for i in (2, 0)
    ]
    alone = [
        replay(make_policy("eagle2", depth=1, top_k=2), recording.take([i]), COST, 1)
        for i in (2, 0)
    ]
    both = replay(make_policy("eagle2", depth=1, top_k=2), picked, COST, 1)
    assert both.tokens == sum(r.tokens for r in alone)
    assert both.seconds == pytest.approx(sum(r.seconds for r in alone))
    with pytest.raises(ValueError, match="contradicting"):
        Recording.from_flat(made.answers, made.token, made.prob, made.count, np.array([4]))


@pytest.mark.parametrize("setting", [(0, 1, 2), (1, 2, 5), (2, 2, 4)])
def test_a_replay_equals_the_live_run(recording, setting):
    options = dict(zip(("depth", "top_k", "total_tokens"), setting, strict=True))
    clock = worlds.Clock()
    target = worlds.RuleTarget(clock, ROW)
    live = worlds.engine(
        clock, "eagle2", worlds.RuleDrafter(clock, True, LEVEL, LEVEL_ROW), target, **options
    )
    counts = Counts()
    for prompt in worlds.prompts(count=4, tokens=30):
        counts += run_block(live, [prompt], [], 1, clock).counts
    found = replay(make_policy("eagle2", **options), recording, COST, 1)
    assert (found.tokens, found.rounds, found.missing) == (counts.tokens, counts.rounds, 0)
    assert found.rows == counts.rows
    assert found.seconds == pytest.approx(counts.seconds)  # of all levels, too


class Wrong(FreeDrafter):
    """Proposes two chains of three tokens that neither the target nor the model would choose."""

    def propose(self, requests, rule):
        trees = DraftTrees.empty(len(requests))
        owner = np.repeat(np.arange(len(requests)), 2)
        token = np.array([[900, 901] for _ in requests]).ravel()
        above = np.full(len(owner), -1)
        for _ in range(3):
            before = len(trees)
            trees.append(owner, token, above, np.full(len(owner), 0.9))
            above = np.arange(before, len(trees))
        return trees


def test_a_union_is_recorded_by_its_model_alone(recording):
    """The model expands what free drafters propose, whose nodes are no part of its trees."""
    clock = worlds.Clock()
    model = worlds.RuleDrafter(clock)
    engine = worlds.engine(clock, "eagle2", UnionDrafter([model, Wrong()]))
    before = engine.policy, engine.drafter
    prompts = {"code": worlds.prompts(count=4, tokens=30)}
    found = record_wide(SimpleNamespace(engine=engine), prompts)
    assert (engine.policy, engine.drafter) == before
    alone = worlds.engine(worlds.Clock(), "eagle2", worlds.RuleDrafter(clock))
    expected = record_wide(SimpleNamespace(engine=alone), prompts)
    for name in ("token", "prob", "count", "child"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert not found.free


@pytest.fixture(scope="module")
def repeated():
    """Prompts that hold what their answers say."""
    found = []
    for prompt in worlds.prompts(count=4, tokens=30):
        first = 17 * prompt.index + 1
        found.append(replace(prompt, tokens=[*range(first, first + 25), first, first + 1]))
    return found


@pytest.fixture(scope="module")
def free(repeated):
    engine = worlds.engine(worlds.Clock(), drafter=NgramDrafter())
    return record_wide(SimpleNamespace(engine=engine), {"code": repeated})


@pytest.mark.parametrize(
    ("policy", "options"), [("eagle2", {"total_tokens": 4}), ("chain", {"length": 3}), ("off", {})]
)
def test_n_grams_are_replayed_as_they_are_drafted_live(repeated, free, policy, options):
    """Whole trees, which take no level of a model."""
    assert free.free
    clock = worlds.Clock()
    live = worlds.engine(clock, policy, NgramDrafter(), worlds.RuleTarget(clock, ROW), **options)
    counts = Counts()
    for prompt in repeated:
        counts += run_block(live, [prompt], [], 1, clock).counts
    found = replay(make_policy(policy, **options), free, COST, 1)
    assert (found.tokens, found.rounds) == (counts.tokens, counts.rounds)
    assert (found.rows, found.levels) == (counts.rows, 0)
    assert found.seconds == pytest.approx(counts.seconds)
    assert (found.tokens_per_round > 1.5) == (policy != "off")


@pytest.fixture(scope="module")
def union(repeated, free):
    """The same answers by a model whose first proposal is wrong."""
    clock = worlds.Clock()
    engine = worlds.engine(clock, drafter=worlds.RuleDrafter(clock, good=False))
    engine.policy = Wide(levels=3, children=2, width=9)
    return record(engine, repeated).beside(free)


@pytest.mark.parametrize("setting", [(0, 2, 4), (1, 2, 5), (2, 2, 7)])
def test_a_union_is_replayed_as_it_is_drafted_live(repeated, union, setting):
    """Equal nodes are one, and count in one drafter's children."""
    options = dict(zip(("depth", "top_k", "total_tokens"), setting, strict=True))
    clock = worlds.Clock()
    model = worlds.RuleDrafter(clock, False, LEVEL, LEVEL_ROW)
    drafter = UnionDrafter([model, NgramDrafter()])
    live = worlds.engine(clock, "eagle2", drafter, worlds.RuleTarget(clock, ROW), **options)
    counts = Counts()
    for prompt in repeated:
        counts += run_block(live, [prompt], [], 1, clock).counts
    found = replay(make_policy("eagle2", **options), union, COST, 1)
    assert (found.tokens, found.rounds, found.rows) == (counts.tokens, counts.rounds, counts.rows)
    model_alone = replay(make_policy("eagle2", **options), replace(union, ngrams=None), COST, 1)
    assert found.rounds < model_alone.rounds


class Watching(Off):
    """Plain decoding that remembers its rounds."""

    def __init__(self):
        self.rounds = []

    def observe(self, round):
        batch = round.batch
        self.rounds.append(
            (batch.size, batch.prefill_rows, round.verify_rows, batch.context.tolist())
        )


@pytest.mark.parametrize("chunk", [7, 60])
def test_prompts_are_read_as_by_the_live_scheduler(repeated, free, chunk):
    """In chunks, beside the answers that run already, whenever a request leaves."""
    live, replayed = Watching(), Watching()
    engine = worlds.engine(worlds.Clock(), drafter=NgramDrafter(), batch=3)
    engine.policy, engine.scheduler.chunk = live, chunk
    for turn in range(2):
        for prompt in repeated:
            engine.add_request(f"{turn}-{prompt.index}", prompt.tokens, prompt.params)
    while engine.has_unfinished_requests:
        engine.step()
    steps = StepCosts(COST, 3, prompts=Prompts(chunk, 0.75))
    found = replay(replayed, free.repeated(2), COST, 3, costs=steps)
    assert replayed.rounds == live.rounds[: len(replayed.rounds)]
    assert len(replayed.rounds) > 60
    assert 0 < found.with_prompts == found.rounds - found.off
    mixed = [rows for _, prompts, rows, _ in replayed.rounds if prompts]
    assert len(mixed) > 4
    assert max(mixed) >= 2 + min(chunk, 27)


def test_prompts_take_their_share_of_the_tables_seconds(free):
    def taken(share):
        steps = StepCosts(COST, 2, prompts=Prompts(64, share))
        return replay(Off(), free, COST, 2, costs=steps).seconds

    rows = 27 * 4 - 1  # of the four prompts; the first round's first row begins the forward
    assert taken(1.0) - taken(0.75) == pytest.approx(0.25 * ROW * rows)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("setting", [(0, 1, 2), (1, 2, 5), (2, 2, 4), (5, 2, 9)])
def test_trees_drawn_once_give_what_the_replay_gives(recording, batch, setting):
    policy = make_policy(
        "eagle2", **dict(zip(("depth", "top_k", "total_tokens"), setting, strict=True))
    )
    host = HostCosts(0.01, 0.002, 0.03, 0.004)
    slow = replay(policy, recording, COST, batch, host)
    fast = add_up(Fixed.draw(policy, recording), recording, COST, batch, host)
    assert fast.seconds == pytest.approx(slow.seconds)
    fast.seconds, fast.chains = slow.seconds, slow.chains
    assert fast == slow


def test_plain_decoding_and_batches(recording):
    found = replay(Off(), recording, COST, 2)
    assert found.tokens == 2 * found.rounds
    assert found.tokens_per_s == pytest.approx(2 / 1.2)
    assert found.off == found.rounds
    assert found.tokens_per_round == 1.0
    with pytest.raises(ConfigError, match="batch size 9"):
        replay(Off(), recording, COST, 9)


def test_smart_drafts_in_a_replay_where_it_pays_and_not_where_it_does_not(recording):
    cheap = CostModel.from_table({1: {1: 1.0, 400: 1.1}}, {1: 0.01, 400: 0.02})
    expensive = CostModel.from_table({1: {1: 1.0, 2: 9.0, 400: 3000.0}}, {1: 1.0, 400: 9.0})
    good = replay(make_policy("smart", {"cost": cheap}), recording, cheap, 2)
    bad = replay(make_policy("smart", {"cost": expensive}), recording, expensive, 2)
    assert good.tokens_per_s > 2.5 * replay(Off(), recording, cheap, 2).tokens_per_s
    assert bad.off > 0.8 * bad.rounds  # what is new is tried
