"""A block: some prompts answered by one engine at exactly one batch size, and its counts.

The queue is kept full: as soon as a request ends, the next prompt takes its place; once all
measured prompts have started, fillers do. In a closed batch nothing follows. A round counts as
decoding at batch size b if exactly b requests decoded and no prompt row rode along. Time is shared
equally by the b requests of a round, and the share of a request that already is in a loop is left
out together with its tokens, so that an answer counts only up to the start of its loop.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from smart_decoding.errors import CapacityError

if TYPE_CHECKING:
    from smart_decoding.engine.engine import Engine, RoundRecord
    from smart_decoding.engine.media import Media
    from smart_decoding.engine.request import Request
    from smart_decoding.engine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt of a task. index: its place among all prompts of the run; media: its pictures, if it
    has any."""

    index: int
    task: str
    tokens: Sequence[int]
    params: SamplingParams
    media: Media | None = None


@dataclass(slots=True)
class Answer:
    """A finished answer. tokens: ids, a loop cut off; tpot: seconds per token behind the first,
    NaN for an answer of one token."""

    tokens: list[int]
    tpot: float


@dataclass(slots=True)
class Counts:
    """Sums over the counted rounds of a block; tokens and seconds are less than all where a request
    was in a loop.

    off: rounds that drafted nothing."""

    tokens: float = 0.0
    seconds: float = 0.0
    round_seconds: float = 0.0
    controller_seconds: float = 0.0
    rounds: int = 0
    emitted: int = 0
    rows: int = 0
    off: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))


@dataclass(slots=True)
class Block:
    """One block of one arm. answers: prompt index -> answer; total_tokens and total_seconds: end to
    end, prompts and all rounds included."""

    task: str
    batch_size: int
    counts: Counts
    answers: dict[int, Answer] = field(default_factory=dict)
    total_tokens: int = 0
    total_seconds: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Decode-only throughput; NaN if no round was counted."""
        return self.counts.tokens / self.counts.seconds if self.counts.seconds > 0 else float("nan")


@dataclass(slots=True)
class _Note:
    """A counted round, and each request's answer length before and after. Figures are made after
    the clock stops."""

    record: RoundRecord
    spans: list[tuple[Request, int, int]]


@dataclass(slots=True)
class _Times:
    """When an answer began and ended, in seconds of its block."""

    first: float | None = None
    finished: float | None = None


def run_block(
    engine: Engine,
    prompts: Sequence[Prompt],
    fillers: Sequence[Prompt] | None,
    batch_size: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Block:
    """Return all of `rounds_of` without a pause."""
    rounds = rounds_of(engine, prompts, fillers, batch_size, clock)
    while True:
        try:
            next(rounds)
        except StopIteration as end:
            block: Block = end.value
            return block


def rounds_of(
    engine: Engine,
    prompts: Sequence[Prompt],
    fillers: Sequence[Prompt] | None,
    batch_size: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Generator[int, None, Block]:
    """Answer `prompts` at `batch_size` running requests; `fillers` (cycled) take the places that
    become free; None leaves them empty: a closed batch. Yields the new tokens after each round, and
    returns the block.

    Time between rounds does not count, so that other engines may run then. The engine is empty
    before and after. Raises CapacityError if its requests find no KV memory."""
    pictures = any(prompt.media for prompt in prompts)
    queue = _Queue(engine, prompts, fillers, batch_size)
    notes: list[_Note] = []
    total = 0
    seconds = 0.0  # of the block so far
    try:
        while not queue.done:
            if pictures:  # so that each arm runs the tower
                engine.target.forget_pictures()
            started = clock()
            queue.fill()
            note, new = queue.step()
            total += new
            if _counts(note.record, batch_size):
                notes.append(note)
            seconds += clock() - started
            queue.look(seconds)
            yield new
    finally:
        queue.abort()
    answers = {index: _answer(*measured) for index, measured in queue.measured.items()}
    counts = sum((_settled(note) for note in notes), Counts())
    return Block(prompts[0].task, batch_size, counts, answers, total, seconds)


class _Queue:
    """Prompts in order, then fillers in circle; keeps `batch_size` requests running."""

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Prompt],
        fillers: Sequence[Prompt] | None,
        batch_size: int,
    ) -> None:
        self.measured: dict[int, tuple[Request, _Times]] = {}
        self.running: list[Request] = []
        self._engine = engine
        self._batch_size = batch_size
        self._count = len(prompts)
        self._names = itertools.count()
        behind = () if fillers is None else itertools.cycle(fillers or prompts)
        self._prompts = itertools.chain(prompts, behind)

    @property
    def done(self) -> bool:
        """Whether every measured prompt is answered."""
        started = len(self.measured) == self._count
        return started and all(request.finished for request, _ in self.measured.values())

    def fill(self) -> None:
        """Start the next prompts where places are free."""
        for prompt in itertools.islice(self._prompts, self._batch_size - len(self.running)):
            name = f"bench-{next(self._names)}"
            (request,) = self._engine.add_request(name, prompt.tokens, prompt.params, prompt.media)
            self.running.append(request)
            if len(self.measured) < self._count:
                self.measured[prompt.index] = request, _Times()

    def step(self) -> tuple[_Note, int]:
        """Return a round, and its new tokens. Raises CapacityError if there was none."""
        before = {id(request): len(request.output) for request in self.running}
        self._engine.last_round = None
        self._engine.step()
        record = self._engine.last_round
        if record is None:
            raise CapacityError("the KV memory of this run is too small: measure fewer at once")
        new = sum(len(request.output) for request in self.running) - sum(before.values())
        return _Note(record, [(r, before[id(r)], len(r.output)) for r in record.requests]), new

    def look(self, now: float) -> None:
        """Note, after a round, when answers began and ended; free the places of finished
        requests."""
        for request, times in self.measured.values():
            if request.output:
                times.first = times.first or now
            if request.finished:
                times.finished = times.finished or now
        self.running = [request for request in self.running if not request.finished]

    def abort(self) -> None:
        """Leave the engine empty."""
        for request in self.running:
            self._engine.abort(request.id)


def _counts(record: RoundRecord, batch_size: int) -> bool:
    return record.round.batch.size == batch_size and record.round.batch.prefill_rows == 0


def _settled(note: _Note) -> Counts:
    """Return the round's figures once all loops are known: requests past their loop's start lose
    their share."""
    record = note.record
    done = record.round
    counts = Counts(
        round_seconds=record.seconds,
        controller_seconds=record.controller_seconds,
        rounds=1,
        emitted=record.emitted,
        rows=done.verify_rows,
        off=int(done.rule is None or not len(done.trees)),
    )
    share = 1.0 / len(note.spans)
    for request, before, after in note.spans:
        end = request.stop.loop_start
        useful = after if end is None else min(after, end)
        if useful > before:
            counts.tokens += useful - before
            counts.seconds += counts.round_seconds * share
    return counts


def _answer(request: Request, times: _Times) -> Answer:
    ids = list(request.output)
    if len(ids) > 1 and times.first is not None and times.finished is not None:
        tpot = (times.finished - times.first) / (len(ids) - 1)
    else:
        tpot = float("nan")
    return Answer(ids[: request.stop.loop_start], tpot)
