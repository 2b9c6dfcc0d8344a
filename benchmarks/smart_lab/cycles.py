"""Cycles of `smart bench` with what the laboratory adds: plain decoding beside itself, and a run
that goes on.

In every third cycle the baseline runs twice: the noise.

Needed by `bench`, `robustness` and `replayed_run`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from smart_decoding.bench import cycles
from smart_decoding.bench.cycles import Cycle, Prompts, cycles_of, rotated
from smart_decoding.bench.options import BASELINE, OURS
from smart_decoding.errors import CapacityError
from smart_lab.summary import noise, smart_over, summarise

if TYPE_CHECKING:
    from smart_decoding.bench.blocks import Block
    from smart_decoding.engine.engine import Engine

AGAIN = "off again"  # the baseline's second engine, whose speed is reported as noise
NOISE_EVERY = 3  # cycles


@dataclass(slots=True)
class Measurement:
    """The measurements of one batch size: complete cycles, pairs of baseline blocks, and whether
    time ran out. first_deadline: of the first cycle, which there is no result without, if it may
    take longer than the deadline of all."""

    cycles: list[Cycle] = field(default_factory=list)
    again: list[tuple[Block, Block]] = field(default_factory=list)
    partial: bool = False
    first_deadline: float | None = None

    def add(self, cycle: Cycle, again: Block | None) -> None:
        """Add a cycle, with the baseline's second block if it had one."""
        self.cycles.append(cycle)
        if again is not None:
            self.again.append((again, cycle[BASELINE]))


def measure(
    engines: Mapping[str, Engine],
    prompts: Prompts,
    batch_size: int,
    deadline: float | None = None,
    on_cycle: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    into: Measurement | None = None,
    closed: bool = False,
) -> Measurement:
    """Run the engines in turns over all prompts (task -> prompts) until done or past the deadline
    (on `clock`); AGAIN is the baseline's second engine. into: an earlier measurement to continue.
    on_cycle: called after each cycle. closed: no other request takes the place of one that ends."""
    result = into or Measurement()
    first = len(result.cycles)
    total = sum(1 for _ in cycles_of(prompts, batch_size))

    def late() -> bool:
        end = deadline if result.cycles else result.first_deadline or deadline
        return end is not None and clock() > end

    for cycle in cycles.measure(engines, prompts, batch_size, late, clock, first, closed, due):
        again = cycle.pop(AGAIN, None)
        result.add(cycle, again)
        on_cycle()
    result.partial |= len(result.cycles) < total
    return result


def due(labels: list[str], number: int, tasks: int) -> list[str]:
    """Return the arms of a cycle, in order. Turns count over all tasks: else every third cycle
    could be of one task only."""
    noisy = sum(divmod(number, tasks)) % NOISE_EVERY == 0
    return [label for label in rotated(labels, number, tasks) if noisy or label != AGAIN]


def rows_of(measured: Measurement, batch_size: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return the runs of one batch size. Raises CapacityError if no cycle was completed."""
    found = measured.cycles
    if not found:
        raise CapacityError(
            f"the time limit was too short for one block of every policy at batch size {batch_size}"
        )
    shared = {"batch_size": batch_size, "partial": measured.partial}
    rows: list[dict[str, Any]] = []
    for label in found[0]:
        pairs = [(cycle[label], cycle[BASELINE]) for cycle in found]
        extra = noise(measured.again, seed) if label == BASELINE else {}
        compared: dict[str, dict[str, Any]] = {}
        if OURS in found[0] and label not in (OURS, BASELINE):
            both = [(cycle[OURS], cycle[label]) for cycle in found]
            compared = smart_over(both, seed)
        for figures in summarise(pairs, seed):
            ours = compared.get(figures["task"], {})
            rows.append({"policy": label, **shared, **figures, **ours, **extra})
    return rows
