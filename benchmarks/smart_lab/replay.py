"""Policies replayed offline: outputs do not depend on the policy, so one recording serves them all.

A replay walks through the recorded answers as an engine would: the policy drafts from the recorded
trees, the recorded answer says what is accepted, and a CostModel says how long it takes. A node
that the recording did not expand has no children; `missing` counts requests for such children.

Needed by `ablate`, `simulate` and the tuning of `bench`, and so by docs/lab.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from smart_decoding.core.batch import BatchState, Round
from smart_decoding.core.calibration import path_products
from smart_decoding.core.rule import NO_NODES
from smart_decoding.core.tree import ROOT, BoolArray, DraftTrees, FloatArray, IntArray, fold
from smart_decoding.errors import ConfigError
from smart_lab.figures import Figures

if TYPE_CHECKING:
    from smart_decoding.core.costs import CostModel
    from smart_decoding.core.policies.base import Policy
    from smart_decoding.core.rule import TreeRule
    from smart_lab.recording import Recording

DEEPEST = 64  # no policy drafts deeper
WIDEST = 255  # children that a recording can have
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class HostCosts:
    """Seconds that a round takes beyond its forwards and beyond what the policy itself takes: in
    every round, and more where it drafts; each with a part per request."""

    round: float = 0.0
    round_request: float = 0.0
    drafting: float = 0.0
    drafting_request: float = 0.0

    def seconds(self, batch_size: int, drafts: bool) -> float:
        plain = self.round + self.round_request * batch_size
        return plain + (self.drafting + self.drafting_request * batch_size if drafts else 0.0)

    @classmethod
    def of(cls, cost: CostModel) -> HostCosts:
        """Return what a cost model itself knows."""
        return cls(drafting=cost.overhead_seconds)


@dataclass(frozen=True, slots=True)
class Prompts:
    """How prompts are read. chunk: their tokens in a round at most; 0: they are there already.
    share: what their rows cost, of the table's seconds for as many rows more. They skip the output
    matrix and most of the last layer."""

    chunk: int = 0
    share: float = 1.0

    def seconds(self, decoding: float, whole: float) -> float:
        """Return the seconds of a round with prompts. decoding, whole: the table's, without and
        with their rows."""
        return decoding + self.share * (whole - decoding)


READ = Prompts()


class StepCosts:
    """A cost model's seconds at one batch size as tables, since asking it again and again is what
    would take long."""

    def __init__(
        self,
        cost: CostModel,
        batch_size: int,
        rows: int = 128,
        width: int = 128,
        prompts: Prompts = READ,
    ) -> None:
        self._cost, self._batch, self.prompts = cost, batch_size, prompts
        self._verify = self._draft = self._first = (np.zeros(0), np.zeros(0))
        self._grow(batch_size + rows, width)

    def experts(self, done: Drafted, walk: Walk) -> float:
        """Return how many experts of a layer a round's rows wake; 0: there are none."""
        return 0.0

    def verify(self, rows: int, context: float, beyond: float = 0.0, experts: float = 0.0) -> float:
        """Return seconds of a verification of `rows` rows in all. context: mean tokens of a
        request; beyond: context tokens of all rows beyond that mean; experts: awake, which cost
        nothing here."""
        if rows >= len(self._verify[0]):
            self._grow(2 * rows, 0)
        seconds = self._verify[0][rows] + self._verify[1][rows] * context
        return float(seconds + self._cost.row_token * beyond)

    def levels(self, widths: Sequence[int], context: float) -> list[float]:
        """Return seconds of each drafted level of a round. The first width counts the roots and all
        waiting rows."""
        return (
            [self.first(widths[0], context), *(self.draft(w, context) for w in widths[1:])]
            if widths
            else []
        )

    def first(self, width: int, context: float) -> float:
        """Return seconds of a first level of `width` rows, roots and what waits."""
        if width >= len(self._first[0]):
            self._grow(0, 2 * width)
        return float(self._first[0][width] + self._first[1][width] * context)

    def draft(self, width: int, context: float) -> float:
        """Return seconds of a further level of `width` rows."""
        if width >= len(self._draft[0]):
            self._grow(0, 2 * width)
        return float(self._draft[0][width] + self._draft[1][width] * context)

    def advance(self, tokens: int) -> None:
        """After a round of so many tokens: these costs stay."""

    def _grow(self, rows: int, width: int) -> None:
        if rows:
            self._verify = _line(
                lambda context: self._cost.verify_curve(self._batch, 0, rows + 1, context)
            )
        if width:
            waiting = np.maximum(np.arange(width + 1) - self._batch, 0)
            self._draft = _line(
                lambda context: self._cost.draft_seconds(np.arange(width + 1), context)
            )
            self._first = _line(
                lambda context: self._cost.first_seconds(self._batch, waiting, context)
            )


