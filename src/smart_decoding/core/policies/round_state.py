"""What the calls of one round share: the batch, read once, and what was decided so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from smart_decoding.core.calibration import KINDS

if TYPE_CHECKING:
    from smart_decoding.core.policies.base import BatchState
    from smart_decoding.core.policies.round_forecast import RoundForecast
    from smart_decoding.core.tree import IntArray, KindArray


@dataclass(slots=True)
class RoundState:
    """limits, kind: [batch] deepest useful node, and `BatchState.kind`. kinds: [KINDS] requests of
    each. drafting: requests that may draft. context: mean tokens. deepest: of the limits.

    exploring: whether the round leaves the mode predicted best. best_rate: tokens per second of that mode. predicted_rate: of this round, bias
    left out. expected: sum of accept_prob of the selected nodes."""

    batch: BatchState
    limits: IntArray
    kind: KindArray
    kinds: list[int]
    drafting: int
    context: float
    deepest: int
    forecast: RoundForecast | None = None
    exploring: bool = False
    best_rate: float = 0.0
    predicted_rate: float = 0.0
    expected: float = 0.0

    @classmethod
    def of(cls, batch: BatchState) -> RoundState:
        """A round of `batch`, nothing decided yet."""
        limits = batch.limits
        each = limits.tolist()
        return cls(
            batch,
            limits,
            batch.kind,
            np.bincount(batch.kind, minlength=KINDS).tolist(),
            drafting=sum(limit > 0 for limit in each),
            context=sum(batch.context.tolist()) / batch.size,
            deepest=max(each),
        )
