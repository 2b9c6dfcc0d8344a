"""A simulated engine that drafts chains and verifies them a step later: the world that the policy
must cope with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from smart_decoding.integrations.chains import Chains, Step
from smart_decoding.integrations.disabling import DISABLED

FEW = 26  # lost tokens that still do no harm


@dataclass
class World:
    """Each request accepts a draft token with its own probability; seconds are what `cost` says,
    with some noise.

    cost(batch, drafts, levels): true seconds of a step. hits: probability that the drafter has a
    proposal at all. life: steps after which a request makes way for a new one. disables: the policy
    may disable the draft model, for which cost is asked with levels = DISABLED; requests that lose
    more than a few tokens so have no draft accepted any more."""

    accept: Sequence[float]
    cost: Callable[[int, int, int], float]
    longest: int = 4
    model: bool = False
    hits: float = 1.0
    noise: float = 0.03
    seed: int = 0
    life: int = 10**9
    disables: bool = False
    seconds: float = 0.0
    tokens: int = 0
    verified_by: list[int] = field(default_factory=list)

    def run(self, steps: int, policy: Chains | None, fixed: int = 0) -> float:
        """Tokens per second of `steps` steps, under a policy or at a fixed length."""
        random = np.random.default_rng(self.seed)
        batch = len(self.accept)
        lost: Counter[str] = Counter()
        self.verified_by = [0] * batch
        self.seconds = 0.0
        self.tokens = 0
        drafts = [0] * batch
        if policy:
            policy.may_disable = self.disables
        for now in range(steps):
            ids = self._ids(now)
            drafts = [
                d if id_ in lost or not self.disables else 0
                for id_, d in zip(ids, drafts, strict=True)
            ]
            exploring = policy.take_exploring() if policy else False
            levels = policy.length(ids) if policy else fixed
            verified = dict(zip(ids, drafts, strict=True))
            good = [p if lost[id_] <= FEW else 0.0 for id_, p in zip(ids, self.accept, strict=True)]
            accepted = {
                id_: _run_length(random, p, verified[id_]) for id_, p in zip(ids, good, strict=True)
            }
            lost.update({id_: int(levels == DISABLED) for id_ in ids})
            true = self.cost(batch, sum(drafts), levels if self.model else 0)
            self.seconds += true
            self.tokens += batch + sum(accepted.values())
            self.verified_by = [a + b for a, b in zip(self.verified_by, drafts, strict=True)]
            proposed = [
                max(levels, 0) if self.model or random.random() < self.hits else 0 for _ in ids
            ]
            drafts = proposed
            if policy:
                drafted = {id_: count for id_, count in verified.items() if count}
                step = Step(batch, levels, drafted, accepted, exploring=exploring)
                policy.observe(step, true * float(np.exp(self.noise * random.standard_normal())))
                drafts = policy.trim(ids, proposed, [True] * batch, [100] * batch)
        return self.tokens / self.seconds

    def _ids(self, now: int) -> list[str]:
        batch = len(self.accept)
        return [f"r{i}.{(now + i * self.life // batch) // self.life}" for i in range(batch)]


def _run_length(random: np.random.Generator, probability: float, most: int) -> int:
    if not most:
        return 0
    outcomes = random.random(most) < probability
    return most if outcomes.all() else int(outcomes.argmin())
