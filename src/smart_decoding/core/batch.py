"""The running batch before a round, and the outcome of the round: the inputs of policies."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from smart_decoding.core.tree import join

if TYPE_CHECKING:
    from smart_decoding.core.rule import TreeRule
    from smart_decoding.core.tree import BoolArray, DraftTrees, FloatArray, IntArray, KindArray


@dataclass(frozen=True, slots=True)
class BatchState:
    """The running batch before a round. Arrays have shape [batch].

    context: tokens in the target's KV cache.
    remaining: tokens that the request may still emit (>= 1); no node deeper than remaining - 1 is
    useful.
    temperature: sampling temperature, 0 is greedy.
    may_speculate: false for a request that refuses speculation.
    prefill_rows: rows of prompt chunks in this round's forward.
    catch_up_rows: rows that the model drafter must process in its first level, beyond one per
    request.
    has_model: whether a drafter with a model (head, draft model) is loaded.
    has_free: whether a drafter without model cost (n-grams) is loaded.
    pictures: whether the request's prompt has pictures, or None if no prompt has.
    constrained: whether a grammar restricts the request's tokens, or None if there is no grammar.
    requests: numbers or names by which a policy recognises the requests, or () if none needs
    them.
    size: number of requests.
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
    requests: Sequence[Hashable] = ()
    size: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", len(self.context))

    @property
    def mean_context(self) -> float:
        """Mean number of a request's tokens in the target's KV cache; 0 without requests."""
        return float(sum(self.context.tolist()) / max(self.size, 1))

    @property
    def limits(self) -> IntArray:
        """[batch] deepest useful node of each request: 0 where it refuses speculation or needs only
        one token."""
        result: IntArray = np.where(self.may_speculate, self.remaining - 1, 0)
        return result

    @property
    def kind(self) -> KindArray:
        """[batch] 1 if greedy, 2 more with pictures, and 4 more under a grammar."""
        kind = (self.temperature <= 0).astype(np.uint8)
        for bit, trait in enumerate((self.pictures, self.constrained), 1):
            if trait is not None:
                kind += trait.astype(np.uint8) << bit
        return kind


@dataclass(slots=True)
class Round:
    """The outcome of one round, for `Policy.observe`.

    batch, rule: argument and result of `Policy.plan`; rule is None where nothing was drafted.
    trees: all drafted nodes, pruned ones too.
    kept: [kept] indices of verified nodes in `trees`.
    next_token: [nodes] the target's token after each node of `trees` that the walk accepted, else
    -1. root_next: [batch] the target's token after each root.
    level_widths, level_seconds: rows and seconds of each drafted model level (level 1: one row per
    request and its catch-up rows).
    verify_rows: rows of the verifying forward: roots, kept nodes and prefill rows.
    verify_seconds: its duration, without the drawing of tokens.
    other_seconds: the rest of the round, and the deliveries behind one of its kind.
    lost_seconds: of drafts before the round that were dropped, as a request had arrived.
    experts: that the forward's rows woke, in the mean of a mixture's layers; 0: there are none.
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
    lost_seconds: float = 0.0
    experts: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of the whole round, dropped drafts included."""
        forwards = self.verify_seconds + sum(self.level_seconds)
        return forwards + self.other_seconds + self.lost_seconds

    @property
    def accepted(self) -> int:
        """Number of nodes that the target chose."""
        return int(np.count_nonzero(self.next_token >= 0)) if len(self.trees) else 0

    @property
    def tokens(self) -> list[int]:
        """[batch] tokens of each request."""
        if not len(self.trees):  # as in most plain rounds
            return [1] * self.batch.size
        owners = self.trees.owner[self.next_token >= 0]
        counts: list[int] = (1 + np.bincount(owners, minlength=self.batch.size)).tolist()
        return counts

    @property
    def expected_tokens(self) -> list[float]:
        """[batch] expected tokens of each request."""
        kept = self.kept
        if not len(kept):
            return [1.0] * self.batch.size
        owner, prob = self.trees.owner[kept], self.trees.accept_prob[kept]
        counts: list[float] = (1.0 + np.bincount(owner, prob, self.batch.size)).tolist()
        return counts

    @property
    def expected(self) -> float:
        """Expected number of accepted nodes: the sum of the verified nodes' accept_prob."""
        return float(self.trees.accept_prob[self.kept].sum()) if len(self.kept) else 0.0

    def observed(self) -> tuple[IntArray, BoolArray]:
        """Return the nodes whose parent was accepted, and whether the target chose each.

        These observations are uncensored. Children of a rejected node were never tested and do not
        appear."""
        return _observed(self.trees, self.root_next, self.next_token)


def merged(rounds: Sequence[Round]) -> tuple[DraftTrees, IntArray, BoolArray]:
    """Return the trees of several rounds in one, and their `Round.observed`."""
    if len(rounds) == 1:
        return (rounds[0].trees, *rounds[0].observed())
    trees = join([r.trees for r in rounds])
    next_token = np.concatenate([r.next_token for r in rounds])
    root_next = np.concatenate([r.root_next for r in rounds])
    return (trees, *_observed(trees, root_next, next_token))


def _observed(
    trees: DraftTrees, root_next: IntArray, next_token: IntArray
) -> tuple[IntArray, BoolArray]:
    """Return `Round.observed` of a round with these fields."""
    after = np.where(trees.parent < 0, root_next[trees.owner], next_token[trees.parent])
    nodes = np.flatnonzero(after >= 0)
    return nodes, trees.token[nodes] == after[nodes]


def size_bucket(size: int) -> int:
    """Return the bucket of a batch size: 1, 2 to 3, 4 to 7, ... Batches of a bucket share
    estimates."""
    return size.bit_length()
