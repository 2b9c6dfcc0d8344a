"""Contestants compared in cycles of blocks.

In each cycle every arm answers the same prompts, and all do so at once, some rounds each in turn:
what slows the machine for a second, or for ten, slows all of them. Who goes first changes from
cycle to cycle. Tasks take turns too.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from smart_decoding.bench.blocks import Block, Prompt, rounds_of, run_block

if TYPE_CHECKING:
    from smart_decoding.engine.engine import Engine

WARM_UP_TOKENS = 8  # few, so that a policy still starts from its prior
Prompts = Mapping[str, Sequence[Prompt]]  # by task
Cycle = dict[str, Block]  # by arm
Rounds: TypeAlias = Generator[int, None, Block]
Order: TypeAlias = Callable[[list[str], int, int], list[str]]  # of arms, cycle's number, tasks


def rotated(labels: list[str], number: int, tasks: int) -> list[str]:
    """Return the arms of a cycle in order: each begins as often as the others on each task."""
    start = sum(divmod(number, tasks)) % len(labels)
    return labels[start:] + labels[:start]


def measure(
    engines: Mapping[str, Engine],
    prompts: Prompts,
    batch_size: int,
    late: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.perf_counter,
    first: int = 0,
    closed: bool = False,
    order: Order = rotated,
) -> Iterator[Cycle]:
    """Run the engines in turns over all prompts (task -> prompts), and yield each cycle from number
    `first` on, until done or `late`. They hold requests at once, in shared KV memory or their own.
    closed: no other request takes the place of one that ends. order: the arms of a cycle.

    A cycle cut by the time is dropped, so that all arms have answered the same prompts."""
    cycles = list(cycles_of(prompts, batch_size))
    if first == len(cycles):
        return
    with undisturbed():
        for engine in engines.values():
            warm_up(engine, prompts, batch_size, clock)
        for number, (chunk, fillers) in enumerate(cycles[first:], first):
            behind = None if closed else fillers
            blocks = {
                label: rounds_of(engines[label], chunk, behind, batch_size, clock)
                for label in order(list(engines), number, len(prompts))
            }
            cycle = in_turns(blocks, batch_size, late)
            if cycle is None:
                return
            yield {label: cycle[label] for label in engines if label in cycle}


@contextmanager
def undisturbed() -> Iterator[None]:
    """Keep existing objects out of garbage collections, which would fall into rounds."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def in_turns(blocks: Mapping[str, Rounds], tokens: int, late: Callable[[], bool]) -> Cycle | None:
    """Return the blocks, each advanced by `tokens` tokens a turn; None if it gets too late. Every
    other turn is in reverse order, since a round's speed depends on what ran before it."""
    order = list(blocks)
    ahead = dict.fromkeys(blocks, 0)
    done: Cycle = {}
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


def warm_up(engine: Engine, prompts: Prompts, batch_size: int, clock: Callable[[], float]) -> None:
    """Run a few rounds at this batch size, so that no block pays for first calls."""
    first = next(iter(prompts.values()))[0]
    params = replace(first.params, max_tokens=WARM_UP_TOKENS)
    short = [replace(first, index=i, params=params) for i in range(batch_size)]
    run_block(engine, short, short, batch_size, clock)
