"""One command that replays variants over machines, batch sizes and orders."""

import json
from dataclasses import replace

import numpy as np
import pytest

from smart_decoding.cli.main import main
from smart_decoding.core.costs import CostModel
from smart_decoding.core.policies.base import StatelessPolicy
from smart_decoding.errors import ConfigError
from smart_lab.__main__ import LAB
from smart_lab.ablate import Ablation, Cell, ordered, table
from smart_lab.machines import CARD, costs_of, measured
from smart_lab.recording import interleaved
from smart_lab.replay import HostCosts, StepCosts, Walk, replay
from smart_lab.synthetic import synthetic
from smart_lab.trace import Trace, read_trace, write_trace
from smart_lab.worlds import NOBODYS, WORLDS

SETTINGS = [{"depth": 1, "top_k": k, "total_tokens": n} for k in (1, 2) for n in (3, 5)]
COST = CostModel.from_table({1: {1: 1.0, 8: 1.05, 64: 3.0}}, {1: 0.2, 64: 0.3}, 0.01)


@pytest.fixture(scope="module")
def trace() -> Trace:
    return Trace(synthetic(3.0, answers=8, length=20, context=50), {}, (), COST)


def test_a_cell_is_what_replays_give(trace):
    ablation = Ablation(trace, {"m": COST}, ("off", "eagle2:depth=1,top_k=2,total_tokens=4"), 1000)
    found = ablation.replayed(Cell("m", 2, 0))
    policy = trace.policy("eagle2", COST, depth=1, top_k=2, total_tokens=4)
    alone = replay(policy, trace.recording, COST, 2)
    row = found["eagle2:depth=1,top_k=2,total_tokens=4"]
    assert row["tokens_per_s"] == alone.tokens_per_s
    assert row["chains"] == 0 < row["kept"] == alone.kept
    assert found["off"]["off"] == found["off"]["rounds"]


def test_chains_are_told_from_trees(trace):
    ablation = Ablation(trace, {"m": COST}, ("chain:length=2", "eagle2:top_k=3"), 1000)
    chain, tree = ablation.replayed(Cell("m", 2, 0)).values()
    assert 0.8 * chain["rounds"] < chain["chains"] <= chain["rounds"]
    assert tree["chains"] < 0.2 * tree["rounds"]


def test_a_tuned_rival_is_its_best_setting_there(trace, monkeypatch):
    monkeypatch.setattr("smart_lab.ablate.SHORT", SETTINGS)
    names = ("eagle2 tuned", "pooled_chain tuned", "eagle2:depth=1,top_k=2,total_tokens=5")
    ablation = Ablation(trace, {"m": COST}, names, 1000)
    tree, chain, one = ablation.replayed(Cell("m", 2, 0)).values()
    assert tree["tokens_per_s"] >= one["tokens_per_s"]
    assert tree["setting"] in SETTINGS
    assert chain["chains"] > 0.9 * chain["rounds"]


def test_orders_shuffle_the_same_answers_and_fill_the_queue(trace):
    recorded, shuffled = (
        [answer.first for answer in ordered(trace.recording, order, 2, 8).answers]
        for order in (0, 1)
    )
    assert recorded == [answer.first for answer in trace.recording.answers]
    assert recorded != shuffled
    assert recorded == sorted(shuffled)
    assert len(ordered(trace.recording, 1, 2, 3).answers) == 6
    assert len(ordered(trace.recording, 1, 16, 3).answers) == 48