def _line(seconds: Callable[[float], FloatArray]) -> tuple[FloatArray, FloatArray]:
    """(at context 0, per token of context): costs are linear in it."""
    at_zero = seconds(0.0)
    return at_zero, (seconds(1024.0) - at_zero) / 1024.0


class Machine(Protocol):
    """The seconds of steps, and how prompts are read."""

    prompts: Prompts

    def experts(self, done: Drafted, walk: Walk) -> float: ...

    def verify(
        self, rows: int, context: float, beyond: float = 0.0, experts: float = 0.0
    ) -> float: ...

    def levels(self, widths: Sequence[int], context: float) -> list[float]: ...

    def advance(self, tokens: int) -> None: ...


@dataclass(slots=True)
class Replayed:
    """Sums over the decoding rounds at full batch. rows: of the verifying forwards; kept: verified
    nodes; off: rounds without drafting; chains: those that verified no two children of one node,
    but some node (a sweep counts none); missing: drafts that the recording lacked; own_seconds: the
    policy's own; with_prompts: rounds with prompts, in which fewer requests decode; figures: what
    the policy believed, and what each request took (a sweep has none)."""

    batch_size: int
    tokens: int = 0
    seconds: float = 0.0
    rounds: int = 0
    missing: int = 0
    rows: int = 0
    kept: int = 0
    levels: int = 0
    off: int = 0
    chains: int = 0
    own_seconds: float = 0.0
    with_prompts: int = 0
    figures: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def tokens_per_round(self) -> float:
        """Tokens of one request in a round."""
        return self.tokens / (self.rounds * self.batch_size)


