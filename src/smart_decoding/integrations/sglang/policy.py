"""SGLang's `AdaptiveSpecPolicy` by SMART's rule: the steps, and with trees their nodes, of most
tokens per second.

Every tensor-parallel rank runs the policy by itself and all must choose alike: seconds come from a
file that all ranks read, never from a clock, and acceptance from the counts that SGLang hands to
every rank.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from bisect import bisect_left
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np

from smart_decoding.errors import ConfigError
from smart_decoding.integrations.sglang import COSTS

MARGIN = 1.02  # what drafting must promise over plain decoding
MEMORY = 0.995  # per batch: older counts fade
PRIOR, PRIOR_TRIALS = (
    0.7,
    4.0,
)  # of all depths together; of one depth, what all say together is worth as much
PROBE_EVERY = 64  # batches, after which two draft the next larger candidate


class StepCosts:
    """Seconds of one round by batch size and drafted steps, from a table; between its entries
    linear, beyond constant.

    {"seconds": {"1": {"0": 0.011, "1": 0.013, "3": 0.016}, "16": {...}}}: batch size -> steps ->
    seconds. For trees also {"nodes": {"1": 4, "3": 12}}: how many nodes are verified after so many
    steps, in the same rounds."""

    def __init__(
        self,
        table: Mapping[int, Mapping[int, float]],
        nodes: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        self._batches = sorted(table)
        self._rows = {batch: sorted(row.items()) for batch, row in table.items()}
        self.nodes = dict(nodes)

    @classmethod
    def load(cls, path: Path) -> StepCosts:
        """Raises ConfigError if the file is not such a table."""
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
            rows = given["seconds"].items()
            table = {
                int(b): {int(k): float(seconds) for k, seconds in row.items()} for b, row in rows
            }
            nodes = {int(k): int(count) for k, count in given.get("nodes", {}).items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is no file of costs for {COSTS}: {error}") from error
        numbers = [seconds for row in table.values() for seconds in row.values()]
        if not table or not all(0 in row for row in table.values()) or min(table) < 1:
            raise ConfigError(
                f"{path}: every batch size needs the seconds of 0 steps (plain decoding)"
            )
        if not all(math.isfinite(seconds) and seconds > 0 for seconds in numbers):
            raise ConfigError(f"{path}: seconds must be positive")
        if any(not 1 <= k <= count for k, count in nodes.items()):
            raise ConfigError(f"{path}: k steps, from 1 on, have at least k nodes")
        return cls(table, nodes)

    def seconds(self, batch: int, steps: int) -> float:
        """Seconds of one round: drafting, verifying and all else."""
        rows = [float(np.interp(steps, *zip(*self._rows[b], strict=True))) for b in self._batches]
        return float(np.interp(math.log(max(batch, 1)), np.log(self._batches), rows))

    def tokens(self, steps: int) -> int:
        """Tokens that a round verifies for a request, its last one included."""
        return 1 + (self.nodes[steps] if self.nodes and steps else steps)


def read_costs() -> StepCosts:
    """The file that SMART_SGLANG_COSTS names."""
    return StepCosts.load(Path(os.environ[COSTS]))


class SmartSpecPolicy:
    """Constructed as SGLang's AdaptiveSpeculativeParams, whose place it takes.

    initial_steps: where to start. cfg_path: SGLang's --speculative-adaptive-config, of which the
    candidate steps are taken; SGLang sizes its buffers by them, so that no others may be chosen."""

    def __init__(self, initial_steps: int, cfg_path: str | None = None) -> None:
        self.costs = read_costs()
        self._candidates = _candidates(cfg_path, initial_steps)
        self._initial = initial_steps
        self._longest = max(self.candidate_steps)
        if self.costs.nodes and not set(self.candidate_steps) <= {0, *self.costs.nodes}:
            raise ConfigError(
                f"{COSTS}: 'nodes' must have every candidate of {self.candidate_steps} but 0"
            )
        # Chains of all lengths are accepted alike, depth by depth; trees are not, as deeper ones
        # are wider too.
        tiers = self.candidate_steps if self.costs.nodes else [0]
        self._hits = {tier: [0.0] * self._longest for tier in tiers}
        self._trials = {tier: [0.0] * self._longest for tier in tiers}
        self._graph_sizes: list[int] | None = None
        self._steps: dict[int, int] = {}  # chosen, by batch size, until new counts arrive
        self._recent: deque[int] = deque(
            maxlen=2
        )  # answered last: overlapped scheduling reports a batch late
        self._since_probe = 0  # batches

    # --- the protocol ---

    @property
    def candidate_steps(self) -> list[int]:
        return sorted(
            {self._initial, *(step for steps in self._candidates.values() for step in steps)}
        )

    def set_cuda_graph_bs(self, cuda_graph_bs: list[int] | None) -> None:
        self._graph_sizes = sorted(cuda_graph_bs) if cuda_graph_bs else None

    def get_steps_for_batch(self, batch_size: int) -> int:
        steps = self._choose(batch_size)
        self._recent.append(steps)
        return steps

    def on_verify_complete(
        self, num_correct_drafts_per_req: list[int], batch_size: int
    ) -> int | None:
        """Counts; the next batch asks for its steps by itself, so there is never a switch to
        announce."""
        self._since_probe = (self._since_probe + 1) % (PROBE_EVERY + 2)
        if (
            num_correct_drafts_per_req
            and self._recent
            and min(self._recent) == max(self._recent) > 0
        ):
            self._count(num_correct_drafts_per_req, self._recent[0])
            self._steps.clear()
        return None

    def cuda_graph_bs_for_step(self, step: int) -> list[int] | None:
        if self._graph_sizes is None:
            return None
        return [size for size in self._graph_sizes if step in self._allowed(size)]

    # --- the rule ---

    def _choose(self, batch_size: int) -> int:
        """The best candidate or, in two of many batches, the next larger: what only it can show is
        unknown."""
        if batch_size not in self._steps:
            self._steps[batch_size] = self._best(batch_size)
        steps = self._steps[batch_size]
        if self._since_probe >= PROBE_EVERY:
            return next((larger for larger in self._allowed(batch_size) if larger > steps), steps)
        return steps

    def acceptance(self, steps: int) -> list[float]:
        """P(draft at depth 1, 2, ... is accepted | the one before it was); what was seldom seen is
        as all together."""
        tier = steps if self.costs.nodes else 0
        hits, trials = (
            [sum(depth) for depth in zip(*all_.values(), strict=True)]
            for all_ in (self._hits, self._trials)
        )
        every = _share(sum(hits), sum(trials), PRIOR)
        depths = [_share(h, t, every) for h, t in zip(hits, trials, strict=True)]
        own = zip(self._hits[tier], self._trials[tier], depths, strict=True)
        return [_share(h, t, usual) for h, t, usual in own]

    def expected_tokens(self, steps: int) -> float:
        """Of one request in one round, the target's own included."""
        return (
            1.0 + sum(itertools.accumulate(self.acceptance(steps)[:steps], float.__mul__))
            if steps
            else 1.0
        )

    def _best(self, batch: int) -> int:
        values = {
            steps: self.expected_tokens(steps) / self.costs.seconds(batch, steps)
            for steps in self._allowed(batch)
        }
        best = max(values, key=lambda steps: values[steps])
        return best if 0 not in values or best == 0 or values[best] > MARGIN * values[0] else 0

    def _count(self, correct: Sequence[int], drafted: int) -> None:
        tier = drafted if self.costs.nodes else 0
        hits = self._hits[tier] = [MEMORY * hits for hits in self._hits[tier]]
        trials = self._trials[tier] = [MEMORY * trials for trials in self._trials[tier]]
        for count in correct:
            for depth in range(
                min(count + 1, drafted)
            ):  # beyond the first rejection all is censored
                trials[depth] += 1
                hits[depth] += depth < count

    def _allowed(self, batch: int) -> list[int]:
        """Candidates of a batch size: those of the largest size in SGLang's file that is not
        larger."""
        size = batch
        if self._graph_sizes:  # SGLang pads to the next captured size
            index = bisect_left(self._graph_sizes, batch)
            size = self._graph_sizes[index] if index < len(self._graph_sizes) else batch
        sizes = sorted(self._candidates)
        return self._candidates[max((known for known in sizes if known <= size), default=sizes[0])]


def _share(hits: float, trials: float, usual: float) -> float:
    return (hits + usual * PRIOR_TRIALS) / (trials + PRIOR_TRIALS)


def _candidates(cfg_path: str | None, initial_steps: int) -> dict[int, list[int]]:
    """Candidate steps by batch size from SGLang's file. Raises ConfigError if there is none, or it
    is not one."""
    if cfg_path is None:
        raise ConfigError(
            f"{COSTS} is set: give the steps to choose from, too, by --speculative-adaptive-config FILE"
        )
    try:
        given = json.loads(Path(cfg_path).read_text(encoding="utf-8"))
        found = {
            int(size): sorted(set(entry["candidate_steps"]))
            for size, entry in given.items()
            if size.isdigit()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{cfg_path} is no --speculative-adaptive-config: {error}") from error
    if not found or not all(steps and min(steps) >= 0 for steps in found.values()):
        raise ConfigError(f"{cfg_path} names no candidate_steps")
    return found
