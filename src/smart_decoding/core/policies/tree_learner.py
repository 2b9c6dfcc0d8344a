"""Calibration and forecasts learn from several rounds in one go: every numpy call has its price."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from smart_decoding.core.policies.base import Round, merged

if TYPE_CHECKING:
    from smart_decoding.core.calibration import Calibration
    from smart_decoding.core.forecast import Forecast
    from smart_decoding.core.policies.round_state import RoundState
    from smart_decoding.core.tree import KindArray

SURPRISE = 2.0  # standard deviations, as if accepted nodes were Poisson


class TreeLearner:
    """Keeps rounds that drafted until `learn` is called."""

    def __init__(self, calibration: Calibration, forecast: Forecast) -> None:
        self._calibration = calibration
        self._forecast = forecast
        self._rounds: list[tuple[Round, KindArray]] = []  # with the kinds of their requests
        self._expected = 0.0  # nodes that these should have accepted
        self._missing = 0.0  # and that they accepted less

    @property
    def surprised(self) -> bool:
        """Whether the kept rounds accepted far more or fewer nodes than expected."""
        return self._missing**2 > SURPRISE**2 * self._expected

    def add(self, round: Round, state: RoundState) -> int:
        """Keeps a round; how many nodes were accepted in it."""
        trees = round.trees
        if not len(trees):
            return 0
        if np.isnan(trees.accept_prob[-1]):
            self._calibration.score(trees, state.kind)  # drafted by another rule than ours
        self._rounds.append((round, state.kind))
        accepted = round.accepted
        self._expected += state.expected
        self._missing += state.expected - accepted
        return accepted

    def learn(self) -> bool:
        """Learns from the rounds kept; whether there were any."""
        if not self._rounds:
            return False
        rounds, kinds = zip(*self._rounds, strict=True)
        self._rounds.clear()
        self._expected = 0.0
        self._missing = 0.0
        trees, nodes, chosen = merged(rounds)
        self._calibration.observe(trees, nodes, chosen, np.concatenate(kinds))
        if trees.source.min() == 0:  # nodes of the model drafter
            self._forecast.observe(trees)
        return True
