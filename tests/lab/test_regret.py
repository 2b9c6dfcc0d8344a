"""Rates against full knowledge, and against an earlier run."""

import json

import pytest

from smart_decoding.cli.main import main
from smart_decoding.core.policies import make_policy
from smart_lab.__main__ import LAB
from smart_lab.regret import MACHINES, SCENARIOS, Trial, simulated
from smart_lab.simulation import World, best_rounds, full_knowledge, run, total

MACHINE = "cheap rows"


def test_full_knowledge_decodes_plainly_where_the_drafter_is_bad():
    span = range(295, 305)
    turns = World(1, 2, MACHINES[MACHINE], SCENARIOS["bad for a while"])
    best = full_knowledge(turns, span)
    assert best == total(best_rounds(turns, span))
    good = full_knowledge(World(1, 2, MACHINES[MACHINE]), range(295, 300))
    plain = run(make_policy("off"), turns, range(300, 305))
    assert best.tokens == pytest.approx(good.tokens + plain.tokens)
    assert best.seconds == pytest.approx(good.seconds + plain.seconds)
    assert best.off == good.off + 5


def test_a_hopeless_drafter_costs_a_chain_what_it_drafts():
    rows = {row["scenario"]: row for row in simulated(Trial(MACHINE, 1, 1, 20, ("chain",)))}
    bad, good = rows["hopeless"], rows["good"]
    assert bad["over_best"] == pytest.approx(bad["over_plain"])
    assert bad["over_plain"] < 0.95
    assert good["over_plain"] > 1.1 > 1 > good["over_best"]


def test_the_command_tells_what_became_worse(tmp_path, capsys):
    path = tmp_path / "old.json"
    command = ["regret", "--rounds", "12", "--batch-sizes", "1", "--policies", "chain"]
    assert main([*command, "--json", str(path)], LAB) == 0
    assert "change" not in capsys.readouterr().out
    assert main([*command, "--against", str(path)], LAB) == 0
    assert capsys.readouterr().out.count("+0.0%") == len(MACHINES) * len(SCENARIOS)
    old = json.loads(path.read_text())
    old["regret"][0]["over_plain"] *= 1.02
    path.write_text(json.dumps(old))
    assert main([*command, "--against", str(path)], LAB) == 1
    assert capsys.readouterr().out.count("WORSE") == 1
