"""What every way to draft is predicted to bring, for batches of one shape."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from smart_decoding.core.forecast import expected_subtree
from smart_decoding.core.selection import RANKS

if TYPE_CHECKING:
    from smart_decoding.core.tree import FloatArray

Option: TypeAlias = tuple[int, int]  # (levels by the model drafter, frontier nodes per request)
FREE_ONLY: Option = (0, 0)


@dataclass
class RoundForecast:
    """Predicted rates and costs for batches of one shape, reused for some rounds.

    size: requests. first: seconds of the first drafted level. plain: seconds of a plain round.
    overhead: seconds that a drafting one takes beyond its forwards. verify: seconds at 0, 1, ...
    nodes. levels: seconds at 0, 1, ... expanded rows. children: as `Forecast.children`. bias: what drafting really reached over its
    forecast. values: tokens per second predicted for each way to draft, bias left out. made: the
    round it was made in.
    """

    size: int
    first: float
    plain: float
    overhead: float
    verify: FloatArray
    levels: FloatArray
    children: FloatArray
    bias: float
    values: dict[Option, float] = field(default_factory=dict)
    made: int = 0
    _below: FloatArray | None = None

    def below(self, levels: int, reach: int) -> FloatArray:
        """[levels, reach * RANKS] what a `LookAhead` reads."""
        if self._below is None:
            depths = range(2, levels + 2)
            trees = [expected_subtree(self.children, depth, reach, RANKS) for depth in depths]
            self._below = np.stack(trees)
        return self._below

    @cached_property
    def predicted_speedup(self) -> float:
        """What the best way to draft reaches over plain decoding."""
        return max(map(self.rate, self.values), default=0.0) / self.rate(None)

    def best(self, margin: float) -> Option | None:
        """The best way to draft, or None where its predicted speedup is not above `margin`."""
        return self._best if self.predicted_speedup > margin else None

    @cached_property
    def _best(self) -> Option:
        return max(self.values, key=self.rate)

    @cached_property
    def best_with_model(self) -> Option | None:
        """The best way to draft with the model drafter."""
        return max((option for option in self.values if option[0]), key=self.rate, default=None)

    def others(self, best: Option | None) -> list[Option | None]:
        """The modes to explore where `best` is predicted best; `best` itself if there is no other.

        They are plain decoding, the free drafters alone, and the model drafter."""
        free = FREE_ONLY if FREE_ONLY in self.values else None
        model = None if best is not None and best[0] else self.best_with_model
        return [o for o in dict.fromkeys((None, free, model)) if o != best] or [best]

    def exploration_cost(self, other: Option | None, best: Option | None) -> float:
        """Seconds that a round of mode `other` loses against `best` if its drafts bring nothing."""
        seconds = self.plain
        if other is not None:
            seconds = self.overhead + float(self.verify[1]) + (self.first if other[0] else 0.0)
        return seconds - self.size / self.rate(best)

    def rate(self, option: Option | None) -> float:
        """Tokens per second expected of an option (None: plain decoding)."""
        if option is None:
            return self.size / self.plain
        return self.values[option] * (self.bias if option[0] else 1.0)
