"""What a policy is told and what it answers: the only words that engine and policies exchange."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from smart_decoding.core.cost import CostModel
from smart_decoding.core.tree import BoolArray, DraftTrees, FloatArray, IntArray, KindArray, join

if TYPE_CHECKING:
    from smart_decoding.core.policies.chooser import Growth


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
    has_free: whether a drafter without model cost (n-gram, recycling) is loaded.
    pictures: whether the request's prompt has any, or None where none has.
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

    @property
    def size(self) -> int:
        """Requests."""
        return len(self.context)

    @property
    def kind(self) -> KindArray:
        """[batch] 1 if greedy, and 2 more with pictures."""
        greedy = (self.temperature <= 0).astype(np.uint8)
        return greedy if self.pictures is None else greedy + 2 * self.pictures.astype(np.uint8)


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """How to draft this round. `speculate=False` is plain decoding and then nothing else matters.

    levels: at most this many levels by the model drafter; 0 leaves only the free drafters.
    children: proposals per expanded node (the drafter's top-k).
    width: frontier width of levels 2, 3, ... over the whole batch, as planned (frontier() may
    differ).
    growth: what frontier() and select() will answer, for drafters that grow whole trees in one
    call; or None.
    """

    speculate: bool
    levels: int = 0
    children: int = 8
    width: int = 0
    growth: Growth | None = None


OFF = DraftPlan(speculate=False)


@dataclass(slots=True)
class Round:
    """What really happened in one round, for `Policy.observe`.

    batch, plan: as given to and by the policy.
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
    plan: DraftPlan
    trees: DraftTrees
    kept: IntArray
    next_token: IntArray
    root_next: IntArray
    level_widths: list[int] = field(default_factory=list)
    level_seconds: list[float] = field(default_factory=list)
    verify_rows: int = 0
    verify_seconds: float = 0.0
    other_seconds: float = 0.0

    def observed(self) -> tuple[IntArray, BoolArray]:
        """Nodes whose parent was accepted, and whether the target chose them: uncensored
        observations.

        Children of a rejected node were never tested and do not appear."""
        return _observed(self.trees, self.root_next, self.next_token)


def merged(rounds: Sequence[Round]) -> tuple[DraftTrees, IntArray, BoolArray]:
    """The trees of several rounds as those of one, and what `observed()` says of them."""
    if len(rounds) == 1:
        return (rounds[0].trees, *rounds[0].observed())
    trees = join([r.trees for r in rounds])
    next_token = np.concatenate([r.next_token for r in rounds])
    root_next = np.concatenate([r.root_next for r in rounds])
    return (trees, *_observed(trees, root_next, next_token))


def _observed(
    trees: DraftTrees, root_next: IntArray, next_token: IntArray
) -> tuple[IntArray, BoolArray]:
    after = np.where(trees.parent < 0, root_next[trees.owner], next_token[trees.parent])
    nodes = np.flatnonzero(after >= 0)
    return nodes, trees.token[nodes] == after[nodes]


class Policy(Protocol):
    """Decides when to draft, when to stop, what to verify. Policies are deterministic and touch no
    clock."""

    name: str

    @property
    def cost(self) -> CostModel | None:
        """What it expects forwards to take, or None if it does not care."""
        ...

    def plan(self, batch: BatchState) -> DraftPlan:
        """Before drafting: whether, and how. Not called for rounds with prompt rows, which do not
        draft."""
        ...

    def frontier(
        self, plan: DraftPlan, batch: BatchState, trees: DraftTrees, level: int
    ) -> IntArray | None:
        """After model level `level` (1-based): indices of the nodes to expand next, or None to stop
        drafting."""
        ...

    def select(self, plan: DraftPlan, batch: BatchState, trees: DraftTrees) -> IntArray:
        """After drafting: ascending indices of the nodes to verify, prefix-closed."""
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
