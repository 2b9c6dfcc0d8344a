"""Plain decoding that need not ask each round anew whether drafting pays."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smart_decoding.core.overhead import size_bucket
from smart_decoding.core.running import HORIZON

if TYPE_CHECKING:
    from smart_decoding.core.policies.base import Round


class Rest:
    """Goes on for some rounds, as long as the batch has about as many requests.

    Its rounds are learned from all at once: behind a forward no cache is warm, and to learn from
    one takes several times as long as from one more."""

    def __init__(self) -> None:
        self._left = 0
        self._bucket = 0
        self._rounds: list[Round] = []

    def begin(self, rounds: int, size: int) -> None:
        """So many rounds from the next one on, of a batch of `size` requests."""
        self._left = rounds
        self._bucket = size_bucket(size)

    def goes_on(self, size: int) -> bool:
        """Whether the coming round is one of them."""
        if self._left and self._bucket == size_bucket(size):
            self._left -= 1
            return True
        self._left = 0
        return False

    def add(self, round: Round) -> list[Round]:
        """After a round that did not ask. Returns those to learn from now: the last round of a rest
        brings all."""
        self._rounds.append(round)
        return [] if self._left and len(self._rounds) < HORIZON else self.take()

    def take(self) -> list[Round]:
        """Those not learned from yet."""
        rounds = self._rounds
        self._rounds = []
        return rounds
