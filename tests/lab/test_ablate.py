"""One command that replays variants over machines, batch sizes and orders."""

import json

import numpy as np
import pytest

from smart_decoding.cli.main import main
from smart_decoding.core.costs import CostModel
from smart_lab.__main__ import LAB
from smart_lab.ablate import Ablation, Cell, table
from smart_lab.replay import replay
from smart_lab.synthetic import synthetic
from smart_lab.trace import Trace, write_trace
from smart_lab.worlds import WORLDS

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


def test_a_tuned_rival_is_its_best_setting_there(trace, monkeypatch):
    monkeypatch.setattr("smart_lab.ablate.SHORT", SETTINGS)
    names = ("eagle2 tuned", "pooled_chain tuned", "eagle2:depth=1,top_k=2,total_tokens=5")
    ablation = Ablation(trace, {"m": COST}, names, 1000)
    tree, chain, one = ablation.replayed(Cell("m", 2, 0)).values()
    assert tree["tokens_per_s"] >= one["tokens_per_s"]
    assert tree["setting"] in SETTINGS
    assert chain["chains"] > 0.9 * chain["rounds"]


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