def test_the_table_pairs_orders_and_averages_machines():
    def cell(smart, plain):
        return {"smart": {"tokens_per_s": smart}, "off": {"tokens_per_s": plain}}

    found = {
        Cell("a", 1, 0): cell(3.0, 2.0),
        Cell("a", 1, 1): cell(6.0, 4.0),  # twice as fast, the same gain: no spread
        Cell("b", 1, 0): cell(6.0, 2.0),
        Cell("b", 1, 1): cell(1.0, 1.0),
    }
    lines = table(found, ["smart"], "off").splitlines()
    assert lines[3].split() == ["smart", "1.500", "(0)", "1.500", "(0)"]
    assert lines[5].split() == ["smart", "2.000", "(1000)", "2.000", "(1000)"]
    assert lines[6] == "all machines"
    assert lines[7].split()[1] == f"{((3 * 1.5) ** 0.5 + 1.5**0.5) / 2 + 0.0005:.4f}"[:5]


def test_machines_are_those_with_a_profile_and_cards():
    known = costs_of()
    assert {*measured(), CARD} == {*known}
    assert len(known) >= 5
    assert list(costs_of(["zen4", "h100"])) == ["zen4", "h100"]


def test_the_command(trace, tmp_path, capsys):
    path, figures = tmp_path / "t.smart", tmp_path / "f.json"
    write_trace(path, trace)
    names = ["smart", "no exploration", "chain:length=1"]
    command = ["ablate", str(path), *names, "--machines", "zen4"]
    assert (
        main([*command, "--batch-sizes", "1,2", "--orders", "2", "--json", str(figures)], LAB) == 0
    )
    out = capsys.readouterr().out
    assert "tokens per second over off" in out
    assert "no exploration" in out
    assert out.count("seconds, predicted / real") == 2  # a chain believes nothing
    assert out.count("requests, rounds without prompts") == 3
    cells = json.loads(figures.read_text())["cells"]
    assert {(c["batch_size"], c["order"]) for c in cells} == {(1, 0), (1, 1), (2, 0), (2, 1)}
    assert {*cells[0]["replayed"]} == {"off", *names}
    assert main(["ablate", str(path), "--machines", "nowhere"], LAB) == 2
    assert "no costs of 'nowhere'" in capsys.readouterr().err
    assert main(["ablate", str(path), "cleverer"], LAB) == 2


def test_a_recording_replays_at_its_own_machines_costs_and_host_time(trace):
    host = HostCosts(drafting=0.5)
    recorded = replace(trace, host=host)
    ablation = Ablation(recorded, costs_of(["recorded"], COST), ("chain:length=1",), 1000)
    found = ablation.replayed(Cell("recorded", 2, 0))["chain:length=1"]
    policy = trace.policy("chain", COST, length=1)
    alone = replay(policy, trace.recording, COST, 2, host)
    assert found["tokens_per_s"] == alone.tokens_per_s