class Walk:
    """The place of each running answer in a recording. Arrays have shape [decoding requests].

    at: output tokens that are out, less one; pending: rows that the drafter has not processed yet,
    at first the prompt's. reading: the other running answers, and how much of their prompts is
    left."""

    def __init__(
        self, recording: Recording, batch_size: int, closed: bool = False, chunk: int = 0
    ) -> None:
        """closed: batch after batch; answers that end make room for no others before all have
        ended. chunk: of `Prompts`."""
        answers = recording.answers
        self.recording, self.closed, self.chunk = recording, closed, chunk
        self._tokens, self._start = _padded([a.tokens.astype(np.int64) for a in answers])
        self._length = np.array([len(a.tokens) for a in answers], np.int64)
        self._limit = np.array([a.limit for a in answers], np.int64)
        self._prompt = np.array([a.prompt_length for a in answers], np.int64)
        self._first = np.array([a.first for a in answers], np.int64)
        self._temperature = np.array([a.temperature for a in answers], np.float64)
        self._waiting = [i for i in range(len(answers)) if len(answers[i].tokens) > 1]
        if len(self._waiting) < batch_size:
            raise ConfigError(
                f"a replay at batch size {batch_size} needs that many recorded answers, "
                f"not {len(self._waiting)}"
            )
        self._size = batch_size
        self.begin()

    def begin(self) -> None:
        """Begin with a batch of new answers, if there are as many left."""
        self.answer = self.at = self.pending = np.zeros(0, np.int64)
        self.reading: list[tuple[int, int]] = []
        self.running = len(self._waiting) >= self._size
        self._admit(self._size)

    def _admit(self, count: int) -> None:
        """Take so many answers from the queue: where prompts are not read, they decode at once."""
        new, self._waiting = self._waiting[:count], self._waiting[count:]
        if self.chunk:
            self.reading += [(answer, int(self._prompt[answer])) for answer in new]
        else:
            self._decode(new)

    def _decode(self, answers: Sequence[int]) -> None:
        """Let answers begin whose prompts are read and whose first tokens are out."""
        new = np.array(answers, np.int64)
        self.answer = np.append(self.answer, new)
        self.at = np.append(self.at, np.zeros_like(new))
        self.pending = np.append(self.pending, self._prompt[new])

    @property
    def prompt_rows(self) -> int:
        """Rows of prompts in the coming round."""
        return min(self.chunk, sum(left for _, left in self.reading))

    @classmethod
    def everywhere(cls, recording: Recording) -> Walk:
        """Return all positions as one batch: for policies that treat each request alone."""
        walk = cls(recording, 0)
        positions = np.maximum(walk._length - 1, 0)
        walk.answer = np.repeat(np.arange(len(positions)), positions)
        walk.at = np.arange(len(walk.answer)) - (np.cumsum(positions) - positions)[walk.answer]
        walk.pending = np.ones(len(walk.answer), np.int64)
        return walk

    def part(self, start: int, stop: int) -> Walk:
        """Some of the batch."""
        other = object.__new__(Walk)
        other.__dict__.update(self.__dict__)
        other.answer, other.at = self.answer[start:stop], self.at[start:stop]
        other.pending = self.pending[start:stop]
        return other

    @property
    def position(self) -> IntArray:
        """The positions of the trees that are drafted next."""
        return self._first[self.answer] + self.at

    @property
    def context(self) -> IntArray:
        """Tokens in the target's cache."""
        return self._prompt[self.answer] + self.at

    @property
    def left(self) -> IntArray:
        """Tokens of the answers that are still to come."""
        return self._length[self.answer] - self.at - 1

    def state(self) -> BatchState:
        size = len(self.at)
        return BatchState(
            self.context,
            self._limit[self.answer] - self.at - 1,
            self._temperature[self.answer],
            np.ones(size, np.bool_),
            prefill_rows=self.prompt_rows,
            catch_up_rows=0 if self.recording.free else int(self.pending.sum()) - size,
            has_model=not self.recording.free,
            has_free=self.recording.free or self.recording.ngrams is not None,
            requests=self.answer.tolist(),
        )

    def truth(self, owner: IntArray, depth: IntArray) -> IntArray:
        """Return the target's token at a depth below an owner's root; -1 behind the answer's
        end."""
        return self._tokens.take((self._start[self.answer] + self.at)[owner] + depth)

    def advance(self, emitted: IntArray, drafted: bool) -> None:
        """After a round; answers that ended make room for the next one, until there is none."""
        self.at = self.at + emitted
        self.pending = emitted.copy() if drafted else self.pending + emitted
        stays = self.left > 0
        ended = len(stays) - int(stays.sum())
        self.answer, self.at, self.pending = (
            each[stays] for each in (self.answer, self.at, self.pending)
        )
        self._read()
        if self.closed:
            if not len(self.at) and not self.reading:
                self.begin()
            return
        self.running = len(self._waiting) >= ended
        self._admit(ended)

    def _read(self) -> None:
        """Read the round's rows of prompts, in their order."""
        rows = self.prompt_rows
        while rows:
            answer, left = self.reading.pop(0)
            if left > rows:
                self.reading.insert(0, (answer, left - rows))
                break
            rows -= left
            self._decode([answer])


