"""Which draft lengths vLLM has captured full CUDA graphs for, by batch size. Imports no vLLM.

For decoding vLLM captures uniform graphs: every request has 1 + K tokens. The first model runner
captures only the longest K. So does the second one without a schedule
(num_speculative_tokens_per_batch_size); with one it captures every K of the schedule for batches up
to max_num_seqs. Steps of other lengths run in piecewise graphs or none, which is slower.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class CapturedLengths:
    """The draft lengths to choose from. lengths: ascending. most: length -> requests of its largest
    graph; None if no length has an advantage by graphs, as without CUDA graphs."""

    lengths: tuple[int, ...]
    most: Mapping[int, int] | None = None

    def of(self, batch: int) -> tuple[int, ...]:
        """Return the shortest length and all with a graph for this batch size; all lengths if none
        has one. The shortest is needed to stop drafts that are never accepted."""
        if self.most is None or batch > max(self.most.values()):
            return self.lengths
        shortest, *longer = self.lengths
        return (shortest, *(k for k in longer if batch <= self.most[k]))


def captured_lengths(config: Any, schedule: Sequence[int] | None, longest: int) -> CapturedLengths:
    """Return the lengths to choose from. config: a VllmConfig. schedule: vLLM's
    `dynamic_sd_lookup`, K by batch size from 1 on. longest: num_speculative_tokens."""
    mode = config.compilation_config.cudagraph_mode
    scheduled = sorted(set(schedule[1:])) if schedule else None
    if mode is None or not (mode.separate_routine() and mode.has_full_cudagraphs()):
        return CapturedLengths(tuple(scheduled or range(longest + 1)))
    lengths = scheduled if scheduled and config.use_v2_model_runner else [longest]
    most = {k: _largest_batch(config, k + 1, longest + 1) for k in lengths}
    return CapturedLengths(tuple(lengths), most)


def _largest_batch(config: Any, tokens: int, most_tokens: int) -> int:
    """Return requests of the largest uniform graph with so many tokens a request, as the second
    model runner's CudaGraphManager captures them."""
    requests: int = config.scheduler_config.max_num_seqs
    limit = min(requests * most_tokens, config.compilation_config.max_cudagraph_capture_size)
    sizes: Iterable[int] = config.compilation_config.cudagraph_capture_sizes or ()
    batches = (-(-size // tokens) for size in sizes)
    return max((n for n in batches if n <= requests and n * tokens <= limit), default=0)