def test_two_recordings_run_by_turns_each_at_its_temperature(trace, tmp_path):
    other = synthetic(2.0, answers=5, length=20, context=50)
    path = tmp_path / "warm.smart"
    write_trace(path, replace(trace, recording=other, about={"temperature": 1.0}))
    both = interleaved(trace.recording, read_trace(path).recording)
    assert [a.temperature for a in both.answers] == [0.0, 1.0] * 5
    for i, answer in enumerate(both.answers):
        source = (trace.recording, other)[i % 2]
        assert answer.tokens.tolist() == source.answers[i // 2].tokens.tolist()
        assert both.take([i]).token.tolist() == source.take([i // 2]).token.tolist()
    assert Walk(both, 4).state().kind.tolist() == [1, 0, 1, 0]
    with pytest.raises(ConfigError, match="of a model's drafts"):
        interleaved(trace.recording, replace(other, free=True))


def test_a_row_costs_what_its_own_context_takes(trace):
    cost = replace(COST, row_token=1e-3)
    lengths = [100, 2000] * 4
    answers = [
        replace(a, prompt_length=n) for a, n in zip(trace.recording.answers, lengths, strict=True)
    ]
    mixed = replace(trace.recording, answers=answers)
    observed = []

    class Watched(StepCosts):
        def verify(self, rows, context, beyond=0.0, experts=0.0):
            observed.append((rows, context, beyond))
            return super().verify(rows, context, beyond)

    class OfTheFirst(StatelessPolicy):
        """Keeps what was drafted for the first request alone."""

        def select(self, rule, trees):
            return np.flatnonzero(trees.owner == 0)

        def plan(self, batch):
            return replace(eagle2.plan(batch), keep=self)

    eagle2 = trace.policy("eagle2", cost, depth=1, top_k=2, total_tokens=2)
    steps = Watched(cost, 2)
    replay(OfTheFirst(), mixed, cost, 2, rounds=1, costs=steps)
    ((rows, context, beyond),) = observed
    nodes = rows - 2
    assert context == 1050.0
    assert nodes > 0
    assert beyond == nodes * (100 - 1050.0)
    assert steps.verify(4, context, 500.0) == pytest.approx(steps.verify(4, context) + 0.5)


def test_every_world_replays_every_answer_once(trace):
    plain = replay(trace.policy("off", COST), trace.recording, COST, 2)
    for name, make in WORLDS.items():
        world = make(trace.recording, COST, 2, 0)
        off = trace.policy("off", world.assumed)
        found = replay(off, world.recording, COST, 2, costs=world.machine())
        assert found.tokens == plain.tokens, name


def test_worlds_change_what_they_say(trace):
    worlds = {name: make(trace.recording, COST, 1, 0) for name, make in WORLDS.items()}
    assumed = {name: float(w.assumed.verify_seconds(1, 64, 0)) for name, w in worlds.items()}
    assert assumed["costs twice too high"] == pytest.approx(1.0 + 2 * 2.0)
    assert assumed["costs twice too low"] == pytest.approx(1.0 + 2.0 / 2)
    machine = worlds["speed changes by half"].machine()
    observed = []
    for _ in range(40):
        observed.append(np.median([machine.verify(1, 0.0) for _ in range(9)]))
        machine.advance(500)
    assert min(observed) == pytest.approx(1.0, rel=0.1)
    assert max(observed) == pytest.approx(1.5, rel=0.1)
    lengths = {a.prompt_length for a in worlds["short and long contexts"].recording.answers}
    assert lengths == {100, 2000}
    assert worlds["costs unknown"].assumed == CostModel.default()
    for name, factor in (("-20%", 0.8), ("+20%", 1.2)):
        bent = worlds[f"costs {name} beyond four times the batch"].assumed
        known = COST.verify_seconds(1, [1, 2, 16], 0.0)
        assert bent.verify_seconds(1, [1, 2, 16], 0.0) / known == pytest.approx(
            [1, 1, factor], rel=1e-3
        )


def test_a_world_reads_prompts_beside_the_other_answers(trace):
    """In rounds at three quarters of the table, which all contestants pay."""
    world = WORLDS["prompts beside answers"](trace.recording, COST, 2, 0)
    found = replay(trace.policy("smart", COST), world.recording, COST, 2, costs=world.machine())
    plain = replay(trace.policy("off", COST), world.recording, COST, 2, costs=world.machine())
    for result in (found, plain):
        assert 0 < result.with_prompts < result.rounds
    assert found.figures["rounds"]["with prompts"] == found.with_prompts - 1  # one had none else
    assert found.figures["seconds"]["with prompts"] > 1.05
    assert found.figures["seconds"]["model"] == pytest.approx(1.0, abs=0.1)


def test_a_head_turns_bad_for_a_third_of_the_answers(trace):
    recording = WORLDS["a head that turns bad and good"](trace.recording, COST, 1, 0).recording
    assert [a.tokens.tolist() for a in recording.answers] == [
        a.tokens.tolist() for a in trace.recording.answers
    ]
    third = len(recording.answers) // 3
    for i, answer in enumerate(recording.answers):
        alone = recording.take([i])
        assert (alone.token == NOBODYS).all() == (third <= i < 2 * third)
        assert alone.sizes.tolist() == trace.recording.take([i]).sizes.tolist(), answer.task
