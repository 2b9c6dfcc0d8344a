"""Who follows a rule: the drafter in one call, the engine's selection level by level, or a rule of
somebody's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from smart_decoding.core.batch import BatchState
from smart_decoding.core.policies import make_policy
from smart_decoding.core.policies.base import StatelessPolicy
from smart_decoding.core.rule import TreeRule
from smart_decoding.core.selection import Beam, BestRate, FreeAlone, KeepBest, RoundCosts
from smart_decoding.core.tree import DraftTrees, IntArray
from smart_decoding.engine.drafting import Draft, Selection, draft_trees
from smart_decoding.engine.engine import Engine
from smart_decoding.engine.protocols import Grown

from .fakes import Clock, alone, finish, make_engine, random_requests

if TYPE_CHECKING:
    from smart_decoding.engine.request import Request

BATCH = BatchState(np.array([50]), np.array([20]), np.zeros(1), np.ones(1, np.bool_))


def tree(nodes: int) -> DraftTrees:
    """A chain."""
    trees = DraftTrees.empty(1)
    for node in range(nodes):
        trees.append([0], [node + 1], [node - 1], [0.9])
    return trees


class OneCall:
    """Grows chains, in one call or level by level, and notes which."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.calls: list[str] = []

    def grow(self, requests: Sequence[Request], rule: TreeRule) -> Grown:
        self.calls.append("grow")
        self.clock.now += 8.0
        return Grown(tree(rule.levels), np.array([0]), [1] * (rule.levels - 1), [0.0, 1.0, 2.0], 1)

    def start(self, requests: Sequence[Request], rule: TreeRule) -> DraftTrees:
        self.calls.append("start")
        self.clock.now += 1.0
        return tree(1)

    def expand(
        self, requests: Sequence[Request], trees: DraftTrees, nodes: IntArray, rule: TreeRule
    ) -> int:
        self.calls.append("expand")
        self.clock.now += 2.0
        trees.append([0], [7], nodes, [0.9])
        return 1


class Mine:
    """A rule of somebody's own: never deeper than level 2, and only the first node is verified."""

    def frontier(self, rule: TreeRule, trees: DraftTrees, level: int) -> IntArray:
        nodes = rule.expandable(trees, level)
        return nodes if level < 2 else nodes[:0]

    def select(self, rule: TreeRule, trees: DraftTrees) -> IntArray:
        return np.array([0])


def drafted(rule: TreeRule, arrived: bool = False) -> tuple[Draft, list[str]]:
    clock = Clock()
    drafter: Any = OneCall(clock)
    draft = draft_trees(drafter, Selection(), rule, BATCH, [], lambda: arrived, clock)
    return draft, drafter.calls


RULE = TreeRule(3, 1, BATCH.limits, np.zeros(0, np.int64), Beam(1), KeepBest(9))


def test_a_rule_of_built_in_parts_is_followed_by_the_drafter() -> None:
    draft, calls = drafted(RULE)
    assert calls == ["grow"]
    assert draft.kept.tolist() == [0]
    assert draft.widths == [1, 1, 1]
    assert draft.seconds == 7.0  # choosing left out
    assert draft.level_seconds == [4.0, 1.0, 2.0]
    assert drafted(RULE, arrived=True)[0].interrupted


@pytest.mark.parametrize("part", ["grow", "keep"])
def test_a_rule_of_ones_own_is_asked_level_by_level(part: str) -> None:
    draft, calls = drafted(replace(RULE, **{part: Mine()}))
    levels = 2 if part == "grow" else 3
    assert calls == ["start"] + ["expand"] * (levels - 1)
    assert len(draft.trees) == levels
    assert draft.kept.tolist() == ([0, 1] if part == "grow" else [0])
    assert draft.widths == [1] * levels
    assert draft.level_seconds == [1.0, 2.0, 2.0][:levels]
    assert draft.seconds == sum(draft.level_seconds)


def test_without_levels_of_a_model_there_is_nothing_to_grow() -> None:
    draft, calls = drafted(replace(RULE, levels=0))
    assert calls == ["start"]
    assert draft.kept.tolist() == [0]
    assert draft.widths == []


def test_who_arrives_between_levels_ends_the_drafting() -> None:
    draft, calls = drafted(replace(RULE, grow=Mine()), arrived=True)
    assert draft.interrupted
    assert calls == ["start"]
    assert draft.kept.tolist() == []


class Whims(StatelessPolicy):
    """Answers with a rule of its own."""

    name = "whims"

    def plan(self, batch: BatchState) -> TreeRule | None:
        if not batch.limits.any():
            return None
        return TreeRule(3, 2, batch.limits, np.zeros(0, np.int64), Mine(), Mine())


def answers(engine: Engine) -> None:
    """All requests get plain decoding's tokens."""
    requests = []
    for i, (prompt, params) in enumerate(random_requests(6, seed=4)):
        requests.append((prompt, params, engine.add_request(str(i), prompt, params)))
    finish(engine)
    for prompt, params, made in requests:
        assert [r.output for r in made] == [r.output for r in alone(prompt, params)]


def test_a_policy_with_a_rule_of_its_own_serves() -> None:
    engine = make_engine("off")
    engine.policy = Whims()
    answers(engine)


class Counting(Selection):
    """Notes that it was asked."""

    asked = 0

    def select(self, rule: TreeRule, trees: DraftTrees) -> IntArray:
        self.asked += 1
        return super().select(rule, trees)


def test_the_engine_selects_by_what_it_was_given() -> None:
    given = make_engine("off")
    selection = Counting()
    engine = Engine(
        given.target,
        make_policy("chain"),
        given.drafter,
        given.config,
        lambda skip_special: lambda ids: "",
        given._clock,
        selection=selection,
    )
    answers(engine)
    assert selection.asked > 5


class Beside(OneCall):
    """A drafter whose free ones propose a node of some probability first."""

    def __init__(self, clock: Clock, accept_prob: float) -> None:
        super().__init__(clock)
        self.accept_prob = accept_prob
        self.given: DraftTrees | None = None

    def propose(self, requests: Sequence[Request], rule: TreeRule) -> DraftTrees:
        self.calls.append("propose")
        self.given = DraftTrees.empty(1)
        self.given.append([0], [1], [-1], [self.accept_prob])
        return self.given

    def start(self, requests: Sequence[Request], rule: TreeRule) -> DraftTrees:
        self.calls.append("start")
        assert rule.levels == 0
        assert self.given is not None
        return self.given


@pytest.mark.parametrize(("accept_prob", "second"), [(0.9, "start"), (0.3, "grow"), (0.0, "grow")])
def test_the_model_rests_where_free_proposals_promise_more(accept_prob: float, second: str) -> None:
    # Alone 1.9 or 1.3 tokens in 1.2 s; with the model's level, 1.9 or 1.8 tokens in 1.5.
    costs = RoundCosts(1.0, 0.0, np.full(4, 0.3), np.array([1.0, 1.2, 1.3]))
    alone = FreeAlone(BestRate(costs), np.array([[0.8, 0.0]]), np.array([0.3]))
    rule = replace(RULE, keep=BestRate(replace(costs, sunk=0.3)), alone=alone)
    clock = Clock()
    drafter: Any = Beside(clock, accept_prob)
    draft = draft_trees(drafter, Selection(), rule, BATCH, [], lambda: False, clock)
    assert drafter.calls == ["propose", second]
    assert draft.rule is not None
    assert (draft.rule.levels == 0) == (second == "start")
    if second == "start":
        assert draft.kept.tolist() == [0]
        assert draft.widths == []
