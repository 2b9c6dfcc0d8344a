"""What a policy is told and what it answers: the only words that engine and policies exchange."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np

from smart_decoding.core.tree import join
from smart_decoding.errors import ConfigError

if TYPE_CHECKING:
    from smart_decoding.core.batch import BatchState
    from smart_decoding.core.cost import CostModel
    from smart_decoding.core.rule import TreeRule
    from smart_decoding.core.tree import BoolArray, DraftTrees, IntArray

TokenIds: TypeAlias = Collection[int]


@dataclass(slots=True)
class Round:
    """What really happened in one round, for `Policy.observe`.

    batch, rule: as given to and by the policy; rule is None where nothing was drafted.
    trees: all drafted nodes, pruned ones too.
    kept: [kept] indices of verified nodes in `trees`.
    next_token: [nodes] the target's token after each node of `trees` that the walk accepted, else
    -1. root_next: [batch] the target's token after each root.
    level_widths, level_seconds: rows and seconds of each drafted model level (level 1: one row per
    request and its catch-up rows).
    verify_rows: rows of the verifying forward: roots, kept nodes and prefill rows.
    verify_seconds: its duration, sampling included.
    other_seconds: what the round took beyond drafting, verifying and sampling.
    """

    batch: BatchState
    rule: TreeRule | None
    trees: DraftTrees
    kept: IntArray
    next_token: IntArray
    root_next: IntArray
    level_widths: list[int] = field(default_factory=list)
    level_seconds: list[float] = field(default_factory=list)
    verify_rows: int = 0
    verify_seconds: float = 0.0
    other_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """The whole round."""
        return self.verify_seconds + sum(self.level_seconds) + self.other_seconds

    @property
    def accepted(self) -> int:
        """Nodes that the target chose."""
        return int(np.count_nonzero(self.next_token >= 0))

    @property
    def expected(self) -> float:
        """Verified nodes that the target was to choose, by their accept_prob."""
        return float(self.trees.accept_prob[self.kept].sum()) if len(self.kept) else 0.0

    def observed(self) -> tuple[IntArray, BoolArray]:
        """Nodes whose parent was accepted, and whether the target chose them: uncensored
        observations.

        Children of a rejected node were never tested and do not appear."""
        return _observed(self.trees, self.root_next, self.next_token)


def merged(rounds: Sequence[Round]) -> tuple[DraftTrees, IntArray, BoolArray]:
    """The trees of several rounds as those of one, and what `Round.observed` says of them."""
    if len(rounds) == 1:
        return (rounds[0].trees, *rounds[0].observed())
    trees = join([r.trees for r in rounds])
    next_token = np.concatenate([r.next_token for r in rounds])
    root_next = np.concatenate([r.root_next for r in rounds])
    return (trees, *_observed(trees, root_next, next_token))


def _observed(
    trees: DraftTrees, root_next: IntArray, next_token: IntArray
) -> tuple[IntArray, BoolArray]:
    """`Round.observed` of these fields of a round."""
    after = np.where(trees.parent < 0, root_next[trees.owner], next_token[trees.parent])
    nodes = np.flatnonzero(after >= 0)
    return nodes, trees.token[nodes] == after[nodes]


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
        """Learns from what happened."""
        ...

    def stats(self) -> dict[str, float]:
        """Running figures, for metrics."""
        ...


class StatelessPolicy:
    """What a policy says that learns nothing, and does not care what forwards take."""

    cost: CostModel | None = None

    def observe(self, round: Round) -> None:
        """Learns nothing."""

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
