"""Policies replayed offline: outputs do not depend on the policy, so one recording serves them all.

Recording runs a policy that drafts wide trees and verifies none of their nodes: every round emits one token, so that
every output position gets its tree, drafted from the same state as in any other run. A replay then walks through the
recorded answers as an engine would: the policy drafts from the recorded trees, the recorded answer says what is
accepted, and a CostModel says how long it takes. Only the model drafter's nodes are kept (free drafters' proposals are
dropped), and a node that the recording did not expand has no children; `missing` counts how often a policy wanted some.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from smart_decoding.bench.blocks import Prompt
from smart_decoding.core.cost import CostModel
from smart_decoding.core.policies.common import best_per_owner
from smart_decoding.core.policies.likelihood import Likelihood
from smart_decoding.core.policies.protocol import BatchState, DraftPlan, Policy, Round
from smart_decoding.core.tree import ROOT, DraftTrees, IntArray
from smart_decoding.engine.engine import Engine
from smart_decoding.engine.request import Request
from smart_decoding.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Proposals:
    """A recorded tree. token, parent, prob: [nodes]; expanded: the nodes (and ROOT) whose children are known."""

    token: NDArray[np.int32]
    parent: NDArray[np.int32]
    prob: NDArray[np.float32]
    expanded: frozenset[int]

    def children(self, node: int, count: int) -> IntArray:
        """The first `count` children of a node, or of ROOT, in the drafter's order."""
        found: IntArray = np.flatnonzero(self.parent == node)[:count]
        return found


@dataclass(slots=True)
class Recorded:
    """A recorded answer: trees[t] was drafted when tokens[: t + 1] were out and predicts tokens[t + 1], and so on."""

    prompt_length: int
    tokens: list[int] = field(default_factory=list)
    trees: list[Proposals] = field(default_factory=list)


class Wide:
    """The recording policy: `levels` levels, `children` per node, a beam of `width` nodes a level; verifies nothing."""

    name = "wide"

    def __init__(self, levels: int = 7, children: int = 10, width: int = 32) -> None:
        self.levels, self.children, self.width = levels, children, width

    def plan(self, batch: BatchState) -> DraftPlan:
        return DraftPlan(True, self.levels, self.children, self.width * batch.size)

    def frontier(self, plan: DraftPlan, batch: BatchState, trees: DraftTrees, level: int) -> IntArray | None:
        nodes = np.flatnonzero((trees.depth == level) & (trees.source == 0))
        return best_per_owner(trees, nodes, trees.path_prob[nodes], self.width) if len(nodes) else None

    def select(self, plan: DraftPlan, batch: BatchState, trees: DraftTrees) -> IntArray:
        return np.zeros(0, np.int64)

    def observe(self, round: Round) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Replayed:
    """tokens and seconds of the decoding rounds, rounds, and drafts that the recording lacked."""

    tokens: int
    seconds: float
    rounds: int
    missing: int

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


def record(
    engine: Engine,
    prompts: Sequence[Prompt],
    at_once: int = 4,
    on_answers: Callable[[int], object] = lambda count: None,
) -> list[Recorded]:
    """Answers `prompts`, a few at once, under the engine's `Wide` policy and keeps every position's tree.

    The engine's drafter must be the one that the replayed policies are meant for. Raises ConfigError without one."""
    if engine.drafter is None or not isinstance(engine.policy, Wide):
        raise ConfigError("recording needs an engine with a model drafter and the policy Wide")
    answers: list[Recorded] = []
    for start in range(0, len(prompts), at_once):
        answers += _record(engine, prompts[start : start + at_once])
        on_answers(len(prompts[start : start + at_once]))
    return answers


