"""Many settings of `eagle2` at once.

It treats each request alone, so its tree at a position is the same at every batch size and cost.
All positions' trees are drawn in a few large batches, once per setting; a replay then only adds up.

Needed by the tuning of `bench` and by `simulate`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from smart_decoding.core.policies.eagle2 import Eagle2
from smart_lab.replay import HostCosts, Replayed, StepCosts, Walk, accepted, draft

if TYPE_CHECKING:
    from smart_decoding.core.costs import CostModel
    from smart_decoding.core.policies.base import Policy
    from smart_decoding.core.tree import IntArray
    from smart_lab.recording import Recording

CHUNK = 512  # positions drawn together: memory
Setting = dict[str, int]
TOP_K = (1, 2, 3, 4, 6, 10)


def likelihood_settings(
    depths: Sequence[int] = range(7),
    nodes: Sequence[int] = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 40, 59),
) -> list[Setting]:
    """Return the grid that `eagle2` is tuned over: levels, top-k and nodes; of settings that verify
    the same trees the first."""
    grid = [
        {"depth": depth, "top_k": top_k, "total_tokens": count + 1}
        for depth in depths
        for top_k in TOP_K
        for count in nodes
        if _sensible(depth + 1, top_k, count)
    ]
    first: dict[tuple[int, int, int], Setting] = {}
    for setting in grid:
        first.setdefault(tree_of(setting), setting)
    return list(first.values())


def tree_of(setting: Setting) -> tuple[int, int, int]:
    """(levels, top-k, nodes): the same for settings that verify the same trees.

    A tree of n nodes has at most n levels, and none but the n likeliest children of a node or
    nodes of a level can be among the n likeliest of all."""
    nodes = setting["total_tokens"] - 1
    return min(setting["depth"] + 1, nodes), min(setting["top_k"], nodes), nodes


@dataclass(frozen=True, slots=True)
class Fixed:
    """Each position's tree under one setting, [positions]: tokens that the round emits, nodes
    verified, and rows that its levels expand, [positions, levels]."""

    emitted: IntArray
    kept: IntArray
    expanded: IntArray
    missing: IntArray

    @classmethod
    def draw(cls, policy: Policy, recording: Recording) -> Fixed:
        """The policy must treat each request alone and learn nothing: chain, static or eagle2."""
        everywhere = Walk.everywhere(recording)
        parts = [
            _draw(policy, everywhere.part(start, start + CHUNK))
            for start in range(0, recording.positions, CHUNK)
        ]
        levels = max((part.expanded.shape[1] for part in parts), default=0)
        padded = [
            np.pad(part.expanded, ((0, 0), (0, levels - part.expanded.shape[1]))) for part in parts
        ]
        emitted, kept, missing = (
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("emitted", "kept", "missing")
        )
        return cls(emitted, kept, np.concatenate(padded), missing)


def add_up(
    fixed: Fixed,
    recording: Recording,
    cost: CostModel,
    batch_size: int,
    host: HostCosts | None = None,
) -> Replayed:
    """Return what `replay` gives for the policy of `fixed`."""
    walk, costs, result = (
        Walk(recording, batch_size),
        StepCosts(cost, batch_size),
        Replayed(batch_size),
    )
    host = host or HostCosts.of(cost)
    while walk.running:
        at, context = walk.position, float(walk.context.sum()) / batch_size
        widths = [int(width) for width in fixed.expanded[at].sum(axis=0) if width]
        kept = int(fixed.kept[at].sum())
        seconds = costs.verify(batch_size + kept, context) + host.seconds(batch_size, bool(widths))
        drafts = bool(widths)
        if recording.free:
            widths = []  # proposals take no level of a model
        elif drafts:
            widths[0] = int(walk.pending.sum())
            seconds += sum(costs.levels(widths, context))
        emitted = fixed.emitted[at]
        walk.advance(emitted, drafts)
        result.tokens += int(emitted.sum())
        result.seconds += seconds
        result.rounds += 1
        result.missing += int(fixed.missing[at].sum())
        result.rows += batch_size + kept
        result.kept += kept
        result.levels += len(widths)
        result.off += not drafts
    return result


class Sweep:
    """A recording with the trees of many `eagle2` settings, drawn at first use."""

    def __init__(
        self,
        recording: Recording,
        settings: Sequence[Setting] | None = None,
        eos: Sequence[int] = (),
    ) -> None:
        self.recording, self.eos = recording, tuple(eos)
        self._source = recording  # whose trees are drawn
        self.settings = list(settings if settings is not None else likelihood_settings())
        self._fixed: dict[int, Fixed] = {}

    def repeated(self, recording: Recording) -> Sweep:
        """Return the same trees under a recording that uses its answers several times."""
        other = Sweep(recording, self.settings, self.eos)
        other._fixed, other._source = self._fixed, self._source
        return other

    def rank(
        self,
        cost: CostModel,
        batch_size: int,
        host: HostCosts | None = None,
        late: Callable[[], bool] = lambda: False,
    ) -> list[tuple[Setting, Replayed]]:
        """Return all settings, the fastest first: the best few are then measured live. late:
        whether to leave out what has not been replayed yet."""
        results: list[tuple[Setting, Replayed]] = []
        for i, setting in enumerate(self.settings):
            if results and late():
                break
            if i not in self._fixed:
                self._fixed[i] = Fixed.draw(Eagle2(**setting, eos_token_ids=self.eos), self._source)
            results.append(
                (setting, add_up(self._fixed[i], self.recording, cost, batch_size, host))
            )
        return sorted(results, key=lambda result: -result[1].tokens_per_s)


def _draw(policy: Policy, walk: Walk) -> Fixed:
    done = draft(policy, walk)
    size, owner = done.batch.size, done.trees.owner
    on_path = accepted(done.trees, done.kept, walk)
    emitted = np.minimum(1 + np.bincount(owner[on_path], minlength=size), walk.left)
    levels = done.expanded or [owner[:0]]
    expanded = np.stack([np.bincount(owners, minlength=size) for owners in levels], axis=1)
    expanded[:, 0] = done.batch.remaining > 1  # a round without requests that may draft is plain
    return Fixed(
        emitted,
        np.bincount(owner[done.kept], minlength=size),
        expanded.astype(np.int64),
        done.missing,
    )


def _sensible(levels: int, top_k: int, nodes: int) -> bool:
    """Return whether the re-ranking has something to choose from, and every level may keep a
    node."""
    drafted = top_k + (levels - 1) * top_k * top_k
    return levels <= nodes <= drafted


SHORT = likelihood_settings(range(5), (1, 2, 3, 4, 5, 6, 8, 12, 16))
