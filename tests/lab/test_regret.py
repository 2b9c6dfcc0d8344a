"""Rates against full knowledge, and against an earlier run."""

import json

import pytest

from smart_decoding.cli.main import main
from smart_decoding.core.policies import make_policy
from smart_decoding.core.policies.off import Off
from smart_lab.__main__ import LAB
from smart_lab.regret import MACHINES, SCENARIOS, Trial, simulated
from smart_lab.replay import Prompts
from smart_lab.simulation import CONTEXT, Queue, World, best_rounds, full_knowledge, run, total

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


class Watching(Off):
    """Plain decoding that remembers its rounds."""

    def __init__(self):
        self.rounds = []

    def observe(self, round):
        self.rounds.append(round)


def test_a_queues_prompts_are_read_beside_the_other_answers():
    """In chunks, at three quarters of the table's seconds; the requests are others then."""
    costs, policy = MACHINES["linear rows"], Watching()
    world = World(1, 4, costs, queue=Queue(20, 150, Prompts(64, 0.75)))
    found = run(policy, world, range(100))
    mixed = [r for r in policy.rounds if r.batch.prefill_rows]
    assert [r.batch.prefill_rows for r in mixed[:3]] == [64, 64, 22]
    for round in mixed:
        size, rows = round.batch.size, round.verify_rows
        assert 1 <= size < 4
        own, whole = costs.verify_seconds(size, [size, rows], CONTEXT).tolist()
        assert round.verify_seconds == pytest.approx(0.25 * own + 0.75 * whole)
    known = [set(r.batch.requests) for r in policy.rounds]
    assert set.union(*known) > known[0] > set(mixed[0].batch.requests)
    assert {t for r in policy.rounds for t in r.batch.temperature} == {0.0, 1.0}
    assert found.tokens == pytest.approx(sum(r.batch.size for r in policy.rounds))
    assert found.seconds == pytest.approx(sum(r.seconds for r in policy.rounds))


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
