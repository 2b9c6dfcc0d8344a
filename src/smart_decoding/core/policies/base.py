"""What a policy is told and what it answers: the only words that engine and policies exchange."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np

from smart_decoding.errors import ConfigError

if TYPE_CHECKING:
    from smart_decoding.core.batch import BatchState, Round
    from smart_decoding.core.costs import CostModel
    from smart_decoding.core.rule import TreeRule
    from smart_decoding.core.tree import IntArray

TokenIds: TypeAlias = Collection[int]


class Policy(Protocol):
    """Decides when to draft, and by which rule. Policies are deterministic and touch no clock."""

    name: str

    @property
    def cost(self) -> CostModel | None:
        """What it expects forwards to take, or None if it does not care."""
        ...

    def plan(self, batch: BatchState) -> TreeRule | None:
        """Before a round: how its trees grow and are pruned, or None for plain decoding. Not called
        for rounds with prompt rows, which do not draft."""
        ...

    def observe(self, round: Round) -> None:
        """Learn from what happened."""
        ...

    def stats(self) -> dict[str, float]:
        """Running figures, for metrics."""
        ...


class StatelessPolicy:
    """What a policy says that learns nothing, and does not care what forwards take."""

    cost: CostModel | None = None

    def observe(self, round: Round) -> None:
        """Learn nothing."""

    def stats(self) -> dict[str, float]:
        """No figures."""
        return {}


def token_array(ids: TokenIds) -> IntArray:
    """[n] distinct token ids, ascending."""
    return np.array(sorted(set(ids)), np.int64)


def require_int(name: str, value: int, low: int, high: int) -> int:
    """`value` if it is an integer in [low, high]. Raises ConfigError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name} must be an integer from {low} to {high}, not {value!r}")
    return value


def require_number(name: str, value: float, low: float, high: float) -> float:
    """`value` as a float if it lies in [low, high]. Raises ConfigError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError(f"{name} must be a number from {low} to {high}, not {value!r}")
    return float(value)
