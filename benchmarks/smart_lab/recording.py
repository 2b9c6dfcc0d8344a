"""Wide drafts of every output position, recorded once: any policy can be replayed on them
(replay.py).

Recording runs a policy that drafts wide trees and verifies none of their nodes: every round emits
one token, so that every output position gets its tree, drafted from the same state as in any other
run. A union is recorded by its model alone (`recorder.record_wide`): its n-grams depend on nothing
that a policy decides, but a model that expands their nodes leaves no tree of its own. Drafters
without a model propose whole trees, which are recorded as they are.

Needed by `bench --record`, `ablate` and the tuning of `bench`, and so by docs/lab.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from smart_decoding.core.policies.base import StatelessPolicy
from smart_decoding.core.rule import TreeRule
from smart_decoding.core.selection import Beam, KeepBest
from smart_decoding.core.tree import ROOT, DraftTrees, IntArray
from smart_decoding.errors import ConfigError

if TYPE_CHECKING:
    from smart_decoding.bench.blocks import Prompt
    from smart_decoding.core.batch import BatchState
    from smart_decoding.engine.engine import Engine
    from smart_decoding.engine.request import Request

LEVELS, CHILDREN, WIDTH = 8, 10, 16


@dataclass(frozen=True, slots=True)
class Answer:
    """A recorded answer. tokens: all of it; limit: its max_tokens; first: the position of its first
    tree; temperature: its tokens were sampled with.

    The tree at `first` + t was drafted when tokens[: t + 1] were out and predicts tokens[t + 1],
    and so on."""

    prompt_length: int
    limit: int
    tokens: NDArray[np.int32]
    first: int
    task: str = ""
    temperature: float = 0.0

    @property
    def positions(self) -> int:
        return len(self.tokens) - 1


Drawn: TypeAlias = tuple[
    int, int, Sequence[int], Sequence[DraftTrees], str
]  # prompt length, limit, tokens, trees, task


@dataclass(frozen=True, eq=False)
class Recording:
    """All answers, and the trees of all their positions in flat arrays.

    token, prob: [nodes], position after position, each breadth first. count: [positions + nodes]
    recorded children of each root, then of each node; 0 where it was not expanded. child: the first
    of them; the others follow it. free: the trees are proposed as a whole, without a model. ngrams:
    such trees of the same positions, where both drafters make a union."""

    answers: Sequence[Answer]
    token: NDArray[np.int32]
    prob: NDArray[np.float32]
    count: NDArray[np.uint8]
    child: NDArray[np.int64]
    free: bool = False
    ngrams: Recording | None = None

    @classmethod
    def of(cls, answers: Iterable[Drawn], free: bool = False) -> Recording:
        """Make it of one tree (one owner, one drafter's nodes) for each position of each answer."""
        made: list[Answer] = []
        tokens: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
        probs: list[NDArray[np.float64]] = [np.zeros(0)]
        counts: list[NDArray[np.int64]] = []
        roots: list[int] = []
        for prompt_length, limit, output, trees, task in answers:
            made.append(
                Answer(prompt_length, limit, np.asarray(output, np.int32), len(roots), task)
            )
            for tree in trees[: len(output) - 1]:
                order, children = _breadth_first(tree)
                tokens.append(tree.token[order])
                probs.append(tree.draft_prob[order])
                roots.append(children[0])
                counts.append(children[1:])
        sizes = np.array([len(t) for t in tokens[1:]], np.int64)
        count = np.concatenate([np.array(roots, np.int64), *counts])
        token = np.concatenate(tokens)
        return cls.from_flat(made, token, np.concatenate(probs), count, sizes, free)

    @classmethod
    def from_flat(
        cls,
        answers: Sequence[Answer],
        token: IntArray,
        prob: NDArray[np.floating],
        count: IntArray,
        sizes: IntArray,
        free: bool = False,
    ) -> Recording:
        """Make it of flat arrays; sizes: [positions] nodes of each tree. Raises ValueError for
        contradictions."""
        positions = sum(max(0, answer.positions) for answer in answers)
        if (
            len(sizes) != positions
            or sizes.sum() != len(token)
            or len(count) != positions + len(token)
        ):
            raise ValueError("the arrays of a recording have contradicting lengths")
        start = np.cumsum(sizes) - sizes
        order = np.argsort(
            np.concatenate((start - 0.5, np.arange(len(token)))), kind="stable"
        )  # roots before nodes
        below = np.cumsum(count[order]) - count[order]
        child = np.empty(len(count), np.int64)
        child[order] = below
        if count.sum() != len(token) or (len(token) and (child[:positions] != start).any()):
            raise ValueError("the trees of a recording do not fit together")
        columns = token.astype(np.int32), prob.astype(np.float32), count.astype(np.uint8)
        return cls(answers, *columns, child, free)

    @property
    def positions(self) -> int:
        return len(self.count) - len(self.token)

    @property
    def sizes(self) -> IntArray:
        """[positions] nodes of each tree."""
        start = self.child[: self.positions]
        sizes: IntArray = np.diff(start, append=len(self.token))
        return sizes

    def repeated(self, times: int) -> Recording:
        """Return every answer `times` times, over the same trees."""
        return replace(self, answers=[*self.answers] * times)

    def at_context(self, context: int) -> Recording:
        """Return the same answers behind prompts of that length. Acceptance stays what it was."""
        answers = [replace(a, prompt_length=context) for a in self.answers]
        return replace(self, answers=answers)

    def beside(self, ngrams: Recording) -> Recording:
        """Return the recording of a union; `take` and `followed_by` leave its n-grams out. Raises
        ConfigError unless `ngrams` is of free drafters and of the same answers."""
        both = zip(self.answers, ngrams.answers, strict=False)
        same = all(np.array_equal(one.tokens, other.tokens) for one, other in both)
        if self.free or not ngrams.free or self.positions != ngrams.positions or not same:
            raise ConfigError(
                "n-grams beside a model need a recording of the same prompts by n-grams"
            )
        return replace(self, ngrams=ngrams)

    def followed_by(self, other: Recording) -> Recording:
        """Return all answers of both, with the trees of both. Raises ConfigError if only one has
        the trees of a drafter with a model."""
        if self.free != other.free:
            raise ConfigError("one recording is of a model's drafts, and the other of free ones")
        answers = [*self.answers]
        answers += [replace(a, first=a.first + self.positions) for a in other.answers]
        counts = [r.count[: r.positions] for r in (self, other)]
        counts += [r.count[r.positions :] for r in (self, other)]
        return Recording.from_flat(
            answers,
            np.concatenate((self.token, other.token)).astype(np.int64),
            np.concatenate((self.prob, other.prob)),
            np.concatenate(counts).astype(np.int64),
            np.concatenate((self.sizes, other.sizes)),
            self.free,
        )

    def take(self, answers: Iterable[int]) -> Recording:
        """Some of the answers, in the order given."""
        chosen = [self.answers[i] for i in answers]
        at = np.concatenate(
            [np.arange(a.first, a.first + a.positions) for a in chosen] or [np.zeros(0, np.int64)]
        )
        sizes, start = self.sizes[at], self.child[: self.positions][at]
        nodes = np.repeat(start - np.cumsum(sizes) + sizes, sizes) + np.arange(int(sizes.sum()))
        firsts = np.cumsum([0] + [a.positions for a in chosen])
        renumbered = [
            replace(a, first=int(first)) for a, first in zip(chosen, firsts, strict=False)
        ]
        count = np.concatenate((self.count[at], self.count[self.positions + nodes])).astype(
            np.int64
        )
        return Recording.from_flat(
            renumbered,
            self.token[nodes].astype(np.int64),
            self.prob[nodes],
            count,
            sizes,
            self.free,
        )


def interleaved(one: Recording, other: Recording) -> Recording:
    """Return the answers of both by turns, as far as both have any."""
    both = one.followed_by(other)
    behind = both.answers[len(one.answers) :]
    answers = [a for pair in zip(both.answers, behind, strict=False) for a in pair]
    return replace(both, answers=answers)


class Wide(StatelessPolicy):
    """The recording policy: `levels` levels, `children` per node, a beam of `width` nodes a level;
    verifies nothing."""

    name = "wide"

    def __init__(self, levels: int = LEVELS, children: int = CHILDREN, width: int = WIDTH) -> None:
        self.levels, self.children, self.width = levels, children, width

    def plan(self, batch: BatchState) -> TreeRule:
        """Return all levels, whatever the requests could still use."""
        deepest = np.full(batch.size, self.levels + 1)
        ends = np.zeros(0, np.int64)
        beam = Beam(self.width)
        return TreeRule(self.levels, self.children, deepest, ends, beam, KeepBest(0))


def record(
    engine: Engine,
    prompts: Sequence[Prompt],
    at_once: int = 4,
    on_answers: Callable[[int], object] = lambda count: None,
    late: Callable[[], bool] = lambda: False,
) -> Recording:
    """Answer `prompts`, a few at once, under the engine's `Wide` policy and keep every position's
    tree.

    The engine's drafter must be the one that the replayed policies are meant for, and no union.
    late: whether to begin no more prompts. Raises ConfigError without a drafter."""
    if not engine.drafts or not isinstance(engine.policy, Wide):
        raise ConfigError("recording needs an engine with a drafter and the policy Wide")
    answers: list[Drawn] = []
    for start in range(0, len(prompts), at_once):
        if answers and late():
            break
        answers += _record(engine, prompts[start : start + at_once])
        on_answers(len(prompts[start : start + at_once]))
    return Recording.of(answers, free=not engine.drafter.has_model)


def _record(engine: Engine, prompts: Sequence[Prompt]) -> list[Drawn]:
    trees: dict[str, list[DraftTrees]] = {f"record-{p.index}": [] for p in prompts}
    requests: list[Request] = []
    chunk = engine.scheduler.chunk
    try:
        # All prompts in one round: where some still came while others decode already, those would
        # not draft.
        engine.scheduler.chunk = max(chunk, sum(len(prompt.tokens) for prompt in prompts))
        for prompt in prompts:
            requests += engine.add_request(
                f"record-{prompt.index}", prompt.tokens, prompt.params, prompt.media
            )
        while engine.has_unfinished_requests:
            engine.step()
            if engine.last_round is not None:
                drafted = engine.last_round.round.trees
                for owner in range(engine.last_round.round.batch.size):
                    mine = drafted.take(np.flatnonzero(drafted.owner == owner))
                    trees[engine.last_round.requests[owner].id].append(mine)
    finally:
        engine.scheduler.chunk = chunk
        for request in requests:
            engine.abort(request.id)
    return [
        (len(p.tokens), r.max_tokens, r.output[: r.stop.loop_start], trees[r.id], p.task)
        for p, r in zip(prompts, requests, strict=True)
    ]


def _breadth_first(tree: DraftTrees) -> tuple[IntArray, IntArray]:
    """Return the order that puts children in their parents' order, level by level; children of the
    root and of each node."""
    rank = np.empty(len(tree) + 1, np.int64)
    rank[ROOT] = -1
    order: list[IntArray] = []
    done = 0
    for depth in range(1, int(tree.depth.max(initial=0)) + 1):
        nodes = np.flatnonzero(tree.depth == depth)
        nodes = nodes[np.argsort(rank[tree.parent[nodes]], kind="stable")]
        rank[nodes] = done + np.arange(len(nodes))
        done += len(nodes)
        order.append(nodes)
    children = np.bincount(rank[tree.parent] + 1, minlength=len(tree) + 1)
    return np.concatenate(order) if order else np.zeros(0, np.int64), children
