"""What every way to draft promises, for batches of one shape."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from smart_decoding.core.lookahead import LookAhead
from smart_decoding.core.tree import FloatArray

Option: TypeAlias = tuple[int, int]  # (levels by the model drafter, frontier nodes per request)
FREE_ONLY: Option = (0, 0)


@dataclass
class Outlook:
    """Forecasts and prices for batches of one shape, reused for some rounds.

    size: requests. first: seconds of the first drafted level. plain: seconds of a plain round.
    overhead: seconds that a speculating one takes beyond its forwards. values: tokens per second
    forecast for each way to draft. foresight: what drafting really reached over its forecast.
    verify: seconds at 0, 1, ... nodes. levels: seconds at 0, 1, ... expanded rows.
    """

    size: int
    first: float
    plain: float
    overhead: float
    values: dict[Option, float]
    foresight: float
    verify: FloatArray
    levels: FloatArray
    ahead: LookAhead
    born: int = 0  # the round it was made in

    @cached_property
    def promise(self) -> float:
        """What the best way to draft promises over plain decoding."""
        return max(map(self.value, self.values), default=0.0) / self.value(None)

    def best(self, margin: float) -> Option | None:
        """The best way to draft, or None where that does not promise `margin` times plain
        decoding."""
        return self._best if self.promise > margin else None

    @cached_property
    def _best(self) -> Option:
        return max(self.values, key=self.value)

    @cached_property
    def best_with_model(self) -> Option | None:
        """The best way to draft with the model drafter."""
        return max((option for option in self.values if option[0]), key=self.value, default=None)

    def price(self, other: Option | None, believed: Option | None) -> float:
        """Seconds that a round in the mode `other` loses against `believed` if its drafts bring
        nothing."""
        seconds = self.plain
        if other is not None:
            seconds = self.overhead + float(self.verify[1]) + (self.first if other[0] else 0.0)
        return seconds - self.size / self.value(believed)

    def value(self, option: Option | None) -> float:
        """Tokens per second expected of an option (None: plain decoding)."""
        if option is None:
            return self.size / self.plain
        return self.values[option] * (self.foresight if option[0] else 1.0)
