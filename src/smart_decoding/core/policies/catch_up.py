"""What the first drafted level costs after a stretch of plain decoding.

The drafter must process all rows that have waited. That is an investment: charged in full to one
round it would never be made, and would grow. So every round that will probably use it is charged a
part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from smart_decoding.core.cost import CostModel
    from smart_decoding.core.policies.round_state import RoundState

MAX_ROUNDS = 32  # that share a catch-up, if drafting and the answers last so long


class FirstLevel(NamedTuple):
    """Seconds of a first level: with what any round catches up with, as charged, and in full."""

    regular: float
    charged: float
    whole: float


class CatchUp:
    """Shares the cost of a catch-up among the rounds that drafting usually lasts."""

    def __init__(self) -> None:
        self._lasts = float(MAX_ROUNDS)

    def drafting_ended(self, rounds: int) -> None:
        """Drafting lasted `rounds`: near break-even it may end before its catch-up has paid."""
        self._lasts += (min(rounds, MAX_ROUNDS) - self._lasts) / 4

    def sharing(self, state: RoundState) -> int:
        """Rounds that share the cost."""
        batch = state.batch
        left = int(batch.remaining.sum()) // (2 * batch.size)
        return max(1, min(round(self._lasts), left))

    def first_level(self, cost: CostModel, state: RoundState) -> FirstLevel:
        """Seconds of the round's first level."""
        size = state.batch.size
        waiting = state.batch.catch_up_rows
        rows = [min(waiting, size), waiting]
        regular, whole = cost.first_seconds(size, rows, state.context).tolist()
        return FirstLevel(regular, regular + (whole - regular) / self.sharing(state), whole)
