"""SGLang's `AdaptiveSpecPolicy` by SMART's rule: the steps of most tokens per second.

Steps stand for their nodes, too, where trees are drafted. Every tensor-parallel rank runs the
policy by itself and all must choose alike: seconds come from a file that all ranks read, never from
a clock, and acceptance from the counts that SGLang hands to every rank.
"""

from __future__ import annotations

import itertools
import json
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from smart_decoding.core.exploration import Exploration
from smart_decoding.errors import ConfigError
from smart_decoding.integrations.sglang.costs import COSTS, read_costs

MEMORY = 0.995  # per batch: older counts fade
PRIOR = 0.7  # acceptance of all depths together, at first
PRIOR_WEIGHT = 4.0  # drafts that a prior counts as; a depth's prior is the rate of all depths
BUDGET = 0.005  # share of the time that may go into exploring larger candidates


class SmartSpecPolicy:
    """The policy in place of SGLang's AdaptiveSpeculativeParams, with the same constructor.

    initial_steps: where to start. cfg_path: SGLang's --speculative-adaptive-config with the
    candidate steps. SGLang sizes its buffers by them, so only they may be chosen."""

    def __init__(self, initial_steps: int, cfg_path: str | None = None) -> None:
        self.costs = read_costs()
        self._candidates = _candidates(cfg_path)
        self._initial = initial_steps
        longest = max(self.candidate_steps)
        if self.costs.nodes and not set(self.candidate_steps) <= {0, *self.costs.nodes}:
            raise ConfigError(
                f"{COSTS}: 'nodes' must have every candidate of {self.candidate_steps} but 0"
            )
        # Chains of all lengths are accepted alike, depth by depth. Trees are not, as deeper ones
        # are wider too: their acceptance is counted by tier.
        tiers = self.candidate_steps if self.costs.nodes else [0]
        self._accepted = {tier: [0.0] * longest for tier in tiers}
        self._tested = {tier: [0.0] * longest for tier in tiers}
        self._graph_sizes: list[int] | None = None
        self._steps: dict[int, int] = {}  # chosen, by batch size, until new counts arrive
        # Steps of the last batches: overlapped scheduling reports a batch late.
        self._recent: deque[int] = deque(maxlen=2)
        self._exploration = Exploration(BUDGET)
        self._explores = False  # whether the batch chosen last does

    # --- the protocol ---

    @property
    def candidate_steps(self) -> list[int]:
        """All steps that may be chosen, ascending."""
        of_file = (step for steps in self._candidates.values() for step in steps)
        return sorted({self._initial, *of_file})

    def set_cuda_graph_bs(self, cuda_graph_bs: list[int] | None) -> None:
        """Set the batch sizes that graphs are captured for."""
        self._graph_sizes = sorted(cuda_graph_bs) if cuda_graph_bs else None

    def get_steps_for_batch(self, batch_size: int) -> int:
        """Return how many steps to draft for a batch that is about to run."""
        steps = self._choose(batch_size)
        self._recent.append(steps)
        return steps

    def on_verify_complete(
        self,
        num_correct_drafts_per_req: list[int],
        batch_size: int,
        num_steps: int | None = None,
    ) -> int | None:
        """Count accepted drafts. num_steps: of that batch, where SGLang passes it.

        Returns None, never a switch: the next batch calls `get_steps_for_batch` anyway."""
        if not self._recent:
            return None
        self._observe_exploration(batch_size, batch_size + sum(num_correct_drafts_per_req))
        steps = num_steps
        if steps is None:  # unknown where the last two batches had different ones
            steps = self._recent[0] if len(set(self._recent)) == 1 else 0
        if num_correct_drafts_per_req and steps:
            self._count(num_correct_drafts_per_req, steps)
            self._steps.clear()
        return None

    def on_state_activated(self, steps: int) -> None:
        """Do nothing: steps are counted in `get_steps_for_batch`."""

    def cuda_graph_bs_for_step(self, step: int) -> list[int] | None:
        """Return the captured batch sizes that may draft so many steps."""
        if self._graph_sizes is None:
            return None
        return [size for size in self._graph_sizes if step in self._allowed(size)]

    # --- the rule ---

    def _choose(self, batch_size: int) -> int:
        """Return the best candidate or, as an exploration, the next larger, whose acceptance only
        it can show."""
        best = self._best(batch_size)
        larger = next((steps for steps in self._allowed(batch_size) if steps > best), best)
        if larger > best and not self._exploration.left and self._exploration.wait(batch_size) <= 0:
            self._exploration.begin(batch_size)
        self._explores = larger > best and self._exploration.left > 0
        return larger if self._explores else best

    def _observe_exploration(self, batch_size: int, tokens: int) -> None:
        """Charge an exploration to the last batch, by the tokens of the batch reported now: over a
        run both are the same."""
        steps = self._recent[-1]
        best = self._best(batch_size)
        if not self._explores or steps <= best or not batch_size:
            self._exploration.observe_best(batch_size)
            return
        usual = self.costs.seconds(batch_size, best) / self.expected_tokens(best)
        loss = self.costs.seconds(batch_size, steps) - tokens / batch_size * usual
        self._exploration.observe(batch_size, loss, self.costs.seconds(batch_size, 0))

    def acceptance(self, steps: int) -> list[float]:
        """Return P(draft at depth 1, 2, ... is accepted | the one before it was).

        Rare depths fall back on all tiers together, and those on all depths together."""
        accepted = [sum(depth) for depth in zip(*self._accepted.values(), strict=True)]
        tested = [sum(depth) for depth in zip(*self._tested.values(), strict=True)]
        overall = _share(sum(accepted), sum(tested), PRIOR)
        usual = [_share(a, t, overall) for a, t in zip(accepted, tested, strict=True)]
        tier = steps if self.costs.nodes else 0
        own = zip(self._accepted[tier], self._tested[tier], usual, strict=True)
        return [_share(a, t, prior) for a, t, prior in own]

    def expected_tokens(self, steps: int) -> float:
        """Return expected tokens of one request in one round, the bonus token included."""
        if not steps:
            return 1.0
        return 1.0 + sum(itertools.accumulate(self.acceptance(steps)[:steps], float.__mul__))

    def _best(self, batch: int) -> int:
        """Return the candidate of most tokens per second, kept until new counts arrive."""
        if batch not in self._steps:
            self._steps[batch] = max(
                self._allowed(batch),
                key=lambda steps: self.expected_tokens(steps) / self.costs.seconds(batch, steps),
            )
        return self._steps[batch]

    def _count(self, correct: Sequence[int], drafted: int) -> None:
        tier = drafted if self.costs.nodes else 0
        accepted = self._accepted[tier] = [MEMORY * count for count in self._accepted[tier]]
        tested = self._tested[tier] = [MEMORY * count for count in self._tested[tier]]
        for right in correct:
            for depth in range(min(right + 1, drafted)):  # depths beyond a rejection are censored
                tested[depth] += 1
                accepted[depth] += depth < right

    def _allowed(self, batch: int) -> list[int]:
        """Return the candidates of a batch size: of the largest size in SGLang's file up to it."""
        size = batch
        if self._graph_sizes:  # SGLang pads to the next captured size
            index = bisect_left(self._graph_sizes, batch)
            size = self._graph_sizes[index] if index < len(self._graph_sizes) else batch
        sizes = sorted(self._candidates)
        return self._candidates[max((known for known in sizes if known <= size), default=sizes[0])]


def _share(accepted: float, tested: float, prior: float) -> float:
    return (accepted + prior * PRIOR_WEIGHT) / (tested + PRIOR_WEIGHT)


def _candidates(cfg_path: str | None) -> dict[int, list[int]]:
    """Return candidate steps by batch size from SGLang's file.

    Raises ConfigError without such a file."""
    if cfg_path is None:
        raise ConfigError(
            f"{COSTS} is set: give the steps to choose from, too, "
            "by --speculative-adaptive-config FILE"
        )
    try:
        content = json.loads(Path(cfg_path).read_text(encoding="utf-8"))
        found = {
            int(size): sorted(set(entry["candidate_steps"]))
            for size, entry in content.items()
            if size.isdigit()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{cfg_path} is no --speculative-adaptive-config: {error}") from error
    if not found or not all(steps and min(steps) >= 0 for steps in found.values()):
        raise ConfigError(f"{cfg_path} names no candidate_steps")
    return found
