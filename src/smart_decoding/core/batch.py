"""The running batch before a round, as policies and rules see it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from smart_decoding.core.tree import BoolArray, FloatArray, IntArray, KindArray


@dataclass(frozen=True, slots=True)
class BatchState:
    """The running batch before a round. Arrays have shape [batch].

    context: tokens in the target's KV cache.
    remaining: tokens the request may still emit (>= 1); no node deeper than remaining - 1 is
    useful.
    temperature: sampling temperature, 0 is greedy.
    may_speculate: false for a request that refuses speculation.
    prefill_rows: rows of prompt chunks that ride along in this round's forward.
    catch_up_rows: pairs the model drafter must process before its first level, beyond one per
    request.
    has_model: whether a drafter with a model (head, draft model) is loaded.
    has_free: whether a drafter without model cost (n-grams) is loaded.
    pictures: whether the request's prompt has any, or None where none has.
    constrained: whether a grammar allows but some tokens, or None where none does.
    size: requests.
    """

    context: IntArray
    remaining: IntArray
    temperature: FloatArray
    may_speculate: BoolArray
    prefill_rows: int = 0
    catch_up_rows: int = 0
    has_model: bool = True
    has_free: bool = False
    pictures: BoolArray | None = None
    constrained: BoolArray | None = None
    size: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", len(self.context))

    @property
    def mean_context(self) -> float:
        """Tokens in the target's KV cache, of a request on average; 0 without requests."""
        return float(sum(self.context.tolist()) / max(self.size, 1))

    @property
    def limits(self) -> IntArray:
        """[batch] deepest useful node of each request: 0 where it refuses speculation or needs one
        token only."""
        result: IntArray = np.where(self.may_speculate, self.remaining - 1, 0)
        return result

    @property
    def kind(self) -> KindArray:
        """[batch] 1 if greedy, 2 more with pictures, and 4 more under a grammar."""
        kind = (self.temperature <= 0).astype(np.uint8)
        for bit, those in enumerate((self.pictures, self.constrained), 1):
            if those is not None:
                kind += those.astype(np.uint8) << bit
        return kind
