"""What a measurement of costs says, where memory is handed out when it is first touched."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from smart_decoding.core.costs import Sample, Share, VerifySample
from smart_decoding.engine.kv import PAGE, PagePool
from smart_decoding.profiling import measure
from smart_decoding.profiling.fit import fit_costs
from smart_decoding.profiling.measure import ForwardTimer, probe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smart_decoding.engine.rows import Rows

ROW = 1e-3  # seconds
FAULT = 5e-3  # seconds of a page's first use
EXPERT = 2e-4  # seconds of a further expert
PAGES = 4000


class Machine:
    """A clock, and a target whose forwards take a millisecond a row and more for new pages; so many
    `slow` ones take three times as long at first. experts: of a mixture; rows of the same token
    have the same ones."""

    def __init__(self, slow: int = 0, experts: tuple[int, int] | None = None) -> None:
        self.slow = slow
        self.experts = experts
        self.now = 0.0
        self.touched: set[int] = set()
        self.held: set[int] = set()  # pages of requests
        self.states: set[int] = set()  # places of states that were overwritten

    def forward(self, rows: Rows, aux_layers: tuple[int, ...]) -> Any:
        used = set((rows.slot_mapping // PAGE).tolist()) | set(rows.pages.tolist())
        assert used.isdisjoint(self.held)
        if rows.states is not None:
            assert len(set(rows.states)) == rows.groups
            self.states.update(rows.states.tolist())
        seconds = ROW * len(rows.token) + FAULT * len(used - self.touched)
        self.now += seconds * (3.0 if self.slow > 0 else 1.0)
        self.slow -= 1
        self.touched |= used
        if self.experts is None:
            return SimpleNamespace(greedy=np.zeros(len(rows.token)), experts=0.0)
        awake = min(self.experts[0], self.experts[1] * len(set(rows.token.tolist())))
        self.now += EXPERT * (awake - self.experts[1])
        return SimpleNamespace(greedy=np.zeros(len(rows.token)), experts=float(awake))


def target_of(machine: Machine, max_positions: int = 4096, states: int = 0) -> Any:
    return SimpleNamespace(
        vocab=32,
        device=torch.device("cpu"),
        max_positions=max_positions,
        steps=(12,),
        states=states,
        native=None,
        experts=machine.experts,
        forward=machine.forward,
    )


def measurement_of(machine: Machine, pages: int, seqs: int, pool: PagePool) -> ForwardTimer:
    clock = lambda: machine.now  # noqa: E731
    target = target_of(machine)
    return ForwardTimer(target, None, pages, seqs, seconds=0.0, clock=clock, pool=pool)


def checked(samples: Sequence[Sample]) -> set[tuple[int, float]]:
    """Batches and contexts, of which no cost has what the first touch of memory takes."""
    for sample in samples:
        assert isinstance(sample, VerifySample)
        assert sample.seconds == pytest.approx(ROW * sample.rows), sample
    return {(s.batch, s.context) for s in samples if isinstance(s, VerifySample)}


@pytest.mark.parametrize("share", [0.4, 0.6])
def test_a_machine_is_busy_if_most_timings_were_interrupted(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count()
    interrupted = 0.0

    def preemptions() -> int:  # asked before and after each timing
        nonlocal interrupted
        interrupted += share if next(calls) % 2 else 0.0
        return int(interrupted + 1e-9)

    monkeypatch.setattr(measure, "preemptions", preemptions)
    timer = measurement_of(Machine(), PAGES, 32, PagePool(PAGES))
    timer.run()
    assert timer.busy == (share > 0.5)


def test_no_cost_has_what_the_first_touch_of_memory_takes() -> None:
    pool = PagePool(PAGES)
    found = checked(measurement_of(Machine(), PAGES, 32, pool).run())
    assert found == {(batch, context) for batch in (1, 2, 4, 8, 16, 32) for context in (128, 768)}
    assert pool.available == PAGES


@pytest.mark.parametrize("for_ever", [False, True])
def test_beside_requests_it_keeps_to_free_memory_and_what_needs_more_waits(for_ever: bool) -> None:
    machine = Machine()
    pool = PagePool(600)
    machine.held.update(pool.take(560))
    measurement = measurement_of(machine, 600, 8, pool)
    small = {(1, 128.0), (2, 128.0), (4, 128.0)}
    steps = 0
    while (for_ever or steps < 100) and measurement.step():
        steps += 1
        if steps % 7 == 0:  # one request goes, another comes
            pool.give(machine.held)
            pool._free.sort(key=lambda page: page * 7 % 601)
            machine.held = set(pool.take(560))
    assert checked(measurement.samples()) == small
    pool.give(machine.held)
    machine.held = set()
    assert len(checked(measurement.run())) == (3 if for_ever else 8)
    assert pool.available == pool.pages


class Unsteady(Machine):
    """One forward of eight takes half as long again, by chance."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = np.random.default_rng(seed)

    def forward(self, rows: Rows, aux_layers: tuple[int, ...]) -> Any:
        before = self.now
        scores = super().forward(rows, aux_layers)
        if self.random.random() < 1 / 8:
            self.now += 0.5 * (self.now - before)
        return scores


