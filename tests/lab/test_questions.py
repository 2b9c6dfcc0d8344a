"""What replay answers at a batch size, and how the page and the terminal show it."""

import pytest

from smart_decoding.core.cost import CostModel
from smart_lab import questions
from smart_lab.figures import figures
from smart_lab.page import page
from smart_lab.replay import replay
from smart_lab.report import everything
from smart_lab.results import LabResults
from smart_lab.synthetic import synthetic
from smart_lab.trace import Trace
from smart_lab.tuning import PAPER_LEAST, PAPER_ROUNDS, best_paper, paper_settings

COST = CostModel.from_table(
    {1: {1: 1.0, 8: 1.05, 64: 3.0}, 8: {8: 1.1, 64: 3.1}}, {1: 0.2, 64: 0.3}, 0.01
)


@pytest.fixture(scope="module")
def trace() -> Trace:
    return Trace(synthetic(3.0, answers=8, length=24, context=50), {}, (), COST)


@pytest.fixture(scope="module")
def replayed(trace):
    questions.BUDGETS, questions.ALPHAS = (2, 8), (0.8,)
    questions.SHORT[:] = questions.SHORT[:12]
    asker = questions.Asker(trace)
    return {str(size): asker.answers(size) for size in (1, 4)}


def test_hindsight_is_above_every_policy(replayed):
    for of_size in replayed.values():
        gap = of_size["gap"]
        assert gap["oracle, a plan"] >= 0.999 * max(gap["smart"], gap["best fixed"], gap["paper"])
        assert gap["smart"] > 1
        assert gap["eagle2, EAGLE-2's size"] < gap["smart"]
        best, near, worst = of_size["paper"]
        assert best["speedup"] >= near["speedup"] >= worst["speedup"]


def test_page_and_terminal_show_it(replayed):
    result = {
        "provenance": {"weights": {"model": "tiny"}},
        "replayed": replayed,
        "runs": [
            {"policy": "off", "batch_size": 1, "task": "all", "speedup": 1.0},
            {"policy": "smart", "batch_size": 1, "task": "all", "speedup": 1.2},
        ],
    }
    results = LabResults.from_dict(result)
    drawn = {figure.key: figure for figure in figures(results)}
    assert len(drawn["replay-gap"].panels) == 2
    assert len(drawn["replay-ablations"].panels[1].series) == 5
    text = page(results)
    assert "What does each ingredient give?" in text
    assert "stop rule: always 8 levels" in text
    assert "oracle, a plan" in everything({"runs": [], "replayed": replayed})
    assert not LabResults.from_dict({**result, "replayed": {"1": 3}}).replayed


def test_the_published_rule_is_tuned_for_the_batch_size(trace):
    """No setting is faster in the replay that chooses."""

    def rate(setting):
        policy = trace.policy("paper", COST, **setting)
        rounds = max(PAPER_LEAST, PAPER_ROUNDS // 4)
        return replay(policy, trace.recording, COST, 4, trace.host, rounds=rounds).tokens_per_s

    found = best_paper(trace, 4)
    assert found.label == "paper tuned"
    rates = [rate(setting) for setting in paper_settings(4)]
    assert rate(found.options) == max(rates) > 1.02 * min(rates)
