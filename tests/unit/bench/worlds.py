"""A target, a drafter and a clock without a model: tokens follow a rule and times are set, so
figures are exact."""

from __future__ import annotations

import numpy as np

from smart_decoding.bench.blocks import Prompt
from smart_decoding.core.policies import make_policy
from smart_decoding.core.selection import Selection
from smart_decoding.core.tree import DraftTrees
from smart_decoding.drafters.levels import draft_by_levels
from smart_decoding.engine.engine import Engine, EngineConfig
from smart_decoding.engine.loops import MIN_TOKENS
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.engine.verification import TargetScores, verify_by_rows

VOCAB, EOS = 997, 996


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def successor(token):
    """The rule that the target follows: a long cycle through the vocabulary, which never ends or
    loops early."""
    return (np.asarray(token) + 1) % EOS


class RuleTarget:
    """A forward takes 1 s + `row_seconds` for each row."""

    vocab, max_positions, eos_token_ids = VOCAB, 2048, (EOS,)
    states = snapshots = 0
    verify = verify_by_rows

    def __init__(self, clock: Clock, row_seconds: float = 0.0, rule=successor) -> None:
        self.clock, self.row_seconds, self.rule = clock, row_seconds, rule

    def forward(self, rows, aux_layers):
        self.clock.now += 1.0 + self.row_seconds * len(rows)
        requested = rows.token if rows.logit_rows is None else rows.token[rows.logit_rows]
        return TargetScores(np.asarray(self.rule(requested)), None)

    def argmax(self, logits, which):
        return logits[which.astype(np.int64)].astype(np.int64)  # there may be none

    def move(self, source, target):
        pass


class RuleDrafter:
    """Proposes the right token first if `good`, and a wrong one; a level takes `seconds`, and each
    of its rows `row_seconds`, the rows of tokens that it has not seen yet included."""

    name, has_model, free, aux_layers, needs_ends = ("rule", True, False, (), False)
    resting_layers = ()

    def __init__(
        self, clock: Clock, good: bool = True, seconds: float = 0.0, row_seconds: float = 0.0
    ) -> None:
        self.clock, self.good, self.seconds, self.row_seconds = clock, good, seconds, row_seconds
        self.pending: dict[str, int] = {}

    def pending_rows(self, requests):
        return sum(self.pending[r.id] for r in requests)

    def draft(self, requests, rule, interrupted, proposed=None):
        proposed = DraftTrees.empty(len(requests)) if proposed is None else proposed
        return draft_by_levels(self, requests, rule, interrupted, proposed, Selection(), self.clock)

    def propose_roots(self, requests, rule):
        trees = DraftTrees.empty(len(requests))
        self.clock.now += self.row_seconds * (self.pending_rows(requests) - len(requests))
        self.pending.update((r.id, 0) for r in requests)
        self._append(
            trees,
            np.arange(len(requests)),
            np.full(len(requests), -1),
            [r.tokens[-1] for r in requests],
            rule,
        )
        return trees

    def next_level(self, requests, trees, nodes, rule):
        self._append(trees, trees.owner[nodes], nodes, trees.token[nodes], rule)
        return len(nodes)

    def _append(self, trees, owner, parent, last, rule):
        self.clock.now += self.seconds + self.row_seconds * len(owner)
        for rank in range(min(rule.children, 2)):
            wrong = rank if self.good else rank + 1
            trees.append(
                owner,
                successor(np.asarray(last) + wrong),
                parent,
                np.full(len(owner), 0.6 - 0.3 * rank),
            )

    def extend_each(self, requests, features):
        for request in requests:
            self.pending[request.id] = self.pending.get(request.id, 0) + 1

    def extend(self, request, features, first, tokens):
        self.pending[request.id] = self.pending.get(request.id, 0) + len(tokens)

    def release(self, request):
        self.pending.pop(request.id, None)


def engine(clock, policy="off", drafter=None, target=None, batch=8, **options) -> Engine:
    config = EngineConfig(512, 2048, batch, 256, prefix_caching=False, stop_at_loops=MIN_TOKENS)
    return Engine(
        target or RuleTarget(clock),
        make_policy(policy, **options),
        drafter,
        config,
        lambda skip: lambda ids: "x" * len(ids),
        clock,
    )


def drafting_engine(clock) -> Engine:
    """Draws trees of two levels and four nodes; a row costs 0.1 s, a level 0.25 s."""
    target = RuleTarget(clock, row_seconds=0.1)
    drafter = RuleDrafter(clock, seconds=0.25)
    return engine(clock, "eagle2", drafter, target, depth=1, top_k=2, total_tokens=5)


def prompts(task="code", count=4, first=0, tokens=20, length=3):
    """Prompt i counts on from 17 i + 1; its answer has tokens + i % 3 tokens."""

    def prompt(i):
        params = SamplingParams(temperature=0, max_tokens=tokens + i % 3, seed=i)
        return Prompt(i, task, list(range(17 * i + 1, 17 * i + 1 + length)), params)

    return [prompt(i) for i in range(first, first + count)]
