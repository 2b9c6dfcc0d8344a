"""The best that any choice of drafts could have reached, had acceptance been known: a dynamic
programme over positions.

With acceptance known only the drafts that come true are verified: k levels, k rows more, k + 1
tokens. At batch size 1 the programme is exact: its state is the position and the rows that the
drafter has not processed yet. At larger ones the requests of a round share its cost, and the
programme is solved for one request at shared costs:

- `bound`: costs that no round can undercut (a line below the cost curve), so that no plan is
faster;
- `reached`: the plans of many such cost lists walked through at true costs, the best of them: a
plan that exists.

The optimum lies between the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from smart_lab.replay import HostCosts, StepCosts, Walk

if TYPE_CHECKING:
    from smart_decoding.core.cost import CostModel
    from smart_decoding.core.tree import FloatArray, IntArray
    from smart_lab.recording import Answer, Recording

SLOPES = (
    0,
    1,
    2,
    4,
    8,
)  # further rows per request over which a cost list takes the cost curve's slope
FACTORS = (0.6, 0.8, 1.0, 1.3, 1.7)  # of a row's cost, for plans


@dataclass(frozen=True, slots=True)
class Oracle:
    """Tokens per second of a plan that exists, and what none can exceed. At batch size 1 they are
    the same."""

    reached: float
    bound: float


def reachable(recording: Recording) -> IntArray:
    """[positions] how many tokens of the answer the recorded tree holds as one path from its
    root."""
    walk = Walk.everywhere(recording)
    depth = np.zeros(recording.positions, np.int64)
    alive, slot = np.arange(recording.positions), np.arange(recording.positions)
    while len(alive):
        truth = walk.truth(alive, depth[alive] + 1)
        found = np.full(len(alive), -1, np.int64)
        for rank in range(int(recording.count[slot].max(initial=0))):
            inside = rank < recording.count[slot]
            node = np.minimum(recording.child[slot] + rank, len(recording.token) - 1)
            found = np.where(inside & (found < 0) & (recording.token[node] == truth), node, found)
        keep = found >= 0
        alive, slot = alive[keep], recording.positions + found[keep]
        depth[alive] += 1
    return depth


def oracle(
    recording: Recording, cost: CostModel, batch_size: int, host: HostCosts | None = None
) -> Oracle:
    """What knowing acceptance would give at a batch size, the queue kept full."""
    host, costs = host or HostCosts.of(cost), StepCosts(cost, batch_size)
    depth = reachable(recording)
    if batch_size == 1:
        seconds = sum(_exact(answer, depth, costs, host) for answer in recording.answers)
        rate = sum(answer.positions for answer in recording.answers) / seconds
        return Oracle(rate, rate)
    tokens = sum(answer.positions for answer in recording.answers)
    context = float(np.mean(Walk.everywhere(recording).context))
    bound = max(_bounds(recording, depth, costs, host, batch_size, context))
    reached = max(
        _walked(recording, plan, costs, host, batch_size)
        for plan in _plans(recording, depth, costs, host, batch_size, context)
    )
    return Oracle(reached, tokens / bound)


def _exact(answer: Answer, depth: IntArray, costs: StepCosts, host: HostCosts) -> float:
    """Least seconds for one answer alone. later[t][p]: from position t on, with p rows pending
    since the last draft."""
    count = answer.positions
    plain_host, draft_host = host.seconds(1, False), host.seconds(1, True)
    later = np.zeros((count + 1, count + 12))
    never = np.zeros(count + 1)
    for t in range(count - 1, -1, -1):
        context = float(answer.prompt_length + t)
        plain = costs.verify(1, context) + plain_host
        drafted = np.inf
        for k in range(1, int(depth[answer.first + t]) + 1):
            emitted = min(k + 1, count - t)
            spent = (k - 1) * costs.draft(1, context) + costs.verify(1 + k, context) + draft_host
            drafted = min(drafted, spent + later[t + emitted, emitted])
        never[t] = min(
            plain + never[t + 1], drafted + costs.first(answer.prompt_length + t, context)
        )
        pending = np.arange(1, later.shape[1] - 1)
        first = (
            np.array([costs.first(int(p), context) for p in pending])
            if np.isfinite(drafted)
            else np.inf
        )
        later[t, 1:-1] = np.minimum(plain + later[t + 1, 2:], drafted + first)
    return float(never[0])


@dataclass(frozen=True, slots=True)
class _Shares:
    """What one request is charged in a round: for being there, for drafting at all, and per level
    and verified row."""

    round: float
    drafting: float
    level: float
    row: float


def _plan(recording: Recording, depth: IntArray, shares: _Shares) -> tuple[IntArray, float]:
    """[positions] levels to draft at each position for the least charge, and the charge of all
    answers.

    All answers are solved together, from their last positions on: later[:, r] is the charge of the
    last r positions."""
    count = np.array([answer.positions for answer in recording.answers], np.int64)
    first = np.array([answer.first for answer in recording.answers], np.int64)
    levels = np.arange(int(depth.max(initial=0)) + 1)
    charge = shares.round + (levels > 0) * shares.drafting + levels * (shares.level + shares.row)
    plan = np.zeros(recording.positions, np.int64)
    later = np.zeros((len(count), int(count.max(initial=0)) + 1))
    for left in range(1, later.shape[1]):
        who = np.flatnonzero(count >= left)
        at = first[who] + count[who] - left
        options = charge + later[who][:, np.maximum(left - 1 - levels, 0)]
        options[levels > depth[at][:, None]] = np.inf
        plan[at] = options.argmin(axis=1)
        later[who, left] = options.min(axis=1)
    return plan, float(later[np.arange(len(count)), count].sum())


def _bounds(
    recording: Recording,
    depth: IntArray,
    costs: StepCosts,
    host: HostCosts,
    batch_size: int,
    context: float,
) -> Iterator[float]:
    """Seconds below which no plan gets, one for each line under the cost curve."""
    most = batch_size * int(depth.max(initial=0))
    curve = np.array([costs.verify(batch_size + n, context) for n in range(most + 1)])
    level = min(costs.draft(width, context) / width for width in range(1, batch_size + 1))
    drafting = (host.seconds(batch_size, True) - host.seconds(batch_size, False)) / batch_size
    for row in _slopes(curve, batch_size):
        floor = float((curve - row * np.arange(most + 1)).min()) + host.seconds(batch_size, False)
        shares = _Shares(floor / batch_size, max(0.0, drafting), level, row)
        yield _plan(recording, depth, shares)[1]


def _plans(
    recording: Recording,
    depth: IntArray,
    costs: StepCosts,
    host: HostCosts,
    batch_size: int,
    context: float,
) -> Iterator[IntArray]:
    """Plans that are worth walking through."""
    yield np.zeros(recording.positions, np.int64)
    most = batch_size * int(depth.max(initial=0))
    curve = np.array([costs.verify(batch_size + n, context) for n in range(most + 1)])
    plain = host.seconds(batch_size, False)
    drafting = (host.seconds(batch_size, True) - plain) / batch_size
    for row in _slopes(curve, batch_size):
        for factor in FACTORS:
            for sharing in (1.0, 0.5):  # the part of the batch that drafts
                level = costs.draft(max(1, int(batch_size * sharing)), context) / (
                    batch_size * sharing
                )
                shares = _Shares(
                    (float(curve[0]) + plain) / batch_size, drafting, level, row * factor
                )
                for deepest in (1, 2, 3, int(depth.max(initial=0))):
                    yield _plan(recording, np.minimum(depth, deepest), shares)[0]


def _slopes(curve: FloatArray, batch_size: int) -> list[float]:
    """Seconds of a further row, over several stretches of the cost curve."""
    ends = [min(max(1, batch_size * slope), len(curve) - 1) for slope in SLOPES]
    return sorted({float(curve[end] - curve[0]) / end for end in ends if end} | {0.0})


def _walked(
    recording: Recording, plan: IntArray, costs: StepCosts, host: HostCosts, batch_size: int
) -> float:
    """Tokens per second of a plan at true costs."""
    walk, tokens, seconds = Walk(recording, batch_size), 0, 0.0
    while walk.running:
        levels, context = plan[walk.position], float(walk.context.sum()) / batch_size
        deepest = int(levels.max())
        widths = [int(np.count_nonzero(levels >= level)) for level in range(2, deepest + 1)]
        seconds += costs.verify(batch_size + int(levels.sum()), context) + host.seconds(
            batch_size, deepest > 0
        )
        if deepest:
            seconds += sum(costs.levels([int(walk.pending.sum()), *widths], context))
        emitted = np.minimum(levels + 1, walk.left)
        tokens += int(emitted.sum())
        walk.advance(emitted, deepest > 0)
    return tokens / seconds
