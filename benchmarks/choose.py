"""The controller's own time: python benchmarks/choose.py

First the pooled choice for many requests with many candidates (scoring included), then every call
of one round at batch 1, 4 and 32 in the simulated world.
"""

import json
import time
from collections import defaultdict

import numpy as np

from smart_decoding.core.cost import CostModel
from smart_decoding.core.policies import make_policy
from smart_decoding.core.policies.protocol import DraftPlan
from smart_decoding.core.tree import DraftTrees
from smart_lab.simulation import World, run

COSTS = CostModel.from_table(
    {1: {1: 21.6, 4: 21.9, 8: 24.8, 16: 30.6, 64: 74.2}}, {1: 1.2, 8: 1.7, 64: 5.0}
)
CHEAP = CostModel.from_table({1: {1: 30.0, 512: 40.0}}, {1: 1.2, 8: 1.7, 64: 5.0})


def wide_trees(requests: int, levels: int = 4, per_level: int = 64) -> DraftTrees:
    """`requests` trees of levels * per_level candidates."""
    rng = np.random.default_rng(0)
    trees = DraftTrees.empty(requests)
    parents, owner = np.full(requests, -1), np.arange(requests)
    for level in range(levels):
        children = per_level if level == 0 else 8
        first = len(trees)
        prob = rng.dirichlet(np.full(children, 0.3), len(parents)).ravel()
        token = rng.integers(0, 30_000, len(prob))
        trees.append(np.repeat(owner, children), token, np.repeat(parents, children), prob)
        new = np.arange(first, len(trees)).reshape(requests, -1)
        parents = np.sort(new[:, : per_level // 8].ravel())
        owner = trees.owner[parents]
    return trees


def choosing_us(requests: int, candidates: int, repeats: int = 200) -> float:
    """Median microseconds of scoring and selecting over `requests` x `candidates`."""
    policy = make_policy("smart", cost=CHEAP)
    batch = World(0, requests, CHEAP).state()
    policy.plan(batch)
    trees = wide_trees(requests, candidates // 64)
    assert len(trees) == requests * candidates
    times = []
    for _ in range(repeats):
        policy._round.drafted = None  # nothing is scored yet
        start = time.perf_counter()
        policy.select(DraftPlan(True, 4), batch, trees)
        times.append(time.perf_counter() - start)
    return float(np.median(times)) * 1e6


class Timed:
    """A policy whose calls are timed."""

    def __init__(self, policy):
        self.policy, self.name, self.seconds = policy, policy.name, defaultdict(list)

    def __getattr__(self, call):
        def timed(*arguments):
            start = time.perf_counter()
            result = getattr(self.policy, call)(*arguments)
            self.seconds[call].append(time.perf_counter() - start)
            return result

        return timed


def round_us(batch: int, rounds: int) -> tuple[dict[str, float], float]:
    """Mean microseconds per round of each call (frontier: all its calls), and candidates per
    round."""
    timed = Timed(make_policy("smart", cost=COSTS if batch < 32 else CHEAP))
    world = World(0, batch, COSTS if batch < 32 else CHEAP)
    run(timed, world, range(50))
    timed.seconds.clear()
    run(timed, world, range(50, 50 + rounds))
    return {call: sum(times) / rounds * 1e6 for call, times in timed.seconds.items()}, rounds


def main() -> None:
    figures = {}
    for requests, candidates in ((1, 64), (8, 256), (32, 256)):
        us = figures[f"choose_{requests}x{candidates}_us"] = choosing_us(requests, candidates)
        print(
            f"choose {requests:3} requests x {candidates} candidates, scoring included: {us:7.0f} us"
        )
    for batch, rounds in ((1, 300), (4, 100), (32, 20)):
        calls, _ = round_us(batch, rounds)
        figures[f"round_batch_{batch}_us"] = sum(calls.values())
        parts = ", ".join(f"{call} {us:.0f}" for call, us in calls.items())
        print(f"round at batch {batch:2}: {sum(calls.values()):6.0f} us ({parts})")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