class Source:
    """Recorded trees as a drafter. roots: [batch] the positions whose trees are drafted; proposed:
    nodes that other drafters have proposed before."""

    def __init__(self, recording: Recording, roots: IntArray, proposed: int = 0) -> None:
        self._recording, self._root, self._proposed = recording, roots, proposed
        # [live nodes] their number in the recording, -1 for other drafters' nodes
        self._where: IntArray = np.full(proposed, -1)
        self.missing = np.zeros(len(self._root), np.int64)  # [batch]

    def expand(
        self, trees: DraftTrees, parents: IntArray, children: int, owners: IntArray | None = None
    ) -> None:
        """Append the recorded children of `parents`: live nodes, or the roots of `owners`."""
        recording = self._recording
        if owners is None:
            owners, where = trees.owner[parents], self._where[parents]
            slot = recording.positions + where
            known = recording.count.take(slot).astype(np.int64) * (where >= 0)
        else:
            slot = self._root[owners]
            known = recording.count.take(slot).astype(np.int64)
        if not known.all():
            self.missing += np.bincount(owners[known == 0], minlength=len(self.missing))
        count = np.minimum(known, children)
        total = int(count.sum())
        node = np.repeat(recording.child.take(slot) - np.cumsum(count) + count, count) + np.arange(
            total
        )
        first = len(trees)
        if total:
            trees.append(
                np.repeat(owners, count),
                recording.token.take(node),
                np.repeat(parents, count),
                recording.prob.take(node),
                source=int(recording.free),
            )
        same = self._same(trees, first)
        self._where[same[same >= 0]] = node[same >= 0]
        self._where = np.concatenate((self._where, node[same < 0]))

    def _same(self, trees: DraftTrees, first: int) -> IntArray:
        """Make nodes from `first` on that were proposed before one node; return each one's place
        before, or -1."""
        if not self._proposed:
            return np.full(len(trees) - first, -1)
        columns = (trees.owner.tolist(), trees.parent.tolist(), trees.token.tolist())
        keys = list(zip(*columns, strict=True))
        places = {key: i for i, key in enumerate(keys[:first])}
        fold(trees, first)
        return np.array([places.get(key, -1) for key in keys[first:]], np.int64)

    def propose(self, trees: DraftTrees, levels: int) -> None:
        """Append the whole trees of a drafter without a model, down to so many levels."""
        parents: IntArray = np.full(trees.batch, ROOT)
        owners: IntArray | None = np.arange(trees.batch)
        for _ in range(levels):
            before = len(trees)
            self.expand(trees, parents, WIDEST, owners)
            parents, owners = np.arange(before, len(trees)), None
            if not len(parents):
                break
        self.missing[:] = 0


@dataclass(slots=True)
class Drafted:
    """One round by a policy. expanded: the owners of the nodes that each level expanded; missing:
    [batch] drafts that the recording lacks; planning: the policy's seconds."""

    batch: BatchState
    rule: TreeRule | None
    trees: DraftTrees
    kept: IntArray
    missing: IntArray
    planning: float
    expanded: list[IntArray] = field(default_factory=list)

    @property
    def widths(self) -> list[int]:
        """Rows of each drafted level."""
        return [
            len(owners) + (self.batch.catch_up_rows if i == 0 else 0)
            for i, owners in enumerate(self.expanded)
        ]


def draft(policy: Policy, walk: Walk, clock: Clock = lambda: 0.0) -> Drafted:
    """Return the trees by the policy's rule, level by level. As in the engine, rounds with prompts
    never draft."""
    batch = walk.state()
    started = clock()
    rule = None if batch.prefill_rows else policy.plan(batch)
    planning = clock() - started
    trees = DraftTrees.empty(batch.size)
    if rule is None:
        return Drafted(batch, None, trees, NO_NODES, np.zeros(batch.size, np.int64), planning)
    recording = walk.recording
    ngrams = recording if recording.free else recording.ngrams
    if ngrams is not None:
        Source(ngrams, walk.position).propose(trees, DEEPEST)
        rule = rule.after_free(trees)
    source = Source(recording, walk.position, len(trees))
    done = Drafted(batch, rule, trees, NO_NODES, source.missing, planning)
    if recording.free or not rule.levels:
        done.kept = rule.select(trees)
        return done
    owners: IntArray | None = np.arange(batch.size)
    parents: IntArray = np.full(batch.size, ROOT)
    for level in range(1, rule.levels + 1):
        done.expanded.append(trees.owner[parents] if owners is None else owners)
        source.expand(trees, parents, rule.children, owners)
        parents = rule.frontier(trees, level)
        owners = None
        if not len(parents):
            break
    done.kept = rule.select(trees)
    return done


def accepted(trees: DraftTrees, kept: IntArray, walk: Walk) -> BoolArray:
    """[nodes] whether a node is kept and on the recorded answer's path."""
    if not len(kept):
        return np.zeros(len(trees), np.bool_)
    right = np.zeros(len(trees))
    right[kept] = trees.token[kept] == walk.truth(trees.owner[kept], trees.depth[kept])
    on_path: BoolArray = path_products(trees.parent, right, int(trees.depth.max())) > 0
    return on_path


