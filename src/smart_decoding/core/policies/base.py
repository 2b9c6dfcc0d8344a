"""The protocol between engine and policies."""

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
        """Expected seconds of forwards, or None if the policy ignores costs."""
        ...

    def plan(self, batch: BatchState) -> TreeRule | None:
        """Return the rule for the coming round's trees, or None for plain decoding. Not called for
        rounds with prompt rows, which do not draft."""
        ...

    def observe(self, round: Round) -> None:
        """Learn from the outcome of a round."""
        ...

    def stats(self) -> dict[str, float]:
        """Return running figures, for metrics."""
        ...


class StatelessPolicy:
    """The base of policies that learn nothing and ignore costs."""

    cost: CostModel | None = None

    def observe(self, round: Round) -> None:
        """Learn nothing."""

    def stats(self) -> dict[str, float]:
        """Return no figures."""
        return {}


def token_array(ids: TokenIds) -> IntArray:
    """Return the distinct token ids [n], ascending."""
    return np.array(sorted(set(ids)), np.int64)


def require_int(name: str, value: int, low: int, high: int) -> int:
    """Return `value` if it is an integer in [low, high]. Raises ConfigError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name} must be an integer from {low} to {high}, not {value!r}")
    return value


def require_number(name: str, value: float, low: float, high: float) -> float:
    """Return `value` as a float if it lies in [low, high]. Raises ConfigError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError(f"{name} must be a number from {low} to {high}, not {value!r}")
    return float(value)
