"""What a policy or a drafter does wrong costs speed, never an answer."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from smart_decoding.core.policies.base import StatelessPolicy
from smart_decoding.core.rule import TreeRule
from smart_decoding.core.selection import Beam, KeepBest
from smart_decoding.engine.sampling_params import SamplingParams

from .fakes import FakeDrafter, alone, finish, make_engine, random_requests

if TYPE_CHECKING:
    from smart_decoding.core.batch import BatchState, Round
    from smart_decoding.core.tree import DraftTrees, IntArray

NO_ENDS = np.zeros(0, np.int64)


class Returns:
    """Chooses whatever it is given."""

    def __init__(self, found: Any) -> None:
        self.found = found

    def frontier(self, rule: TreeRule, trees: DraftTrees, level: int) -> IntArray:
        return np.array(self.found)

    def select(self, rule: TreeRule, trees: DraftTrees) -> IntArray:
        return np.array(self.found)


class Policy(StatelessPolicy):
    """Drafts two levels of two children. fails: the call that raises."""

    name = "mine"

    def __init__(self, fails: str = "", **parts: Any) -> None:
        self.fails = fails
        self.parts = {"expand": Beam(1), "keep": KeepBest(4), **parts}
        self.observed: list[Round] = []

    def plan(self, batch: BatchState) -> TreeRule | None:
        if self.fails == "plan":
            raise RuntimeError("no plan")
        if self.fails == "rule":
            return [3, 2]  # type: ignore[return-value]
        return TreeRule(2, 2, batch.limits, NO_ENDS, **self.parts)

    def observe(self, round: Round) -> None:
        self.observed.append(round)
        if self.fails == "observe":
            raise RuntimeError("no lesson")


def answers_stay(policy: Policy, caplog: pytest.LogCaptureFixture) -> list[str]:
    """All requests get plain decoding's tokens. Returns what was logged."""
    caplog.set_level(logging.ERROR, "smart.engine")
    engine = make_engine("off")
    engine.policy = policy
    requests = []
    for i, (prompt, params) in enumerate(random_requests(6, seed=4)):
        requests.append((prompt, params, engine.add_request(str(i), prompt, params)))
    finish(engine)
    for prompt, params, made in requests:
        assert [r.output for r in made] == [r.output for r in alone(prompt, params)]
    return [r.getMessage() + str(r.exc_info and r.exc_info[1]) for r in caplog.records]


@pytest.mark.parametrize(
    ("fails", "part", "says"),
    [
        ("plan", "plan()", "no plan"),
        ("rule", "plan()", "must return a TreeRule or None, not list"),
        ("observe", "observe()", "no lesson"),
    ],
)
def test_what_a_policy_raises_is_logged_once(
    fails: str, part: str, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    (line,) = answers_stay(Policy(fails), caplog)
    assert line.startswith(f"{part} raised")
    assert says in line


def test_after_three_drafts_in_a_row_that_raise_all_rounds_are_plain(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafts = []
    monkeypatch.setattr(FakeDrafter, "draft", lambda *_: drafts.append(1) or 1 / 0)
    caplog.set_level(logging.ERROR, "smart.engine")
    engine = make_engine("smart", drafter={})
    engine.policy = policy = Policy()
    prompt, params = [1, 2], SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
    made = engine.add_request("a", prompt, params)
    finish(engine)
    assert [r.output for r in made] == [r.output for r in alone(prompt, params)]
    assert len(drafts) == 3
    assert "plain from now on" in caplog.text
    assert all(round.rule is None for round in policy.observed)


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ([1, 0], "ascending"),
        ([0, 0], "ascending"),
        ([-1], "ascending"),
        ([0, 1000], "ascending indices below"),
        ([0.0], "int64"),
        ([[0]], "one dimension"),
    ],
)
@pytest.mark.parametrize("part", ["expand", "keep"])
def test_a_set_of_nodes_that_is_none_makes_a_plain_round(
    part: str, found: Any, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    policy = Policy(**{part: Returns(found)})
    line, last = answers_stay(policy, caplog)
    assert "plain from now on" in last
    assert line.startswith("draft() raised")
    assert says in line
    assert not any(len(round.trees) for round in policy.observed)


def test_a_set_without_a_parent_makes_a_plain_round(caplog: pytest.LogCaptureFixture) -> None:
    """Native verification follows a node's parent: a wrong token would enter the answer."""

    class Deepest(Returns):
        def select(self, rule: TreeRule, trees: DraftTrees) -> IntArray:
            return np.flatnonzero(trees.depth == trees.depth.max())

    policy = Policy(keep=Deepest(None))
    line, _ = answers_stay(policy, caplog)
    assert "without its parent" in line
