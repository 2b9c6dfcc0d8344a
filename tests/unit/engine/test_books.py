"""To which rounds the engine charges seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from smart_decoding.core.policies.base import StatelessPolicy
from smart_decoding.core.rule import TreeRule
from smart_decoding.core.selection import Beam, KeepBest
from smart_decoding.engine.sampling_params import SamplingParams

from .fakes import make_engine

if TYPE_CHECKING:
    from smart_decoding.core.batch import BatchState, Round
    from smart_decoding.engine.engine import Engine

NO_ENDS = np.zeros(0, np.int64)


class Alternating(StatelessPolicy):
    """Drafts in every other round. learning: seconds that it takes to learn from a plain round."""

    name = "alternating"

    def __init__(self, learning: float = 0.0) -> None:
        self.learning = learning
        self.rounds: list[Round] = []
        self.engine: Engine | None = None

    def plan(self, batch: BatchState) -> TreeRule | None:
        if len(self.rounds) % 2:
            return None
        return TreeRule(2, 2, batch.limits, NO_ENDS, Beam(1), KeepBest(4))

    def observe(self, round: Round) -> None:
        self.rounds.append(round)
        if round.rule is None:
            assert self.engine is not None
            self.engine.target.clock.now += self.learning


def engine_of(policy: Alternating, **params: float) -> Engine:
    """An engine with one request that has its first token."""
    engine = make_engine("off", max_num_seqs=2)
    engine.policy = policy
    policy.engine = engine
    engine.add_request("0", [1, 2], SamplingParams(max_tokens=200, ignore_eos=True, **params))
    engine.step()
    return engine


def test_learning_is_charged_to_the_next_round_of_the_same_kind() -> None:
    policy = Alternating(learning=0.5)
    engine = engine_of(policy)
    for _ in range(8):
        engine.step()
    drafting, plain = policy.rounds[2::2], policy.rounds[3::2]
    assert all(round.rule is not None for round in drafting)
    assert [round.other_seconds for round in drafting] == pytest.approx([0.0] * 3)
    assert [round.other_seconds for round in plain] == pytest.approx([0.5] * 3)


def test_texts_and_deliveries_are_charged_to_the_kind_of_round_that_took_them() -> None:
    policy = Alternating()
    engine = engine_of(policy)
    engine.step()
    for _ in range(8):
        if policy.rounds[-1].rule is not None:
            engine.charge(0.25)
        engine.target.clock.now += 9.0  # another engine's rounds, or idle work
        engine.step()
    drafting, plain = policy.rounds[2::2], policy.rounds[3::2]
    assert [round.other_seconds for round in drafting] == pytest.approx([0.25] * len(drafting))
    assert [round.other_seconds for round in plain] == pytest.approx([0.0] * len(plain))


def test_delivering_first_tokens_is_no_part_of_plain_rounds() -> None:
    policy = Alternating()
    engine = engine_of(policy)  # the prompt's round is over
    engine.charge(5.0)
    engine.step()
    engine.step()
    assert {round.rule is None for round in policy.rounds} == {True, False}
    assert max(round.other_seconds for round in policy.rounds) < 5.0


def test_drawing_is_no_part_of_the_forwards_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """With masks and penalties it takes long, and says nothing of the model."""
    policy = Alternating()
    engine = engine_of(policy, temperature=1.0)
    before = engine.target.sample

    def slow(*args: object) -> object:
        engine.target.clock.now += 7.0
        return before(*args)

    monkeypatch.setattr(engine.target, "sample", slow)
    engine.step()
    engine.step()
    assert max(round.verify_seconds for round in policy.rounds) < 2.0
    assert min(round.other_seconds for round in policy.rounds) >= 7.0


def test_a_dropped_draft_is_in_the_books() -> None:
    policy = Alternating()
    engine = engine_of(policy)
    before = engine.target.clock.now
    assert not engine.step(lambda: [""])
    lost = engine.target.clock.now - before
    assert lost > 0
    engine.step()
    assert policy.rounds[-1].lost_seconds == pytest.approx(lost)
    assert policy.rounds[-1].seconds > policy.rounds[-1].verify_seconds + 0.9 * lost
    engine.step()
    assert policy.rounds[-1].lost_seconds == 0


@pytest.mark.parametrize(("temperature", "kind"), [(0.0, 1), (9e-6, 1), (0.5, 0)])
def test_a_temperature_that_takes_the_largest_logit_counts_as_greedy(
    temperature: float, kind: int
) -> None:
    policy = Alternating()
    engine = engine_of(policy, temperature=temperature)
    engine.step()
    assert policy.rounds[-1].batch.kind.tolist() == [kind]
