"""Measures what forwards cost: rows x batch x context for the target, and for the levels of a
drafter with a model: roots and rows that wait for the first one, width for those below it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from smart_decoding.core.cost import DraftSample, Sample, VerifySample
from smart_decoding.core.tree import ROOT, DraftTrees
from smart_decoding.engine.kv import PAGE, Ints
from smart_decoding.engine.protocols import NativeBatch
from smart_decoding.engine.rows import Rows, Span, build_rows
from smart_decoding.profiling.rehearsal import MORE, Rehearsal
from smart_decoding.progress import long_step

if TYPE_CHECKING:
    import torch

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
SECONDS = 6.0  # that are measured for, if nothing else is said


@dataclass(frozen=True, slots=True)
class Grid:
    """What is measured: batch sizes, rows of each sequence, rows in all at most, contexts in
    tokens, and widths of draft levels."""

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
# Until arithmetic is all that costs: a guess beyond that is a line, and right. A GPU is idle at
# fewer rows.
ON_GPU = Grid(
    (1, 2, 4, 8, 16, 32, 64, 128, 256),
    (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
    1024,
    (128, 1024, 4096),
    (1, 4, 16, 64, 256),
)


def grid_of(device: torch.device) -> Grid:
    """What is measured on a device."""
    return ON_CPU if device.type == "cpu" else ON_GPU


@dataclass(frozen=True, slots=True)
class Point:
    """One thing to time: `run` performs it once, after `prepare`, and may say itself how many
    seconds count; `sample` wraps the seconds; `end` tidies up.

    cold: it is the first to touch some of the KV memory, which a system hands out page by page. A
    first run that pays for it says nothing of later ones."""

    run: Callable[[], float | None]
    sample: Callable[[float], Sample]
    prepare: Callable[[], object] = lambda: None
    end: Callable[[], object] = lambda: None
    cold: bool = False


class Measurement:
    """Times every point again and again, in turn and one a step, until `seconds` are used up; every
    point is timed at least once.

    coarse: fewer points, for forwards so slow that all of them would take far more than `seconds`.

    A shared machine changes its speed from second to second. So the first point, one row, is timed
    before every other one, and the ratio to it counts: neighbours then shift no point against
    another. It also leaves the caches as a real round does (before a deeper level of the drafter
    the first one runs, too). The KV cache must be idle in a step: its contents are overwritten."""

    def __init__(
        self,
        target: TorchTarget,
        drafter: LevelDrafter[Any] | None,
        pages: int,
        max_num_seqs: int,
        seconds: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
        coarse: bool = False,
    ) -> None:
        self._points: list[Point] = []
        if longest_context(target.max_positions, target.device):  # else too short to verify
            self._points = _points(target, drafter, pages, max_num_seqs, coarse)
        # Run once before any is timed; a GPU loads kernels at first use.
        self._cold = self._points[:1] if coarse else [p for p in self._points if p.cold]
        if target.device.type == "cuda":
            self._cold = self._points[:]
        self._seconds = SECONDS if seconds is None else seconds
        self._clock = clock
        self._timed: list[tuple[Point, float, float]] = []  # with the reference just before it
        self._passed = 0.0

    @property
    def share(self) -> float:
        """What is done of all, in [0, 1]."""
        each_once = min(1.0, len(self._timed) / max(1, len(self._points)))
        return min(each_once, self._passed / self._seconds if self._seconds else 1.0)

    def step(self) -> bool:
        """Times the next point; false if none is left."""
        if not self._points or self.share == 1.0:
            return False
        if self._cold:
            self._time(self._cold.pop(0))
            return True
        point = self._points[len(self._timed) % len(self._points)]
        started = self._clock()
        self._timed.append((point, self._time(self._points[0]), self._time(point)))
        self._passed += self._clock() - started
        return self.share < 1.0

    def samples(self) -> list[Sample]:
        """What was measured, at the reference's median speed; none where no verification fits into
        the model's context. Tidies up.

        A speed is that of three neighbouring references: one alone is noisy."""
        for point in self._points:
            point.end()
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
        """All steps at once."""
        finish(self.step, lambda: self.share)
        return self.samples()

    def _time(self, point: Point) -> float:
        point.prepare()
        start = self._clock()
        seconds = point.run()
        return self._clock() - start if seconds is None else seconds


def finish(step: Callable[[], bool], share: Callable[[], float]) -> None:
    """Calls `step`, which measures or waits, as long as it returns true. share: what is done, in
    [0, 1], as a user is shown."""
    with long_step("measuring costs, once", 1.0) as progress:
        shown = 0.0
        while step():
            now = share()
            progress(now - shown)
            shown = now


def longest_context(max_positions: int, device: torch.device) -> int:
    """What a profile of a model of so many positions knows of contexts: up to that length."""
    contexts = grid_of(device).contexts
    return max((context for context in contexts if context < max_positions), default=0)


def largest_batch(pages: int, max_num_seqs: int, device: torch.device) -> int:
    """The largest batch that is measured, in a cache of `pages`: what a profile says of larger ones
    is a guess."""
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
    points = []
    touched = 0  # pages
    aux_layers = drafter.aux_layers if drafter is not None else ()
    verified = verifications(grid_of(target.device), target.steps, max_num_seqs, coarse)
    for batch, total, context in verified:
        run = verification(target, batch, total, context, pages, aux_layers)
        if run is not None and context + -(-total // batch) <= target.max_positions:
            needed = batch * _pages_each(batch, total, context)
            sample = partial(VerifySample, batch, total, float(context))
            points.append(Point(run, sample, cold=needed > touched))
            touched = max(touched, needed)
    if drafter is not None and target.max_positions > MORE:
        points += _draft_points(target, drafter, pages, max_num_seqs, coarse)
    return points


def verifications(
    grid: Grid, steps: Sequence[int], max_num_seqs: int, coarse: bool = False
) -> Iterator[tuple[int, int, int]]:
    """What is verified: batch sizes, rows in all, and contexts. steps: see `Target.steps`."""
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
    # Both sides of a step, between which costs are flat. Of many steps a few batches show enough,
    # large ones among them: where arithmetic begins to cost, few rows decide what pays.
    if len(steps) <= 1 or batch in STEPPED:
        totals |= {total for step in steps for total in (step, step + 1) if total > batch}
    return totals


def _draft_points(
    target: TorchTarget, drafter: LevelDrafter[Any], pages: int, max_num_seqs: int, coarse: bool
) -> list[Point]:
    """First levels over roots, and over rows that wait; deeper ones over their width, and over the
    context."""
    grid = grid_of(target.device)
    widths, waits = (COARSE, COARSE_WAITING) if coarse else (grid.widths, WAITING)

    def rehearsal(batch: int, context: int, more: int = MORE) -> Rehearsal | None:
        context = min(context, target.max_positions - more)
        if context < 1 or not Rehearsal.fits(pages, batch, context, more):
            return None
        return Rehearsal(drafter, pages, batch, context, min(target.vocab, RANDOM_TOKENS), more)

    points: list[Point] = []
    for batch in (b for b in grid.batches if b <= max_num_seqs and (b == 1 or not coarse)):
        requests = rehearsal(batch, grid.contexts[0])
        if requests is None:
            break
        alone = batch == 1
        points += [_first_point(requests, waiting) for waiting in (waits if alone else (0,))]
        points += [_deeper_point(requests, width) for width in (widths if alone else (batch,))]
    late = None if coarse else rehearsal(1, grid.contexts[0], LONG_WAITING + MORE)
    points += [_first_point(late, LONG_WAITING)] if late else []
    longer = None if coarse else rehearsal(1, grid.contexts[-1])
    return points + ([_deeper_point(longer, width) for width in LONG_WIDTHS] if longer else [])


def verification(
    target: TorchTarget,
    batch: int,
    total: int,
    context: int,
    pages: int,
    aux_layers: tuple[int, ...] = (),
) -> Callable[[], None] | None:
    """What verifies `total` rows of `batch` sequences at `context`, as rounds do; None if the cache
    is too small. aux_layers: as in Target.verify, where they are copied out."""
    if target.verify_round is None:
        rows = fake_rows(batch, total, context, pages)
        return None if rows is None else lambda: _verify(target, rows, batch, aux_layers)
    tables = _tables(batch, total, context, pages)
    if tables is None:
        return None
    trees = fake_trees(batch, total - batch)
    verify = target.verify_round
    addresses = [table.ctypes.data for table in tables]
    at = [context] * batch
    asked = NativeBatch([1] * batch, at, at, addresses, trees, np.arange(len(trees)), ())

    def run() -> None:
        assert len(tables)  # which must live as long as their addresses
        verify(asked)

    return run


def _verify(target: TorchTarget, rows: Rows, batch: int, aux_layers: tuple[int, ...]) -> None:
    scores = target.verify(rows, aux_layers)
    if scores.greedy is None:
        count = len(scores.logits) if scores.draws_all else batch
        target.argmax(scores.logits, np.arange(count))


def _first_point(requests: Rehearsal, waiting: int) -> Point:
    def sample(seconds: float) -> Sample:
        return DraftSample(requests.batch, float(requests.context), seconds, waiting)

    cold = waiting in (0, LONG_WAITING)
    return Point(requests.first, sample, lambda: requests.commit(waiting), requests.end, cold)


def _deeper_point(requests: Rehearsal, width: int) -> Point:
    expanded = [width]  # fewer where the drafter proposes chains

    def run() -> float | None:
        expanded[0], seconds = requests.expand(width)
        return seconds

    def sample(seconds: float) -> Sample:
        return DraftSample(expanded[0], float(requests.context), seconds)

    return Point(run, sample, lambda: requests.reach(width), requests.end)


def fake_rows(batch: int, total: int, context: int, pages: int) -> Rows | None:
    """`total` rows of `batch` sequences at `context`, all logits wanted; None if the cache is too
    small."""
    tables = _tables(batch, total, context, pages)
    if tables is None:
        return None
    spans = []
    for i, table in enumerate(tables):
        at = np.arange(context, context + total // batch + (i < total % batch))
        slots = (table[at // PAGE] * PAGE + at % PAGE).astype(np.int32)
        spans.append(Span(((7 * at + i) % 32).tolist(), context, slots, table))
    rows = build_rows(spans, DraftTrees.empty(batch), [True] * batch).rows
    rows.logit_rows = None
    return rows


def _pages_each(batch: int, total: int, context: int) -> int:
    return -(-(context + -(-total // batch)) // PAGE)


def _tables(batch: int, total: int, context: int, pages: int) -> list[Ints] | None:
    """Block tables of `batch` sequences whose pages lie anywhere, as they do once requests have
    come and gone: read in order they are up to a tenth faster."""
    each = _pages_each(batch, total, context)
    if batch * each > pages:
        return None
    taken = np.random.default_rng(batch).permutation(batch * each).astype(np.int32)
    return list(taken.reshape(batch, each))


def fake_trees(batch: int, nodes: int) -> DraftTrees:
    """Trees of `nodes` nodes in all: half of a tree's nodes are children of its root, the others
    lie below, two by two."""
    counts = [nodes // batch + (i < nodes % batch) for i in range(batch)]
    first = [(i, j) for i, count in enumerate(counts) for j in range((count + 1) // 2)]
    second = [(i, j // 2) for i, count in enumerate(counts) for j in range(count // 2)]
    place = {at: node for node, at in enumerate(first)}
    trees = DraftTrees.empty(batch)
    for level, parents in ((first, [ROOT] * len(first)), (second, [place[at] for at in second])):
        tokens = [2 + node % 30 for node in range(len(level))]
        trees.append([i for i, _ in level], tokens, parents, [0.5] * len(level))
    return trees
