"""Measure the cost of forwards: rows x batch x context for the target, and for the levels of a
drafter with a model: roots and rows that wait for the first one, width for those below it."""

from __future__ import annotations

import itertools
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from smart_decoding.core.costs import DraftSample, Sample, VerifySample
from smart_decoding.core.tree import ROOT, DraftTrees
from smart_decoding.engine.kv import PAGE, Ints, PagePool
from smart_decoding.engine.rows import Rows, Span, build_rows
from smart_decoding.kernels.limits import preemptions
from smart_decoding.models.cpu.native_verification import NativeBatch
from smart_decoding.profiling.rehearsal import MORE, Rehearsal
from smart_decoding.progress import long_step

if TYPE_CHECKING:
    import torch

    from smart_decoding.core.tree import IntArray
    from smart_decoding.drafters.levels import LevelDrafter
    from smart_decoding.models.target import TorchTarget

LATE_PER_SEQUENCE = (1, 4, 16)  # at longer contexts
STEPPED = (1, 8, 32, 64)  # batches in which all of many steps are measured
COARSE = (1, 4, 16, 48)
LONG_WIDTHS = (1, 8)
WAITING = (0, 1, 2, 4, 8, 24, 64)
COARSE_WAITING = (0, 16)
# a prompt, or what several requests have waiting; one row of it costs more than one of a few
LONG_WAITING = 384
RANDOM_TOKENS = 1024
SECONDS = 6.0  # of measuring, by default
BUSY = 0.5  # share of timings interrupted by other processes above which a machine is busy
# A point is settled as soon as two of its timings agree so far, or after so many: of slow forwards
# a single timing was wrong by up to half.
AGREE = 1.1
MOST_TIMINGS = 4
PROBED = (1, 8)  # rows of a lone request that are timed where no costs are known


@dataclass(frozen=True, slots=True)
class Grid:
    """The points of a measurement: batch sizes, rows of each sequence, most rows in all, contexts
    in tokens, and widths of draft levels."""

    batches: tuple[int, ...]
    per_sequence: tuple[int, ...]
    max_rows: int
    contexts: tuple[int, ...]
    widths: tuple[int, ...]