def replay(policy: Policy, recording: Sequence[Recorded], cost: CostModel, batch_size: int) -> Replayed:
    """Decodes the recorded answers under `policy`, `batch_size` at a time; the queue is refilled until it runs dry, and
    then rounds of smaller batches are left out, as in the live benchmark."""
    waiting = [answer for answer in recording if len(answer.tokens) > 1]
    running = [_Slot(answer) for answer in waiting[:batch_size]]
    waiting = waiting[batch_size:]
    tokens = rounds = missing = 0
    seconds = 0.0
    if len(running) < batch_size:
        raise ConfigError(f"a replay at batch size {batch_size} needs that many recorded answers, not {len(running)}")
    while len(running) == batch_size:
        source = _Source(running)
        emitted, spent = _round(policy, source, cost)
        tokens, seconds, rounds = tokens + sum(emitted), seconds + spent, rounds + 1
        missing += source.missing
        running = [slot for slot in running if slot.truth]
        while waiting and len(running) < batch_size:
            running.append(_Slot(waiting.pop(0)))
    return Replayed(tokens, seconds, rounds, missing)


def likelihood_settings() -> list[dict[str, int]]:
    """The grid that `likelihood` is tuned over: levels, top-k and nodes, all that make sense."""
    grid = [
        {"depth": depth, "top_k": top_k, "total_tokens": nodes + 1}
        for depth in range(7)
        for top_k in (1, 2, 3, 4, 6, 10)
        for nodes in (2, 4, 6, 8, 12, 16, 24, 40, 59)
    ]
    return [s for s in grid if _sensible(s["depth"] + 1, s["top_k"], s["total_tokens"] - 1)]


def rank(
    recording: Sequence[Recorded],
    cost: CostModel,
    batch_size: int,
    settings: Sequence[dict[str, int]] | None = None,
    eos_token_ids: Sequence[int] = (),
    on_setting: Callable[[], None] = lambda: None,
) -> list[tuple[dict[str, int], Replayed]]:
    """`likelihood` under each setting, the fastest first: the best few are then measured live."""
    results = []
    for setting in settings if settings is not None else likelihood_settings():
        policy = Likelihood(**setting, eos_token_ids=tuple(eos_token_ids))
        results.append((setting, replay(policy, recording, cost, batch_size)))
        on_setting()
    return sorted(results, key=lambda result: -result[1].tokens_per_s)


def _sensible(levels: int, top_k: int, nodes: int) -> bool:
    """Whether the re-ranking has something to choose from, and every level may keep a node."""
    drafted = top_k + (levels - 1) * top_k * top_k
    return levels <= nodes <= drafted


def _record(engine: Engine, prompts: Sequence[Prompt]) -> list[Recorded]:
    answers = {f"record-{p.index}": Recorded(len(p.tokens)) for p in prompts}
    requests: list[Request] = []
    try:
        for prompt in prompts:
            requests += engine.add_request(f"record-{prompt.index}", prompt.tokens, prompt.params, prompt.media)
        while engine.has_unfinished_requests:
            engine.step()
            if engine.last_round is not None:
                trees = engine.last_round.round.trees
                for owner in range(engine.last_round.round.batch.size):
                    answers[engine.last_round.requests[owner].id].trees.append(_proposals(trees, owner))
    finally:
        for request in requests:
            engine.abort(request.id)
    for request in requests:
        answers[request.id].tokens = list(request.output[: request.stop.loop_start])
    return list(answers.values())


@dataclass(slots=True)
class _Slot:
    """A running answer. at: output tokens that are out, less one; pending: rows that the drafter has not processed yet,
    at first the prompt's."""

    answer: Recorded
    at: int = 0
    pending: int = 0

    def __post_init__(self) -> None:
        self.pending = self.answer.prompt_length

    @property
    def truth(self) -> list[int]:
        """The tokens to come."""
        return self.answer.tokens[self.at + 1 :]


