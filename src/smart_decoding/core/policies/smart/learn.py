"""What `smart` learns from real rounds: costs, overhead, acceptance, and what forecasts leave out.

Costs are corrected every few rounds, and acceptance is learned from several rounds in one go, as
every numpy call has its price."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from smart_decoding.core.batch import merged
from smart_decoding.core.calibration import HORIZON
from smart_decoding.core.costs import SURPRISE

if TYPE_CHECKING:
    from smart_decoding.core.batch import Round
    from smart_decoding.core.policies.smart.state import SmartState, Timings

# Rounds between two lessons in costs, once as many have passed: learning takes time itself, but a
# machine's state lasts for seconds only. HORIZON rounds pass between two lessons in acceptance.
COSTS_EVERY = 8


def learn(state: SmartState, round: Round, plain_rounds: float, later: float) -> bool:
    """Learn from a round; return whether predictions depend on what was learned.

    plain_rounds: how many plain rounds it was predicted to last, but for `later`: those of catching
    up for later rounds."""
    batch = round.batch
    if round.rule is not None and round.rule.scores is None:  # what was drafted is not calibrated
        state.calibration.score(round.trees, batch.kind)
    if batch.size > 1:
        tokens = (round.tokens, round.expected_tokens)
        state.credit.observe(batch.requests, *tokens, plain_rounds, later)
    if batch.prefill_rows:
        # Rows of prompts skip the output matrix and most of the last layer, and are more than the
        # table has: their times say nothing of rounds that draft.
        return False
    state.overhead.observe(batch.size, round.rule is not None, round.other_seconds)
    if round.rule is None:
        state.plain.add(round)
        return False
    state.rounds += 1
    state.drafted.add(round)
    if state.rounds % min(COSTS_EVERY, state.rounds) == 0:
        _learn_costs(state, state.drafted)
    _observe_trees(state, round)
    # As if accepted nodes were Poisson.
    surprised = state.shortfall**2 > SURPRISE**2 * state.expected
    due = len(state.unlearned) >= min(HORIZON, state.rounds - len(state.unlearned))
    return (surprised or due) and learn_acceptance(state)


def learn_plain(state: SmartState) -> bool:
    """Correct costs by the plain rounds since the last time; return whether there were any: what
    the machine has become meanwhile may make drafting pay."""
    return _learn_costs(state, state.plain)


def learn_acceptance(state: SmartState) -> bool:
    """Learn from the trees since the last time; return whether there were any."""
    if not state.unlearned:
        return False
    trees, nodes, chosen = merged(state.unlearned)
    kinds = np.concatenate([round.batch.kind for round in state.unlearned])
    state.unlearned.clear()
    state.expected = 0.0
    state.shortfall = 0.0
    state.calibration.observe(trees, nodes, chosen, kinds)
    if (trees.source == 0).any():  # nodes of the model drafter
        state.forecast.observe(trees)
    return True


def _learn_costs(state: SmartState, timings: Timings) -> bool:
    samples = timings.take()
    for sample in samples:
        state.cost = state.cost.corrected(sample)
    return bool(samples)


def _observe_trees(state: SmartState, round: Round) -> None:
    state.unlearned.append(round)
    expected = round.expected
    state.expected += expected
    state.shortfall += expected - round.accepted
