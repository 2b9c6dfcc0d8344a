"""SGLang's `AdaptiveSpecPolicy` by SMART's rule: the steps of most tokens per second.

Steps stand for their nodes, too, where trees are drafted. Every tensor-parallel rank runs the
policy by itself and all must choose alike: seconds come from a file that all ranks read, never from
a clock, and acceptance from the counts that SGLang hands to every rank.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import deque
from pathlib import Path

from smart_decoding.core.lengths import DraftLengths, StepSeconds
from smart_decoding.errors import ConfigError
from smart_decoding.integrations.sglang.costs import COSTS, read_costs


class SmartSpecPolicy:
    """The policy in place of SGLang's AdaptiveSpeculativeParams, with the same constructor.

    initial_steps: where to start. cfg_path: SGLang's --speculative-adaptive-config with the
    candidate steps. SGLang sizes its buffers by them, so only they may be chosen."""

    def __init__(self, initial_steps: int, cfg_path: str | None = None) -> None:
        self.costs = read_costs()
        self._candidates = _candidates(cfg_path)
        self._initial = initial_steps
        if self.costs.nodes and not set(self.candidate_steps) <= {0, *self.costs.nodes}:
            raise ConfigError(
                f"{COSTS}: 'nodes' must have every candidate of {self.candidate_steps} but 0"
            )
        longest = max(self.candidate_steps)
        seconds = StepSeconds.from_table(self.costs.seconds, longest)
        self.lengths = DraftLengths(longest, seconds, trees=bool(self.costs.nodes))
        self._graph_sizes: list[int] | None = None
        # Steps of the last batches: overlapped scheduling reports a batch late.
        self._recent: deque[int] = deque(maxlen=2)

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
        steps = self.lengths.choose(batch_size, self._allowed(batch_size))
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
        steps = num_steps
        if steps is None:  # unknown where the last two batches had different ones
            steps = self._recent[0] if len(set(self._recent)) == 1 else 0
        self.lengths.acceptance.observe(num_correct_drafts_per_req, steps)
        # The last batch pays by the tokens of the one reported now: over a run both are the same.
        tokens = batch_size + sum(num_correct_drafts_per_req)
        self.lengths.pay(batch_size, self._recent[-1], tokens, self.lengths.exploring)
        return None

    def on_state_activated(self, steps: int) -> None:
        """Do nothing: steps are counted in `get_steps_for_batch`."""

    def cuda_graph_bs_for_step(self, step: int) -> list[int] | None:
        """Return the captured batch sizes that may draft so many steps."""
        if self._graph_sizes is None:
            return None
        return [size for size in self._graph_sizes if step in self._allowed(size)]

    def _allowed(self, batch: int) -> list[int]:
        """Return the candidates of a batch size: of the largest size in SGLang's file up to it."""
        size = batch
        if self._graph_sizes:  # SGLang pads to the next captured size
            index = bisect_left(self._graph_sizes, batch)
            size = self._graph_sizes[index] if index < len(self._graph_sizes) else batch
        sizes = sorted(self._candidates)
        return self._candidates[max((known for known in sizes if known <= size), default=sizes[0])]


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
