"""SGLang's `AdaptiveSpecPolicy` by SMART's rule: the steps with the most accepted tokens per second.

Every tensor-parallel rank runs the policy by itself and all must choose alike: seconds come from a file that all ranks
read, never from a clock, and acceptance from the counts that SGLang hands to every rank.
"""

from __future__ import annotations

import json
import math
import os
from bisect import bisect_left
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from smart_decoding.errors import ConfigError
from smart_decoding.integrations.sglang import COSTS

MARGIN = 1.02  # what another number of steps must promise over the present one
MEMORY = 0.995  # per batch: older counts fade
PRIOR, PRIOR_TRIALS = 0.7, 4.0  # of all depths together; of one depth, what all say together is worth as much
PROBE_EVERY = 64  # batches without drafting, after which two draft the fewest steps


class StepCosts:
    """Seconds of one round by batch size and drafted steps, from a table; between its entries linear, beyond constant.

    {"seconds": {"1": {"0": 0.011, "1": 0.013, "3": 0.016}, "16": {...}}}: batch size -> steps -> seconds."""

    def __init__(self, table: Mapping[int, Mapping[int, float]]) -> None:
        self._batches = sorted(table)
        self._rows = {batch: sorted(row.items()) for batch, row in table.items()}

    @classmethod
    def load(cls, path: Path) -> StepCosts:
        """Raises ConfigError if the file is not such a table."""
        try:
            given = json.loads(path.read_text(encoding="utf-8"))["seconds"]
            table = {int(b): {int(k): float(seconds) for k, seconds in row.items()} for b, row in given.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is no file of costs for {COSTS}: {error}") from error
        numbers = [seconds for row in table.values() for seconds in row.values()]
        if not table or not all(0 in row for row in table.values()) or min(table) < 1:
            raise ConfigError(f"{path}: every batch size needs the seconds of 0 steps (plain decoding)")
        if not all(math.isfinite(seconds) and seconds > 0 for seconds in numbers):
            raise ConfigError(f"{path}: seconds must be positive")
        return cls(table)

    def seconds(self, batch: int, steps: int) -> float:
        """Seconds of one round: drafting, verifying and all else."""
        rows = [float(np.interp(steps, *zip(*self._rows[b], strict=True))) for b in self._batches]
        return float(np.interp(math.log(max(batch, 1)), np.log(self._batches), rows))


class SmartSpecPolicy:
    """Constructed as SGLang's AdaptiveSpeculativeParams, whose place it takes.

    initial_steps: where to start. cfg_path: SGLang's --speculative-adaptive-config, of which the candidate steps are
    taken; SGLang sizes its buffers by them, so that no others may be chosen."""

    def __init__(self, initial_steps: int, cfg_path: str | None = None) -> None:
        self._costs = StepCosts.load(Path(os.environ[COSTS]))
        self._candidates = _candidates(cfg_path, initial_steps)
        self._initial = initial_steps
        longest = max(max(steps) for steps in self._candidates.values())
        self._hits = [0.0] * longest
        self._trials = [0.0] * longest
        self._graph_sizes: list[int] | None = None
        self._steps: dict[int, int] = {}  # chosen, by batch size, until new counts arrive
        self._recent: deque[int] = deque(
            maxlen=2
        )  # answered last: with overlapped scheduling, counts come one batch late
        self._idle = 0  # batches without drafting in a row

    # --- the protocol ---

    @property
    def candidate_steps(self) -> list[int]:
        return sorted({self._initial, *(step for steps in self._candidates.values() for step in steps)})

    def set_cuda_graph_bs(self, cuda_graph_bs: list[int] | None) -> None:
        self._graph_sizes = sorted(cuda_graph_bs) if cuda_graph_bs else None

    def get_steps_for_batch(self, batch_size: int) -> int:
        steps = self._choose(batch_size)
        self._recent.append(steps)
        return steps

    def on_verify_complete(self, num_correct_drafts_per_req: list[int], batch_size: int) -> int | None:
        """Counts; the next batch asks for its steps by itself, so there is never a switch to announce."""
        drafted = min(self._recent, default=0)
        if not drafted:
            self._idle += 1
            return None
        self._idle = 0
        if num_correct_drafts_per_req:
            self._count(num_correct_drafts_per_req, drafted)
            self._steps.clear()
        return None

    def cuda_graph_bs_for_step(self, step: int) -> list[int] | None:
        if self._graph_sizes is None:
            return None
        return [size for size in self._graph_sizes if step in self._allowed(size)]

    # --- the rule ---

    def _choose(self, batch_size: int) -> int:
        if batch_size not in self._steps:
            self._steps[batch_size] = self._best(batch_size)
        steps = self._steps[batch_size]
        if steps == 0 and self._idle >= PROBE_EVERY:
            return next((step for step in self._allowed(batch_size) if step), 0)
        return steps

    def acceptance(self) -> list[float]:
        """P(draft at depth 1, 2, ... is accepted | the one before it was); depths seldom seen are as all together."""
        every = (sum(self._hits) + PRIOR * PRIOR_TRIALS) / (sum(self._trials) + PRIOR_TRIALS)
        counts = zip(self._hits, self._trials, strict=True)
        return [(hits + every * PRIOR_TRIALS) / (trials + PRIOR_TRIALS) for hits, trials in counts]

    def _best(self, batch: int) -> int:
        allowed = self._allowed(batch)
        tokens = [1.0]
        path = 1.0
        for rate in self.acceptance():
            path *= rate
            tokens.append(tokens[-1] + path)
        values = {steps: tokens[steps] / self._costs.seconds(batch, steps) for steps in allowed}
        best = max(values, key=lambda steps: values[steps])
        return best if 0 not in values or best == 0 or values[best] > MARGIN * values[0] else 0

    def _count(self, correct: Sequence[int], drafted: int) -> None:
        depths = min(drafted, len(self._hits))
        self._hits = [MEMORY * hits for hits in self._hits]
        self._trials = [MEMORY * trials for trials in self._trials]
        for count in correct:
            for depth in range(min(count + 1, depths)):  # beyond the first rejection all is censored
                self._trials[depth] += 1
                self._hits[depth] += depth < count

    def _allowed(self, batch: int) -> list[int]:
        """Candidates of a batch size: those of the largest size in SGLang's file that is not larger."""
        size = batch
        if self._graph_sizes:  # SGLang pads to the next captured size
            index = bisect_left(self._graph_sizes, batch)
            size = self._graph_sizes[index] if index < len(self._graph_sizes) else batch
        sizes = sorted(self._candidates)
        return self._candidates[max((known for known in sizes if known <= size), default=sizes[0])]


def _candidates(cfg_path: str | None, initial_steps: int) -> dict[int, list[int]]:
    """Candidate steps by batch size from SGLang's file. Raises ConfigError if there is none, or it is not one."""
    if cfg_path is None:
        raise ConfigError(f"{COSTS} is set: give the steps to choose from, too, by --speculative-adaptive-config FILE")
    try:
        given = json.loads(Path(cfg_path).read_text(encoding="utf-8"))
        found = {int(size): sorted(set(entry["candidate_steps"])) for size, entry in given.items() if size.isdigit()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{cfg_path} is no --speculative-adaptive-config: {error}") from error
    if not found or not all(steps and min(steps) >= 0 for steps in found.values()):
        raise ConfigError(f"{cfg_path} names no candidate_steps")
    return found
