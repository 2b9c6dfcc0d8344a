"""The draft length of each step: of most tokens per second, at costs and acceptance that are found
out on the way, in a simulated engine that verifies drafts a step after they were made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from smart_decoding.core.costs import Curve
from smart_decoding.core.lengths import DepthAcceptance, DraftLengths, StepSeconds

STEPS = 1000
LENGTHS = (0, 1, 2, 4)
Cost = Callable[[int, float, int], float]


def cpu(batch: int, drafts: float, levels: int) -> float:
    """Rows are expensive, as measured on two cores."""
    return 0.008 + 0.0008 * (batch + drafts) + 0.002 * levels


def gpu(batch: int, drafts: float, levels: int) -> float:
    """Rows are free up to 64."""
    return 0.010 + 0.0002 * max(batch + drafts - 64, 0) + 0.001 * levels


@dataclass
class World:
    """Each request accepts a draft with its own probability.

    cost(batch, drafts, levels): true seconds of a step. model: a draft model drafts, else n-grams,
    which cost nothing and match with the probability `hits`. drafted: steps by length; explored:
    steps that explored."""

    accept: Sequence[float]
    cost: Cost
    model: bool = False
    hits: float = 1.0
    noise: float = 0.03
    seed: int = 0
    drafted: Counter[int] = field(default_factory=Counter)
    explored: int = 0

    def run(self, steps: int, policy: DraftLengths | None = None, fixed: int = 0) -> float:
        """Tokens per second of `steps` steps, under a policy or at a fixed length."""
        random = np.random.default_rng(self.seed)
        batch = len(self.accept)
        tokens = seconds = 0.0
        length, exploring = fixed, False
        for _ in range(steps):
            drafts = policy.choose(batch, LENGTHS) if policy else fixed
            explores = policy.exploring if policy else False
            made = length * (np.ones(batch) if self.model else random.random(batch) < self.hits)
            right = random.random((batch, max(LENGTHS))) < np.array(self.accept)[:, None]
            accepted = np.minimum(right.cumprod(1).sum(1), made).astype(int).tolist()
            took = self.cost(batch, int(made.sum()), drafts if self.model else 0)
            tokens += batch + sum(accepted)
            seconds += took
            if policy:
                measured = took * float(np.exp(self.noise * random.standard_normal()))
                told = measured if length == drafts else None
                policy.observe(batch, length, accepted, told, exploring)
            self.drafted[drafts] += 1
            self.explored += explores
            length, exploring = drafts, explores
        return tokens / seconds

    def expected_rate(self) -> float:
        """Tokens per second to expect at the lengths that were drafted."""
        tokens = seconds = 0.0
        hits = 1.0 if self.model else self.hits
        for length, steps in self.drafted.items():
            levels = np.arange(1, length + 1)
            right = hits * sum(float((p**levels).sum()) for p in self.accept)
            tokens += steps * (len(self.accept) + right)
            rows = hits * length * len(self.accept)
            seconds += steps * self.cost(len(self.accept), rows, length if self.model else 0)
        return tokens / seconds


@pytest.mark.parametrize("cost", [cpu, gpu])
@pytest.mark.parametrize("accept", [0.05, 0.4, 0.9])
@pytest.mark.parametrize("batch", [1, 4, 16, 64])
@pytest.mark.parametrize("model", [True, False])
def test_it_comes_near_the_best_fixed_length(
    cost: Cost, accept: float, batch: int, model: bool
) -> None:
    """An oracle knows that one, out of all that may be chosen, 0 included."""
    ratios = []
    for seed in (0, 1):
        world = World([accept] * batch, cost, model, 0.7, seed=seed)
        best = max(world.run(STEPS, fixed=k) for k in LENGTHS)
        ratios.append(world.run(STEPS, DraftLengths(4)) / best)
    assert np.mean(ratios) > (0.945 if batch == 1 else 0.965)


def test_where_half_match_long_drafts_are_not_taken_for_as_bad_as_first_ones() -> None:
    """An untested depth is as the one above it, not as the first, where n-grams do not match."""
    ratios = []
    for seed in range(4):
        world = World([0.6], cpu, hits=0.5, seed=seed)
        best = max(world.run(500, fixed=k) for k in LENGTHS)
        ratios.append(world.run(500, DraftLengths(4)) / best)
    assert np.mean(ratios) > 0.95


def test_it_comes_back_when_the_drafter_becomes_good_again() -> None:
    policy = DraftLengths(4)
    bad = World([0.02] * 4, cpu)
    bad.run(800, policy)
    assert bad.drafted[0] > 600
    good = World([0.95] * 4, cpu, seed=1)
    good.run(1500, policy)
    assert good.drafted[0] < 600


def test_a_batch_size_that_was_not_met_yet_is_found_out() -> None:
    """At 64 requests drafts are much too expensive, at 2 they pay."""
    policy = DraftLengths(4)
    large, small = World([0.8] * 64, cpu), World([0.8] * 2, cpu)
    large.run(300, policy)
    assert large.drafted[4] < 30
    small.run(400, policy)
    assert small.drafted[4] > 200


def test_only_allowed_lengths_are_chosen() -> None:
    policy = DraftLengths(4)
    World([0.9] * 2, cpu).run(300, policy)
    assert {policy.choose(2, (0, 3)) for _ in range(300)} <= {0, 3}
    assert {policy.choose(2, (3,)) for _ in range(100)} == {3}
    assert not policy.exploring


def test_nothing_is_drafted_before_plain_steps_are_known() -> None:
    policy = DraftLengths(4)
    for _ in range(4):
        assert policy.choose(1, LENGTHS) == 0
        policy.observe(1, 0, [0], 0.01)
    assert policy.choose(1, LENGTHS) == 4


def test_without_zero_it_starts_from_the_shortest_length() -> None:
    policy = DraftLengths(4, StepSeconds(2))
    assert policy.choose(8, (2, 4)) == 2
    for _ in range(4):
        policy.observe(8, 2, [1] * 8, 0.02)
    assert policy.choose(8, (2, 4)) in (2, 4)
    assert policy.seconds.predict(8, 2) == pytest.approx(0.02)


def test_explorations_keep_to_their_budget() -> None:
    """A length of no use that takes three times as long: of 8,000 steps it may cost 0.5 %."""
    world = World([0.0] * 4, lambda batch, drafts, levels: 0.03 if drafts else 0.01)
    rate = world.run(8000, DraftLengths(4, exploration_budget=0.005))
    assert world.explored > 20
    assert world.run(8000, fixed=0) / rate < 1.012


def test_a_stopped_process_goes_on_exploring() -> None:
    policy = DraftLengths(4)
    world = World([0.9] * 4, cpu)
    world.run(300, policy)
    policy.observe(4, 0, [0] * 4, 60.0, exploring=True)
    before = world.explored
    world.run(1000, policy)
    assert world.explored > before


def test_two_processes_that_observe_the_same_choose_the_same() -> None:
    first, second = World([0.7, 0.2], cpu, model=True), World([0.7, 0.2], cpu, model=True)
    first.run(300, DraftLengths(4))
    second.run(300, DraftLengths(4))
    assert first.drafted == second.drafted
    assert first.explored == second.explored


def test_acceptance_is_censored_at_the_first_rejection() -> None:
    acceptance = DepthAcceptance(4)
    random = np.random.default_rng(0)
    for _ in range(200):
        right = random.random((8, 4)) < [0.9, 0.6, 0.6, 0.2]
        acceptance.observe(right.cumprod(1).sum(1).tolist(), 4)
    exact = [1.0, 1.9, 1.9 + 0.54, 1.9 + 0.54 + 0.324, 1.9 + 0.54 + 0.324 + 0.0648]
    assert acceptance.tokens() == pytest.approx(exact, rel=0.06)


def test_while_nothing_is_drafted_acceptance_returns_to_the_usual() -> None:
    acceptance = DepthAcceptance(2)
    for _ in range(500):
        acceptance.observe([2, 2], 2)
    for _ in range(20):
        acceptance.observe([0, 0], 2)
    bad = acceptance.tokens()[2]
    for _ in range(200):
        acceptance.observe([], 0)
    assert bad < 2.3
    assert acceptance.tokens()[2] > 2.7


def test_trees_of_other_lengths_are_a_prior_alone() -> None:
    """Trees of three levels are accepted to the end; of one level nothing is."""
    acceptance = DepthAcceptance(3, trees=True)
    for _ in range(100):
        acceptance.observe([3, 3], 3)
    assert acceptance.tokens()[1] > 1.9  # not tried: as the larger one
    for _ in range(100):
        acceptance.observe([0, 0], 1)
    tokens = acceptance.tokens()
    assert tokens[1] < 1.2
    assert tokens[3] > 3.5


def test_step_seconds_are_found_within_a_few_per_cent() -> None:
    costs = StepSeconds(0)
    random = np.random.default_rng(0)
    for _ in range(600):
        batch, length = int(random.choice([1, 4, 16])), int(random.choice(LENGTHS))
        noise = float(np.exp(0.05 * random.standard_normal()))
        costs.observe(batch, length, cpu(batch, batch * length, length) * noise)
    for batch in (1, 4, 16):
        for length in LENGTHS:
            true = cpu(batch, batch * length, length)
            assert costs.predict(batch, length) == pytest.approx(true, rel=0.06)


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), 0.0, -1.0])
def test_absurd_times_teach_nothing(seconds: float) -> None:
    costs = StepSeconds(0)
    for _ in range(8):
        costs.observe(2, 0, 0.01)
    before = costs.predict(2, 0), costs.predict(2, 4)
    costs.observe(2, 0, seconds)
    costs.observe(2, 4, seconds)
    assert (costs.predict(2, 0), costs.predict(2, 4)) == before


def test_one_odd_step_moves_little() -> None:
    costs = StepSeconds(0)
    for _ in range(50):
        costs.observe(2, 0, 0.01)
    costs.observe(2, 0, 10.0)
    assert costs.predict(2, 0) < 0.0105


def test_a_slow_start_is_forgotten() -> None:
    """The first steps with drafts compile and allocate: ten times too slow, they must not keep
    drafting off."""
    costs = StepSeconds(0)
    for _ in range(8):
        costs.observe(4, 0, cpu(4, 0, 0))
    for _ in range(3):
        costs.observe(4, 2, 10 * cpu(4, 8, 0))
    for _ in range(60):
        costs.observe(4, 2, cpu(4, 8, 0))
    assert costs.predict(4, 2) < 1.25 * cpu(4, 8, 0)


def test_given_seconds_are_those_of_the_table() -> None:
    table = {1: Curve((0, 2), (1.0, 3.0)), 4: Curve((0, 2), (2.0, 4.0))}
    costs = StepSeconds.from_table(table, 4)
    assert costs.known
    assert costs.predict(1, 0) == pytest.approx(1.0)
    assert costs.predict(1, 1) == pytest.approx(2.0)
    assert costs.predict(4, 2) == pytest.approx(4.0)
    assert 2.0 < costs.predict(2, 1) < 3.0
    assert costs.predict(64, 2) == pytest.approx(4.0)
    assert costs.predict(1, 4) == pytest.approx(5.0)  # not free beyond the table


def test_where_seconds_are_given_only_longer_drafts_are_explored() -> None:
    costs = StepSeconds.from_table({1: Curve((0, 4), (0.01, 0.02))}, 4)
    assert costs.least_known(1, 1, LENGTHS) == 2
    assert costs.least_known(1, 4, LENGTHS) is None


@pytest.mark.parametrize(
    ("batch", "accept", "cost", "model", "rate"),
    [
        (1, 0.8, cpu, True, 166.0),
        (4, 0.6, cpu, False, 424.7),
        (8, 0.9, cpu, False, 757.8),
        (16, 0.4, gpu, True, 2061.5),
        (32, 0.7, gpu, False, 4713.5),
        (64, 0.95, gpu, True, 6276.8),
        (64, 0.3, cpu, True, 1048.2),
    ],
)
def test_chosen_lengths_bring_as_many_tokens_per_second_as_they_did(
    batch: int, accept: float, cost: Cost, model: bool, rate: float
) -> None:
    """Of a fixed set of simulated steps; a better choice raises the figures."""
    world = World([accept] * batch, cost, model, 0.7)
    world.run(600, DraftLengths(4))
    assert world.expected_rate() > 0.99 * rate
