"""What `smart` learns from real rounds: costs, overhead, acceptance, what forecasts leave out, and
what explorations and long rounds have cost.

Costs are corrected every few rounds, and acceptance is learned from several rounds in one go, as
every numpy call has its price."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from smart_decoding.core.batch import merged
from smart_decoding.core.calibration import HORIZON
from smart_decoding.core.costs import SURPRISE
from smart_decoding.core.exploration import Mode

if TYPE_CHECKING:
    from smart_decoding.core.batch import Round
    from smart_decoding.core.policies.smart.choose import Choice
    from smart_decoding.core.policies.smart.state import SmartState, Timings

# Rounds between two lessons in costs, once as many have passed: learning takes time itself, but a
# machine's state lasts for seconds only. HORIZON rounds pass between two lessons in acceptance.
COSTS_EVERY = 8


def learn(state: SmartState, round: Round, planned: Choice | None) -> tuple[float | None, float]:
    """Learn from a round. Return the seconds predicted for it, None if there were none, and those
    of a plain round in its place.

    planned: the last choice, which may have been for a draft that was dropped; None in a backoff,
    or where nothing may draft."""
    size = round.batch.size
    choice = _choice_of(round, planned)
    known = _plain_seconds(state, round, choice)
    plain = round.seconds - round.lost_seconds if known is None else known
    predicted = known
    if choice is not None:
        predicted = choice.predicted_seconds(round)
    elif round.batch.prefill_rows:
        predicted = _with_prompts(state, round)
    charged = choice is not None and choice.explores
    if round.lost_seconds and planned is not None and planned.mode is Mode.MODEL:
        charged = _learn_dropped(state, round, planned, plain, charged)
    later = choice.unshared(round) if choice else 0.0
    lasted = 1.0 if round.rule is None or predicted is None else (predicted - later) / plain
    changed = _learn_round(state, round, lasted, later / plain if later else 0.0)
    if choice is not None and round.rule is not None:
        state.realised(choice.mode).observe(
            size, size + round.expected, choice.forecast_rate * _counted(round, choice)
        )
    if choice is not None and choice.explores:
        if state.exploration.observe(size, choice.loss(round), plain):
            learn_plain(state)
            learn_acceptance(state)
            changed = True
    elif not charged and not round.batch.prefill_rows:
        state.exploration.observe_best(size)
    if changed:
        state.predictions.clear()
    return predicted, plain


def learn_plain(state: SmartState) -> None:
    """Correct costs by the plain rounds since the last time: what the machine has become meanwhile
    may make drafting pay."""
    if _learn_costs(state, state.plain):
        state.predictions.clear()


def learn_acceptance(state: SmartState) -> bool:
    """Learn from the trees since the last time; return whether there were any."""
    if not state.unlearned:
        return False
    trees, nodes, chosen = merged(state.unlearned)
    kinds = np.concatenate([round.batch.kind for round in state.unlearned])
    state.unlearned.clear()
    state.expected_accepts = 0.0
    state.shortfall = 0.0
    state.calibration.observe(trees, nodes, chosen, kinds)
    if (trees.source == 0).any():  # nodes of the model drafter
        state.forecast.observe(trees)
    return True


def _choice_of(round: Round, planned: Choice | None) -> Choice | None:
    """Return what planned the round; None where none did, as with prompts, or another one."""
    if planned is None or round.batch.prefill_rows:
        return None
    return planned if (round.rule is None) == (planned.mode is Mode.PLAIN) else None


def _plain_seconds(state: SmartState, round: Round, choice: Choice | None) -> float | None:
    """Return the predicted seconds of a plain round in place of this one. None if none were
    predicted: plain decoding has such a round, too, as one with prompts."""
    if choice is not None:
        return choice.prediction.plain
    size, seconds = state.predicted_plain
    return seconds if size == round.batch.size and not round.batch.prefill_rows else None


def _with_prompts(state: SmartState, round: Round) -> float:
    """Return what a round with prompts would take if their rows cost as much as others. No decision
    depends on it."""
    batch = round.batch
    forward = state.cost.verify_seconds(batch.size, round.verify_rows, batch.mean_context)
    return state.overhead.of(batch.size, False) + float(forward)


def _counted(round: Round, choice: Choice) -> float:
    """Return the seconds of a drafting round that its rate is judged by: the real ones, without
    what the model caught up with for later rounds. A stall at most doubles a round."""
    predicted = choice.predicted_seconds(round)
    ratio = min(max(0.5, round.seconds / predicted), 2.0) if math.isfinite(round.seconds) else 1.0
    return (predicted - choice.unshared(round)) * ratio


def _learn_dropped(
    state: SmartState, round: Round, dropped: Choice, plain: float, charged: bool
) -> bool:
    """Charge a draft that was dropped before this round, and keep what it caught up with. Return
    whether exploration was charged with the round or the draft."""
    size = round.batch.size
    seconds = max(0.0, round.lost_seconds - dropped.prediction.unshared)
    state.with_model.lose(size, dropped.forecast_rate * seconds)
    if dropped.explores and not charged:
        state.exploration.observe(size, round.lost_seconds, plain)
        return True
    return charged


def _learn_round(state: SmartState, round: Round, plain_rounds: float, later: float) -> bool:
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
    _add_trees(state, round)
    # As if accepted nodes were Poisson.
    surprised = state.shortfall**2 > SURPRISE**2 * state.expected_accepts
    due = len(state.unlearned) >= min(HORIZON, state.rounds - len(state.unlearned))
    return (surprised or due) and learn_acceptance(state)


def _learn_costs(state: SmartState, timings: Timings) -> bool:
    samples = timings.take()
    for sample in samples:
        state.cost = state.cost.corrected(sample)
    return bool(samples)


def _add_trees(state: SmartState, round: Round) -> None:
    """Keep a round's trees to learn from them later."""
    state.unlearned.append(round)
    expected = round.expected
    state.expected_accepts += expected
    state.shortfall += expected - round.accepted
