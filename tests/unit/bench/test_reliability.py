"""What the benchmark notes of each round beside its speed: distributions, probabilities."""

import math
from dataclasses import replace

import numpy as np
import pytest
import worlds

from smart_decoding.bench.blocks import run_block
from smart_decoding.bench.reliability import BINS, Reliability
from smart_decoding.bench.runner import measure, rows_of
from smart_decoding.core.calibration import Calibration
from smart_decoding.core.policies.base import Round
from smart_decoding.core.rule import Scores, TreeRule
from smart_decoding.core.selection import Beam, KeepBest
from smart_decoding.core.tree import ROOT, DraftTrees

RULE = TreeRule(
    2, 2, np.array([9]), np.zeros(0, np.int64), Beam(2), KeepBest(4), Scores(Calibration(), [1])
)


def round_of(accept_prob, rule=RULE):
    """Root -> 0 (chosen), 1; 0 -> 2 (not chosen); 1 -> 3, which nobody tested."""
    trees = DraftTrees.empty(1)
    trees.append([0, 0], [10, 11], [ROOT, ROOT], [0.8, 0.1])
    trees.append([0, 0], [12, 13], [0, 1], [0.55, 0.9])
    trees.accept_prob = np.array(accept_prob)
    next_token = np.array([99, -1, -1, -1])  # after node 0, which was accepted, the target says 99
    return Round(None, rule, trees, np.arange(4), next_token, np.array([10]))


def test_children_of_accepted_nodes_are_counted_by_what_was_predicted():
    found = Reliability()
    found.add(round_of([0.72, 0.05, 0.36, 0.01]))
    assert found.to_dict() == {
        "draft": {"predicted": [0.1, 0.55, 0.8], "chosen": [0, 0, 1], "count": [1, 1, 1]},
        "calibrated": {
            "predicted": [0.05, 0.5, pytest.approx(0.72)],
            "chosen": [0, 0, 1],
            "count": [1, 1, 1],
        },
    }


def test_a_policy_without_probabilities_has_no_calibrated_part():
    found = Reliability()
    found.add(round_of([0.8, 0.1, 0.44, 0.09], replace(RULE, scores=None)))
    both = found + found
    assert set(found.to_dict()) == {"draft"}
    assert both.to_dict()["draft"]["count"] == [2, 2, 2]
    assert Reliability().to_dict() == {}


def test_certain_tokens_are_in_the_last_bin():
    found, done = Reliability(), round_of([math.nan] * 4)
    done.trees.draft_prob[0] = 1.0
    found.add(done)
    assert found.draft[0, BINS - 1] == 1


def test_a_block_notes_rows_levels_seconds_and_context():
    clock = worlds.Clock()
    engine = worlds.drafting_engine(clock)
    (prompt,) = worlds.prompts(count=1, tokens=31)
    block = run_block(engine, [prompt], [], 1, clock)
    assert (block.row_counts, block.level_counts) == ({5: 10}, {2: 10})
    assert block.counts.verify_seconds == pytest.approx(10 * 1.5)
    assert block.counts.draft_seconds == pytest.approx(10 * 2 * 0.25)
    assert block.counts.context == pytest.approx(
        sum(3 + 3 * i for i in range(10))
    )  # 3 tokens more each round
    draft = block.reliability.to_dict()["draft"]
    assert draft["predicted"] == pytest.approx([0.3, 0.6])
    assert draft["chosen"] == [0.0, 1.0]


def test_runs_have_the_new_figures_and_only_pooled_ones_the_distributions():
    clock = worlds.Clock()
    engines = {
        "off": worlds.engine(clock),
        "chain": worlds.engine(clock, "chain", worlds.RuleDrafter(clock, seconds=0.25), length=2),
    }
    runs = rows_of(
        measure(engines, {"code": worlds.prompts()}, 1, clock=clock), 1, worlds.options()
    )
    assert all(
        run["verify_ms"] == pytest.approx(1000.0) and run["context_tokens"] > 0 for run in runs
    )
    chain = [run for run in runs if run["policy"] == "chain"]
    assert all(run["draft_ms"] == pytest.approx(250.0 * run["levels_per_round"]) for run in chain)
    assert [run.keys() >= {"row_counts", "level_counts", "reliability"} for run in chain] == [
        False,
        True,
    ]
    assert (
        sum(chain[1]["row_counts"].values())
        == sum(chain[1]["level_counts"].values())
        == chain[1]["rounds"]
    )