def replay(
    policy: Policy,
    recording: Recording,
    cost: CostModel,
    batch_size: int,
    host: HostCosts | None = None,
    own_time: Clock = lambda: 0.0,
    rounds: int | None = None,
    costs: Machine | None = None,
) -> Replayed:
    """Decode the recorded answers under `policy`, `batch_size` at a time; the queue is refilled
    until it runs dry, and then rounds of smaller batches are left out, as in the live benchmark.

    host: seconds beyond the forwards (default: those of `cost`). own_time: a clock for the policy's
    `plan` and `observe`, whose seconds then count, too; following a rule is the engine's time.
    rounds: stop after so many. costs: real seconds of steps (default: those of `cost`)."""
    costs = costs or StepCosts(cost, batch_size)
    walk = Walk(recording, batch_size, chunk=costs.prompts.chunk)
    result, figures = Replayed(batch_size), Figures(len(recording.answers))
    host = host or HostCosts.of(cost)
    while walk.running and result.rounds != rounds:
        _round(policy, walk, costs, host, own_time, result, figures)
    result.figures = figures.summary(policy)
    return result


def _round(
    policy: Policy,
    walk: Walk,
    costs: Machine,
    host: HostCosts,
    clock: Clock,
    result: Replayed,
    figures: Figures,
) -> None:
    done = draft(policy, walk, clock)
    size, prompt_rows = done.batch.size, done.batch.prefill_rows
    widths = done.widths
    context = done.batch.mean_context
    levels = costs.levels(widths, context)
    rows = size + len(done.kept)
    own = done.batch.context[done.trees.owner[done.kept]]  # of the rows of nodes
    experts = costs.experts(done, walk)
    verify = costs.verify(rows, context, float(own.sum()) - len(own) * context, experts)
    if prompt_rows:
        rows += prompt_rows
        verify = costs.prompts.seconds(verify, costs.verify(rows, context))
    beyond = host.seconds(size, done.rule is not None) + done.planning
    truth, emitted = judged(done, walk)
    round_ = Round(
        done.batch, done.rule, done.trees, done.kept, *truth, widths, levels, rows, verify, beyond,
        experts,
    )  # fmt: skip
    figures.add(policy, round_, walk.answer, emitted, round_.seconds)
    started = clock()
    if size:
        policy.observe(round_)
    learning = clock() - started
    walk.advance(emitted, done.rule is not None)
    costs.advance(int(emitted.sum()))
    result.tokens += int(emitted.sum())
    result.seconds += round_.seconds + learning
    result.with_prompts += prompt_rows > 0
    result.rounds += 1
    result.missing += int(done.missing.sum())
    result.rows += rows
    result.kept += len(done.kept)
    result.levels += len(widths)
    result.off += done.rule is None and not prompt_rows
    result.chains += _are_chains(done.trees, done.kept)
    result.own_seconds += done.planning + learning


def judged(done: Drafted, walk: Walk) -> tuple[tuple[IntArray, IntArray], IntArray]:
    """Return the target's tokens behind each node on the answer's path and behind each root, and
    how many tokens each request gains."""
    trees = done.trees
    size = done.batch.size
    on_path = accepted(trees, done.kept, walk)
    emitted = np.minimum(1 + np.bincount(trees.owner[on_path], minlength=size), walk.left)
    behind: IntArray = trees.token
    if len(trees):
        behind = np.where(on_path, walk.truth(trees.owner, trees.depth + 1), -1)
    root_next = walk.truth(np.arange(size), np.ones(size, np.int64))
    return (behind, root_next), emitted


def _are_chains(trees: DraftTrees, kept: IntArray) -> bool:
    """Return whether something is verified, and each request's is a chain."""
    place = trees.owner[kept] * (DEEPEST + 1) + trees.depth[kept]
    return 0 < len(kept) == len(np.unique(place))


def _padded(answers: list[IntArray]) -> tuple[IntArray, IntArray]:
    """Return all answers' tokens in one array, with -1 behind each end, and where each starts."""
    gap = np.full(DEEPEST + 2, -1, np.int64)
    parts = [part for tokens in answers for part in (np.asarray(tokens, np.int64), gap)]
    sizes = np.array([len(tokens) + len(gap) for tokens in answers], np.int64)
    return np.concatenate(parts or [gap]), np.cumsum(sizes) - sizes