ON_CPU = Grid(
    (1, 2, 4, 8, 16, 32),
    (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48),
    96,
    (128, 768),
    (1, 2, 4, 8, 16, 32, 64),
)
# Up to rows where arithmetic is the whole cost: beyond them a line is exact. A GPU is idle at fewer
# rows.
ON_GPU = Grid(
    (1, 2, 4, 8, 16, 32, 64, 128, 256),
    (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
    1024,
    (128, 1024, 4096),
    (1, 4, 16, 64, 256),
)


def grid_of(device: torch.device) -> Grid:
    """Return the grid of a device."""
    return ON_CPU if device.type == "cpu" else ON_GPU


@dataclass(eq=False, frozen=True, slots=True)
class Point:
    """One thing to time. `run` performs it once, after `prepare`, and may return the seconds that
    count; `sample` wraps the seconds."""

    stage: Verification | Rehearsal
    run: Callable[[], float | None]
    sample: Callable[[float], Sample]
    prepare: Callable[[], object] = lambda: None


class ForwardTimer:
    """Times all points in turn, one a step, until `seconds` are used up and every point is settled.

    pages: of the KV memory. pool: their pool, if requests may run between the steps: a step takes
    the pages that it overwrites. Points that do not fit into memory are skipped. coarse: fewer
    points, each timed once, for forwards so slow that all points would take far more than
    `seconds`.

    A shared machine changes its speed from second to second. So the first point, one row, is timed
    before every other point, and the ratio to it counts: neighbours then shift no point against
    another. It also leaves the caches as a real round does (before a deeper level of the drafter
    its first level runs, too). A system hands out a page of memory at its first use. A run that
    pays for that is slower than later runs, so it does not count."""

    def __init__(
        self,
        target: TorchTarget,
        drafter: LevelDrafter[Any] | None,
        pages: int,
        max_num_seqs: int,
        seconds: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
        coarse: bool = False,
        pool: PagePool | None = None,
    ) -> None:
        points: list[Point] = []
        if longest_context(target.max_positions, target.device):  # else too short to verify
            points = _points(target, drafter, pages, max_num_seqs, coarse)
        self._reference = points[0] if points else None
        self._queue = deque(points)
        # Ratios to the reference of the points that are not settled.
        self._unsettled: dict[Point, list[float]] = {point: [] for point in points}
        self._least = 1 if coarse else 2
        self._again = 0  # settled points timed again while others are not settled
        # Run once before any is timed; a GPU loads kernels at first use.
        self._cold = set(points if target.device.type == "cuda" else points[:1])
        # By kind of stage: the drafter's keys lie elsewhere. A coarse grid counts all pages as
        # touched: its forwards are too slow for first uses to matter.
        self._touched: dict[type, set[int]] = defaultdict(lambda: set(range(coarse * pages)))
        self._pool = pool or PagePool(pages, states=target.states)
        self._seconds = SECONDS if seconds is None else seconds
        self._clock = clock
        self._timed: list[tuple[Point, float, float]] = []  # with the reference just before it
        self._passed = 0.0
        self._interrupted = 0  # timings during which other processes took a core

    @property
    def busy(self) -> bool:
        """Whether other processes ran on the same cores most of the time. A forward then waits for
        the thread without a core, and the wait depends on the number of rows."""
        return self._interrupted > BUSY * len(self._timed)

    @property
    def share(self) -> float:
        """The share of the measurement that is done, in [0, 1]."""
        settled = 1.0 - len(self._unsettled) / max(1, len(self._queue))
        return min(settled, self._passed / self._seconds if self._seconds else 1.0)

    def step(self) -> bool:
        """Time the next point; return false if none is left."""
        if self._reference is None or self._done:
            return False
        fitting = [point for point in self._queue if self._fits(point, self._reference)]
        point = next((p for p in fitting if p in self._unsettled), next(iter(fitting), None))
        if point is not None:
            self._run(point, self._reference)
        return not self._done

    def _fits(self, point: Point, reference: Point) -> bool:
        states = max(point.stage.states, reference.stage.states)
        return point.stage.needed <= self._pool.available and states <= self._pool.available_states

    @property
    def _done(self) -> bool:
        return self.share == 1.0 or self._again > 2 * len(self._queue)

    def _run(self, point: Point, reference: Point) -> None:
        stage = point.stage
        pages = self._pool.borrow(stage.needed)
        states = [self._pool.take_state() for _ in range(max(stage.states, reference.stage.states))]
        started = self._clock()
        try:
            reference.stage.place(pages[: reference.stage.needed], states)
            stage.place(pages, states)
            touched = self._touched[type(stage)]
            if point in self._cold or not touched.issuperset(pages):
                self._time(point)
                touched.update(pages)
                self._cold.discard(point)
                return
            before = preemptions()
            usual, seconds = self._time(reference), self._time(point)
            self._timed.append((point, usual, seconds))
            self._interrupted += preemptions() > before
        finally:
            stage.end()
            self._pool.put_back(pages)
            for state in states:
                self._pool.give_state(state)
        self._again += bool(self._unsettled) and point not in self._unsettled
        self._settle(point, seconds / usual)
        self._queue.remove(point)
        self._queue.append(point)
        self._passed += self._clock() - started

    def _settle(self, point: Point, ratio: float) -> None:
        ratios = self._unsettled.get(point)
        if ratios is None:
            return
        ratios.append(ratio)
        pairs = itertools.pairwise(sorted(ratios))
        agree = self._least == 1 or any(high <= AGREE * low for low, high in pairs)
        if agree or len(ratios) == MOST_TIMINGS:
            del self._unsettled[point]

    def samples(self) -> list[Sample]:
        """Return the samples at the reference's median speed; none where no verification fits into
        the model's context.

        The speed at a point is the median of three neighbouring references: one is too noisy."""
        if not self._timed:
            return []
        references = np.array([reference for _, reference, _ in self._timed])
        padded = np.concatenate((references[:1], references, references[-1:]))
        local = np.median(np.stack((padded[:-2], padded[1:-1], padded[2:])), axis=0)
        usual = float(np.median(references))
        return [
            point.sample(seconds * usual / float(now))
            for (point, _, seconds), now in zip(self._timed, local, strict=True)
        ]

    def run(self) -> list[Sample]:
        """Take all steps at once; return the samples."""
        finish(self.step, lambda: self.share)
        return self.samples()

    def _time(self, point: Point) -> float:
        point.prepare()
        start = self._clock()
        seconds = point.run()
        return self._clock() - start if seconds is None else seconds


def finish(step: Callable[[], bool], share: Callable[[], float]) -> None:
    """Call `step`, which measures or waits, as long as it returns true. share: the part that is
    done, in [0, 1], for the progress bar."""
    with long_step("measuring costs, once", 1.0) as progress:
        shown = 0.0
        while step():
            now = share()
            progress(now - shown)
            shown = now


def longest_context(max_positions: int, device: torch.device) -> int:
    """Return the longest context in the profile of a model of so many positions."""
    contexts = grid_of(device).contexts
    return max((context for context in contexts if context < max_positions), default=0)


def largest_batch(pages: int, max_num_seqs: int, device: torch.device) -> int:
    """Return the largest measured batch in a cache of `pages`; costs of larger ones are a guess."""
    grid = grid_of(device)
    each = _pages_each(1, 1, grid.contexts[0])
    return max(
        batch
        for batch in grid.batches
        if batch == 1 or (batch <= max_num_seqs and batch * each <= pages)
    )


def _points(
    target: TorchTarget,
    drafter: LevelDrafter[Any] | None,
    pages: int,
    max_num_seqs: int,
    coarse: bool = False,
) -> list[Point]:
    points: list[Point] = []
    aux_layers = drafter.aux_layers if drafter is not None else ()
    verified = verifications(grid_of(target.device), target.steps, max_num_seqs, coarse)
    for batch, total, context in verified:
        if context + -(-total // batch) > target.max_positions:
            continue
        # A mixture's rows of the same token have the same experts: the difference is these'.
        for alike in (False, True) if target.experts and batch == 1 < total else (False,):
            stage = Verification(target, batch, total, context, aux_layers, alike)
            if stage.needed <= pages:
                points.append(Point(stage, stage.run, stage.sample))
    if drafter is not None and target.max_positions > MORE:
        points += _draft_points(target, drafter, pages, max_num_seqs, coarse)
    return points


def verifications(
    grid: Grid, steps: Sequence[int], max_num_seqs: int, coarse: bool = False
) -> Iterator[tuple[int, int, int]]:
    """Return the verifications to time: batch size, rows in all, and context. steps: see
    `Target.steps`."""
    for context in grid.contexts[: 1 if coarse else None]:
        for batch in (b for b in grid.batches if b <= max_num_seqs):
            if context == grid.contexts[0]:
                totals = _totals(batch, COARSE if coarse else grid.per_sequence, steps)
            else:
                totals = {batch * per for per in LATE_PER_SEQUENCE}
            for total in sorted(t for t in totals if t <= grid.max_rows or t == batch):
                yield batch, total, context


def _totals(batch: int, per_sequence: Sequence[int], steps: Sequence[int]) -> set[int]:
    totals = {batch * per for per in per_sequence}
    if per_sequence == COARSE:
        return totals
    # Both sides of a step, between which costs are flat. A few batches show enough of many steps.
    # Large ones are among them: where arithmetic begins to cost, few rows decide what pays.
    if len(steps) <= 1 or batch in STEPPED:
        totals |= {total for step in steps for total in (step, step + 1) if total > batch}
    return totals


def _draft_points(
    target: TorchTarget, drafter: LevelDrafter[Any], pages: int, max_num_seqs: int, coarse: bool
) -> list[Point]:
    """Return points of first levels, over roots and waiting rows, and of deeper levels, over width
    and context."""
    grid = grid_of(target.device)
    widths, waits = (COARSE, COARSE_WAITING) if coarse else (grid.widths, WAITING)

    def rehearsal(batch: int, context: int, more: int = MORE) -> Rehearsal | None:
        context = min(context, target.max_positions - more)
        if context < 1:
            return None
        found = Rehearsal(drafter, batch, context, min(target.vocab, RANDOM_TOKENS), more)
        return found if found.needed <= pages else None

    points: list[Point] = []
    batches = [batch for batch in grid.batches if batch <= max_num_seqs]
    for batch in sorted({batches[0], batches[-1]}) if coarse else batches:
        requests = rehearsal(batch, grid.contexts[0])
        if requests is None:
            break
        single = batch == 1
        points += [_first_point(requests, waiting) for waiting in (waits if single else (0,))]
        points += [_deeper_point(requests, width) for width in (widths if single else (batch,))]
    late = None if coarse else rehearsal(1, grid.contexts[0], LONG_WAITING + MORE)
    points += [_first_point(late, LONG_WAITING)] if late else []
    longer = None if coarse else rehearsal(1, grid.contexts[-1])
    return points + ([_deeper_point(longer, width) for width in LONG_WIDTHS] if longer else [])


class Verification:
    """Verifies `total` rows of `batch` sequences at `context`, as rounds do. aux_layers: as in
    Target.verify, where they are copied out. alike: all rows have the same token, in place of any
    tokens. needed, states: pages and places of recurrent states that are overwritten."""

    def __init__(
        self,
        target: TorchTarget,
        batch: int,
        total: int,
        context: int,
        aux_layers: tuple[int, ...] = (),
        alike: bool = False,
    ) -> None:
        each = _pages_each(batch, total, context)
        self.needed = batch * each
        self.states = batch if target.states else 0
        self.experts = 0.0  # awake in the last run, in the mean of a mixture's layers
        self._target = target
        tokens = np.random.default_rng(total).integers(0, 1 if alike else target.vocab, total)
        self._tokens = tokens
        self._shape = batch, total, context
        self._aux_layers = aux_layers
        self._tables = np.zeros((batch, each), np.int32)
        self._rows: Rows | None = None
        self._round: NativeBatch | None = None
        if target.native is not None:
            trees = fake_trees(batch, tokens[batch:])
            roots = tokens[:batch].tolist()
            addresses = [table.ctypes.data for table in self._tables]
            at = [context] * batch
            kept = np.arange(len(trees))
            self._round = NativeBatch(roots, at, at, addresses, trees, kept, aux_layers)

    def place(self, pages: Sequence[int], states: Sequence[int]) -> None:
        """Take pages in a mixed order, as after many requests: in order they are read up to a tenth
        faster; and the first places of states."""
        batch = len(self._tables)
        mixed = np.random.default_rng(batch).permutation(np.asarray(pages, np.int32))
        self._tables[:] = mixed.reshape(batch, -1)
        mine = states[: self.states]
        if self._round is not None:
            self._round = self._round._replace(states=mine)
        else:
            self._rows = _rows(self._tables, *self._shape)
            self._rows.token[:] = self._tokens
            self._rows.states = np.array(mine, np.int64) if mine else None

    def end(self) -> None:
        """Do nothing."""

    def run(self) -> None:
        """Verify once."""
        if self._round is not None:
            assert self._target.native is not None
            self.experts = self._target.native.verify(self._round).scores.experts
            return
        assert self._rows is not None
        scores = self._target.forward(self._rows, self._aux_layers)
        self.experts = scores.experts
        if scores.greedy is None:
            count = len(scores.logits) if scores.draws_all else len(self._tables)
            self._target.argmax(scores.logits, np.arange(count))

    def sample(self, seconds: float) -> Sample:
        """Return a timing as a sample."""
        batch, total, context = self._shape
        return VerifySample(batch, total, float(context), seconds, experts=self.experts)


def verification(
    target: TorchTarget,
    batch: int,
    total: int,
    context: int,
    pages: int,
    aux_layers: tuple[int, ...] = (),
) -> Callable[[], None] | None:
    """Return a function that runs such a verification in a cache of `pages` without other users;
    None if the cache is too small."""
    stage = Verification(target, batch, total, context, aux_layers)
    if stage.needed > pages or stage.states > target.states:
        return None
    stage.place(range(stage.needed), range(stage.states))
    return stage.run


def probe(
    target: TorchTarget,
    pages: int,
    aux_layers: tuple[int, ...] = (),
    clock: Callable[[], float] = time.perf_counter,
) -> dict[int, float]:
    """Return seconds of a lone request's forward by its rows: the fastest of three, as the first
    finds cold caches. Empty without room for such forwards, and off the CPU.

    pages: of the KV memory, which has no users yet."""
    context = ON_CPU.contexts[0]
    if target.device.type != "cpu" or context + max(PROBED) > target.max_positions:
        return {}
    runs = {}
    for rows in PROBED:
        run = verification(target, 1, rows, context, pages, aux_layers)
        if run is None:
            return {}
        runs[rows] = run
    # In turn: a slow moment meets all of them.
    turns = [{rows: least_seconds(runs[rows], 1, clock) for rows in PROBED} for _ in range(3)]
    return {rows: min(turn[rows] for turn in turns) for rows in PROBED}


def least_seconds(
    run: Callable[[], None], calls: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return seconds of the fastest of so many calls."""
    ends = [clock()]
    for _ in range(calls):
        run()
        ends.append(clock())
    return min(end - start for start, end in itertools.pairwise(ends))


def _first_point(requests: Rehearsal, waiting: int) -> Point:
    def sample(seconds: float) -> Sample:
        return DraftSample(requests.batch, float(requests.context), seconds, waiting)

    return Point(requests, requests.first, sample, lambda: requests.commit(waiting))


def _deeper_point(requests: Rehearsal, width: int) -> Point:
    expanded = [width]  # fewer where the drafter proposes chains

    def run() -> float | None:
        expanded[0], seconds = requests.deeper(width)
        return seconds

    def sample(seconds: float) -> Sample:
        return DraftSample(expanded[0], float(requests.context), seconds)

    return Point(requests, run, sample, lambda: requests.commit(0))


def _rows(tables: Ints, batch: int, total: int, context: int) -> Rows:
    spans = []
    for i, table in enumerate(tables):
        at = np.arange(context, context + total // batch + (i < total % batch))
        slots = (table[at // PAGE] * PAGE + at % PAGE).astype(np.int32)
        spans.append(Span([0] * len(at), context, slots, table))
    rows = build_rows(spans, DraftTrees.empty(batch), [True] * batch).rows
    rows.logit_rows = None
    return rows


def _pages_each(batch: int, total: int, context: int) -> int:
    return -(-(context + -(-total // batch)) // PAGE)


def fake_trees(batch: int, tokens: IntArray) -> DraftTrees:
    """Return trees of nodes with these tokens, those of all first levels before those of second
    ones: half of a tree's nodes are children of its root, the others lie below, two by two."""
    nodes = len(tokens)
    counts = [nodes // batch + (i < nodes % batch) for i in range(batch)]
    first = [(i, j) for i, count in enumerate(counts) for j in range((count + 1) // 2)]
    second = [(i, j // 2) for i, count in enumerate(counts) for j in range(count // 2)]
    place = {at: node for node, at in enumerate(first)}
    trees = DraftTrees.empty(batch)
    for level, parents in ((first, [ROOT] * len(first)), (second, [place[at] for at in second])):
        own = tokens[len(trees) : len(trees) + len(level)]
        trees.append([i for i, _ in level], own, parents, [0.5] * len(level))
    return trees