class _Source:
    """The running answers' trees as a drafter: where each live node stands in its recorded tree."""

    def __init__(self, slots: Sequence[_Slot]) -> None:
        self.slots = slots
        self.where: list[int] = []
        self.missing = 0

    def expand(self, trees: DraftTrees, owners: Sequence[int], parents: Sequence[int], count: int) -> None:
        """Appends the recorded children of `parents` (live nodes or ROOT)."""
        rows: list[tuple[int, int, int, float]] = []
        for owner, parent in zip(owners, parents, strict=True):
            tree = self.slots[owner].answer.trees[self.slots[owner].at]
            node = ROOT if parent == ROOT else self.where[parent]
            if node not in tree.expanded:
                self.missing += 1
                continue
            for child in tree.children(node, count):
                rows.append((owner, int(tree.token[child]), parent, float(tree.prob[child])))
                self.where.append(int(child))
        if rows:
            owner_, token, parent_, prob = zip(*rows, strict=True)
            trees.append(owner_, token, parent_, prob)


def _round(policy: Policy, source: _Source, cost: CostModel) -> tuple[list[int], float]:
    """One round, the slots moved on: tokens emitted per request, and seconds."""
    size = len(source.slots)
    context = np.array([slot.answer.prompt_length + slot.at for slot in source.slots], np.int64)
    remaining = np.array([len(slot.truth) for slot in source.slots], np.int64)
    catch_up = sum(slot.pending for slot in source.slots) - size
    batch = BatchState(context, remaining, np.zeros(size), np.ones(size, np.bool_), catch_up_rows=catch_up)
    plan, trees, mean = policy.plan(batch), DraftTrees.empty(size), float(context.mean())
    widths: list[int] = []
    owners, parents = list(range(size)), [ROOT] * size
    for level in range(1, (plan.levels if plan.speculate else 0) + 1):
        widths.append(len(parents) + (catch_up if level == 1 else 0))
        source.expand(trees, owners, parents, plan.children)
        nodes = policy.frontier(plan, batch, trees, level) if level < plan.levels else None
        if nodes is None or not len(nodes):
            break
        owners, parents = trees.owner[nodes].tolist(), nodes.tolist()
    kept = policy.select(plan, batch, trees) if len(trees) else np.zeros(0, np.int64)
    emitted, root_next, next_token = _walk(trees, kept, source)
    levels = [float(cost.draft_seconds(width, mean)) for width in widths]
    rows = size + len(kept)
    verify = float(cost.verify_seconds(size, rows, mean))
    policy.observe(Round(batch, plan, trees, kept, next_token, root_next, widths, levels, rows, verify))
    for slot, count in zip(source.slots, emitted, strict=True):
        slot.at += count
        slot.pending = count if widths else slot.pending + count
    return emitted, verify + sum(levels) + (cost.overhead_seconds if widths else 0.0)


def _walk(trees: DraftTrees, kept: IntArray, source: _Source) -> tuple[list[int], IntArray, IntArray]:
    """Down the kept nodes along the recorded answers: tokens emitted, and the target's tokens after roots and nodes."""
    child = {(int(trees.owner[n]), int(trees.parent[n]), int(trees.token[n])): int(n) for n in reversed(kept)}
    next_token = np.full(len(trees), -1, np.int64)
    emitted, roots = [], []
    for owner, slot in enumerate(source.slots):
        truth, node = slot.truth, ROOT
        roots.append(truth[0])
        count = 1
        while count < len(truth) and (owner, node, truth[count - 1]) in child:
            node = child[owner, node, truth[count - 1]]
            next_token[node] = truth[count]
            count += 1
        emitted.append(count)
    return emitted, np.array(roots, np.int64), next_token


def _proposals(trees: DraftTrees, owner: int) -> Proposals:
    mine = np.flatnonzero((trees.owner == owner) & (trees.source == 0))
    tree = trees.take(mine)
    return Proposals(
        tree.token.astype(np.int32),
        tree.parent.astype(np.int32),
        tree.draft_prob.astype(np.float32),
        frozenset(tree.parent.tolist()),
    )
