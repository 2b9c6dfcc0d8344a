"""Costs as real rounds correct them: the cost model, and what a round takes beside its forwards."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from smart_decoding.core.cost import CostModel, DraftSample, VerifySample
from smart_decoding.core.overhead import Overhead

if TYPE_CHECKING:
    from smart_decoding.core.policies.base import Round
    from smart_decoding.core.policies.round_state import RoundState
    from smart_decoding.core.tree import FloatArray, IntArray

VERIFY_EVERY = 8  # rounds: a machine's state lasts for seconds only


class LearnedCosts:
    """model: the costs now. corrected_sizes: batch sizes whose plain rounds have corrected them
    since somebody looked. disturbed: whether forecasting or learning is in this round's
    `other_seconds`, which then tell nothing of the overhead."""

    def __init__(self, model: CostModel) -> None:
        self.model = model
        self.overhead = Overhead(model.overhead_seconds)
        self.corrected_sizes: set[int] = set()
        self.disturbed = False
        self.plain_rounds: list[tuple[int, IntArray, float]] = []  # size, contexts, seconds

    def verify(self, state: RoundState, count: int) -> FloatArray:
        """Seconds of a verification of 0, 1, ... count - 1 nodes."""
        size = state.batch.size
        return self.model.verify_curve(size, size, count, state.context)

    def observe_overhead(self, round: Round) -> None:
        """After a round that prefilled nothing."""
        if not self.disturbed:
            speculated = round.rule is not None
            self.overhead.observe(round.batch.size, round.other_seconds, speculated)

    def observe_plain(self, round: Round) -> None:
        """After a plain round that nobody asked about; learned from by `learn_plain`."""
        self.plain_rounds.append((round.batch.size, round.batch.context, round.verify_seconds))

    def learn_plain(self) -> None:
        """One correction for each size, almost without noise: what the machine has become meanwhile
        may make drafting pay."""
        for size in {size for size, _, _ in self.plain_rounds}:
            means = [(c.mean(), seconds) for of, c, seconds in self.plain_rounds if of == size]
            context, seconds = np.mean(means, axis=0).tolist()
            sample = VerifySample(size, size, context, seconds, rounds=len(means))
            self.model = self.model.corrected(sample)
            self.corrected_sizes.add(size)
        self.plain_rounds.clear()

    def learn_verify(self, round: Round, context: float) -> None:
        """Learns what the verification took."""
        if round.verify_rows:
            size = round.batch.size
            sample = VerifySample(size, round.verify_rows, context, round.verify_seconds)
            self.model = self.model.corrected(sample)

    def learn_levels(self, round: Round, context: float) -> None:
        """Learns what the drafted levels took, of which the first had caught up."""
        waiting: int | None = round.batch.catch_up_rows
        for width, seconds in zip(round.level_widths, round.level_seconds, strict=True):
            sample = DraftSample(width - (waiting or 0), context, seconds, waiting)
            self.model = self.model.corrected(sample)
            waiting = None
