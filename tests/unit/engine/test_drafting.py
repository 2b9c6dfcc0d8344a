"""Who follows a rule: a model level by level, free drafters alone, or a rule of one's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from smart_decoding.core.batch import BatchState
from smart_decoding.core.policies.base import StatelessPolicy
from smart_decoding.core.rule import Draft, TreeRule
from smart_decoding.core.selection import Beam, BestRate, KeepBest, RoundCosts, SkipModel
from smart_decoding.core.tree import DraftTrees, IntArray
from smart_decoding.drafters.free import FreeDrafter
from smart_decoding.drafters.union import UnionDrafter

from .fakes import alone, finish, make_engine, random_requests

if TYPE_CHECKING:
    from smart_decoding.engine.engine import Engine
    from smart_decoding.engine.request import Request

BATCH = BatchState(np.array([50]), np.array([20]), np.zeros(1), np.ones(1, np.bool_))


class Mine:
    """A rule of somebody's own: never deeper than level 2, and only the first node is verified."""

    def frontier(self, rule: TreeRule, trees: DraftTrees, level: int) -> IntArray:
        nodes = rule.expandable(trees, level)
        return nodes if level < 2 else nodes[:0]

    def select(self, rule: TreeRule, trees: DraftTrees) -> IntArray:
        return np.array([0])


RULE = TreeRule(3, 1, BATCH.limits, np.zeros(0, np.int64), Beam(1), KeepBest(9))


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


class Proposes(FreeDrafter):
    """Proposes a node of some probability."""

    name = "proposes"

    def __init__(self, accept_prob: float) -> None:
        self.accept_prob = accept_prob

    def propose(self, requests: Sequence[Request], rule: TreeRule) -> DraftTrees:
        trees = DraftTrees.empty(1)
        trees.append([0], [1], [-1], [self.accept_prob], source=1)
        return trees


class Model:
    """A model that records the trees that it gets."""

    has_model = True
    free = False
    aux_layers = ()
    resting_layers = ()

    def __init__(self) -> None:
        self.proposed: list[DraftTrees] = []

    def draft(
        self,
        requests: Sequence[Request],
        rule: TreeRule,
        interrupted: Callable[[], bool],
        proposed: DraftTrees,
    ) -> Draft:
        self.proposed.append(proposed)
        return Draft(proposed, rule)


@pytest.mark.parametrize(("accept_prob", "model_runs"), [(0.9, False), (0.3, True), (0.001, True)])
def test_the_model_is_left_out_where_free_proposals_promise_more(
    accept_prob: float, model_runs: bool
) -> None:
    # Alone 1.9 or 1.3 tokens in 1.2 s; with the model's level, 1.9 or 1.8 tokens in 1.5.
    costs = RoundCosts(1.0, 0.0, np.full(4, 0.3), np.array([1.0, 1.2, 1.3]))
    skip_model = SkipModel(BestRate(costs), np.array([[0.8, 0.0]]), np.array([0.3]))
    rule = replace(RULE, keep=BestRate(replace(costs, sunk=0.3)), skip_model=skip_model)
    model: Any = Model()
    one: Any = [None]  # request
    draft = UnionDrafter([model, Proposes(accept_prob)]).draft(one, rule, lambda: False)
    assert [each.token.tolist() for each in model.proposed] == ([[1]] if model_runs else [])
    assert draft.rule is not None
    assert (draft.rule.levels == 0) == (not model_runs)
    if not model_runs:
        assert draft.kept.tolist() == [0]
        assert draft.widths == []