def test_of_slow_forwards_few_costs_are_wrong() -> None:
    """Forwards so slow that the time is up at once. A table had 130 ms for rows that take 88."""
    rows = np.array((1, 2, 3, 4, 6, 8, 12, 16, 24))
    wrong = []
    for seed in range(20):
        machine = Unsteady(seed)
        cost = fit_costs(measurement_of(machine, PAGES, 1, PagePool(PAGES)).run())
        seconds = cost.verify_curve(1, 0, 25, 128)[rows]
        wrong += [*(abs(seconds / (ROW * rows) - 1) > 0.1)]
    assert np.mean(wrong) < 0.09  # 0.07; 0.18 where each is timed once


def test_the_seconds_of_experts_are_told_from_those_of_rows() -> None:
    machine = Machine(experts=(64, 4))
    samples = measurement_of(machine, PAGES, 8, PagePool(PAGES)).run()
    cost = fit_costs(samples, experts=machine.experts)
    assert cost.experts is not None
    assert cost.experts.seconds == pytest.approx(EXPERT, rel=0.02)
    # what one token in all rows costs, and what independent rows do
    alike = replace(cost, experts=replace(cost.experts, nodes=Share(0.0)))
    assert float(alike.verify_seconds(1, 8, 128)) == pytest.approx(8 * ROW, rel=0.05)
    awake = 64 * (1 - (1 - 4 / 64) ** 8)
    seconds = 8 * ROW + EXPERT * (awake - 4)
    assert float(cost.verify_seconds(1, 8, 128)) == pytest.approx(seconds, rel=0.05)


def test_no_state_of_a_request_is_overwritten() -> None:
    """Requests hold two of five places: larger batches than of three wait in vain."""
    machine = Machine()
    pool = PagePool(PAGES, states=5)
    held = {pool.take_state(), pool.take_state()}
    target = target_of(machine, states=5)
    clock = lambda: machine.now  # noqa: E731
    timer = ForwardTimer(target, None, PAGES, 5, seconds=0.0, clock=clock, pool=pool)
    for _ in range(1000):
        timer.step()
    assert {batch for batch, _ in checked(timer.samples())} == {1, 2}
    assert machine.states
    assert machine.states.isdisjoint(held)
    assert pool.available_states == 3


def test_a_probe_tells_rows_of_a_lone_request_apart_and_needs_room() -> None:
    machine = Machine(slow=3)
    clock = lambda: machine.now  # noqa: E731
    found = probe(target_of(machine), PAGES, clock=clock)
    assert found == {1: pytest.approx(ROW), 8: pytest.approx(8 * ROW)}
    assert not probe(target_of(machine), 8, clock=clock)  # pages
    assert not probe(target_of(machine, max_positions=130), PAGES, clock=clock)
