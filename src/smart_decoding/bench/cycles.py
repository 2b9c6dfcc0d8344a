"""Contestants compared in cycles of blocks.

In each cycle every arm answers the same prompts, and all do so at once, some rounds each in turn:
what slows the machine for a second, or for ten, slows all of them. Who goes first changes from
cycle to cycle. Tasks take turns too. In every third cycle the baseline runs twice: the noise.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from smart_decoding.bench.blocks import Block, Prompt, rounds_of, run_block
from smart_decoding.bench.options import BASELINE, OURS
from smart_decoding.bench.summary import noise, smart_over, summarise
from smart_decoding.errors import CapacityError

if TYPE_CHECKING:
    from smart_decoding.engine.engine import Engine

AGAIN = "off again"  # the baseline's second engine, whose speed is reported as noise
NOISE_EVERY = 3  # cycles
WARM_UP_TOKENS = 8  # few, so that a policy still starts from its prior
Prompts = Mapping[str, Sequence[Prompt]]  # by task
Rounds: TypeAlias = Generator[int, None, Block]


@dataclass(slots=True)
class Measurement:
    """The measurements of one batch size: complete cycles (arm -> block), pairs of baseline blocks,
    and whether time ran out. first_deadline: of the first cycle, which there is no result without,
    if it may take longer than the deadline of all."""

    cycles: list[dict[str, Block]] = field(default_factory=list)
    again: list[tuple[Block, Block]] = field(default_factory=list)
    partial: bool = False
    first_deadline: float | None = None

    def add(self, cycle: dict[str, Block], again: Block | None) -> None:
        """Add a cycle, with the baseline's second block if it had one."""
        self.cycles.append(cycle)
        if again is not None:
            self.again.append((again, cycle[BASELINE]))


@contextmanager
def _frozen() -> Iterator[None]:
    """Keep existing objects out of garbage collections, which would fall into rounds."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@_frozen()
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
    (on `clock`). They hold requests at once, in shared KV memory or their own; AGAIN is the
    baseline's second engine. into: an earlier measurement to continue. on_cycle: called after each
    cycle. closed: no other request takes the place of one that ends.

    A cycle cut by the deadline is dropped, so that all arms have answered the same prompts."""
    result = into or Measurement()
    cycles = list(cycles_of(prompts, batch_size))
    first = len(result.cycles)
    if first == len(cycles):
        return result

    def late() -> bool:
        end = deadline if result.cycles else result.first_deadline or deadline
        return end is not None and clock() > end

    for engine in engines.values():
        _warm_up(engine, prompts, batch_size, clock)
    for number, (chunk, fillers) in enumerate(cycles[first:], first):
        # Turns count over all tasks: else every third cycle could be of one task only.
        turn, task = divmod(number, len(prompts))
        due = _due(list(engines), turn, task)
        blocks = {
            label: rounds_of(engines[label], chunk, None if closed else fillers, batch_size, clock)
            for label in due
        }
        cycle = _in_turns(blocks, batch_size, late)
        if cycle is None:
            result.partial = True
            return result
        again = cycle.pop(AGAIN, None)
        result.add({label: cycle[label] for label in engines if label in cycle}, again)
        on_cycle()
    return result


def _in_turns(
    blocks: Mapping[str, Rounds], tokens: int, late: Callable[[], bool]
) -> dict[str, Block] | None:
    """Return the blocks, each advanced by `tokens` tokens a turn; None if it gets too late. Every
    other turn is in reverse order, since a round's speed depends on what ran before it."""
    order = list(blocks)
    ahead = dict.fromkeys(blocks, 0)
    done: dict[str, Block] = {}
    try:
        while len(done) < len(blocks):
            order = [label for label in reversed(order) if label not in done]
            for label in order:
                if late():
                    return None
                ahead[label] -= tokens
                try:
                    while ahead[label] < 0:
                        ahead[label] += next(blocks[label])
                except StopIteration as end:
                    done[label] = end.value
        return done
    finally:
        for block in blocks.values():
            block.close()


def _due(labels: list[str], turn: int, task: int) -> list[str]:
    """Return the arms of a cycle, in order."""
    start = (turn + task) % len(labels)
    order = labels[start:] + labels[:start]
    noise = (turn + task) % NOISE_EVERY == 0
    return [label for label in order if noise or label != AGAIN]


def cycles_of(
    prompts: Prompts, batch_size: int
) -> Iterator[tuple[Sequence[Prompt], Sequence[Prompt]]]:
    """Yield blocks of `batch_size` prompts (the last of a task may have fewer), tasks in turn, and
    the fillers of each: the task's other prompts, from the block on in circle."""
    longest = max((len(of_task) for of_task in prompts.values()), default=0)
    for start in range(0, longest, batch_size):
        for of_task in prompts.values():
            chunk = of_task[start : start + batch_size]
            if chunk:
                yield chunk, [*of_task[start + batch_size :], *of_task[:start]]


def rows_of(measured: Measurement, batch_size: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return the runs of one batch size. Raises CapacityError if no cycle was completed."""
    cycles = measured.cycles
    if not cycles:
        raise CapacityError(
            f"the time limit was too short for one block of every policy at batch size {batch_size}"
        )
    shared = {"batch_size": batch_size, "partial": measured.partial}
    rows: list[dict[str, Any]] = []
    for label in cycles[0]:
        pairs = [(cycle[label], cycle[BASELINE]) for cycle in cycles]
        extra = noise(measured.again, seed) if label == BASELINE else {}
        compared: dict[str, dict[str, Any]] = {}
        if OURS in cycles[0] and label not in (OURS, BASELINE):
            both = [(cycle[OURS], cycle[label]) for cycle in cycles]
            compared = smart_over(both, seed)
        for figures in summarise(pairs, seed):
            ours = compared.get(figures["task"], {})
            rows.append({"policy": label, **shared, **figures, **ours, **extra})
    return rows


def _warm_up(engine: Engine, prompts: Prompts, batch_size: int, clock: Callable[[], float]) -> None:
    """Run a few rounds at this batch size, so that no block pays for first calls."""
    first = next(iter(prompts.values()))[0]
    params = replace(first.params, max_tokens=WARM_UP_TOKENS)
    short = [replace(first, index=i, params=params) for i in range(batch_size)]
    run_block(engine, short, short, batch_size, clock)
