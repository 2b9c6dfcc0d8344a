"""Verification: runs a round's rows through the target, draws its tokens down the trees, and moves
the keys of accepted nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from smart_decoding.core.tree import DraftTrees, accept
from smart_decoding.engine.history import specs_of
from smart_decoding.engine.kv import OutOfPagesError
from smart_decoding.engine.protocols import Committed, Verified
from smart_decoding.engine.rows import RowLayout, Span, build_rows
from smart_decoding.errors import require_finite

if TYPE_CHECKING:
    from smart_decoding.core.rule import Draft
    from smart_decoding.core.tree import Acceptance, IntArray
    from smart_decoding.engine.kv import Ints
    from smart_decoding.engine.protocols import Clock, Features
    from smart_decoding.engine.request import Request
    from smart_decoding.engine.rows import Rows
    from smart_decoding.engine.scheduler import Batch

Logits: TypeAlias = Any


@dataclass(slots=True)
class TargetScores:
    """Results of a forward. logits: [rows, vocab] of the requested rows, on the backend. features:
    aux hidden states of all rows, or None. greedy: the result of `argmax` for the requested rows,
    where the backend knows it already. draws_all: whether `sample` draws all rows at once, while
    the forward goes on: the only wait for a device. Tokens of unvisited rows may then be -1.
    advance: brings recurrent states to the ends of accepted paths, lists of rows; None: there are
    none. experts: that the rows woke, in the mean of a mixture's layers."""

    logits: Logits
    features: Features
    greedy: IntArray | None = None
    draws_all: bool = False
    advance: Callable[[Sequence[Sequence[int]]], None] | None = None
    experts: float = 0.0


class RowModel(Protocol):
    """A target that `verify_by_rows` can run."""

    eos_token_ids: tuple[int, ...]
    clock: Clock

    def forward(self, rows: Rows, aux_layers: tuple[int, ...]) -> TargetScores:
        """Run one forward of the rows, and write their keys and values to their slots."""

    def sample(self, logits: Logits, which: IntArray, specs: Sequence[Any]) -> IntArray:
        """Return the target's tokens [which] at the rows `which` of `logits`."""

    def argmax(self, logits: Logits, which: IntArray) -> IntArray:
        """Return the greedy tokens [which] of the rows `which`, ties to the lowest id."""

    def logprobs(
        self, logits: Logits, which: IntArray, tokens: Sequence[int], k: Sequence[int]
    ) -> list[Any]:
        """Return log probabilities of drawn tokens and of each row's k most likely ones."""

    def move(self, source: Ints, target: Ints) -> None:
        """Copy KV slots source[i] -> target[i], in order."""


def make_room(batch: Batch, trees: DraftTrees, kept: IntArray) -> IntArray:
    """Reserve KV memory for the nodes `kept`. A request for which memory is short loses all its
    nodes. Return the rest."""
    if not len(kept):
        return kept
    for i, count in enumerate(trees.counts(kept)):
        try:
            batch.decode[i].table.cover(1 + count)
        except OutOfPagesError:
            kept = kept[trees.owner[kept] != i]
    return kept


def verify_by_rows(
    model: RowModel, batch: Batch, draft: Draft, aux_layers: tuple[int, ...]
) -> Verified:
    """Verify step by step: a forward, tokens down the trees, and moves of keys; see
    `Target.verify`. This is the reference, and used by every target without a native call."""
    round_rows = lay_out(batch, draft)
    start = model.clock()
    scores = model.forward(round_rows.layout.rows, aux_layers)
    return settle(model, round_rows, scores, model.clock() - start)


@dataclass(slots=True)
class VerificationRows:
    """A round's rows. spans: committed tokens, first of the requests that get a token, `emitting`,
    then of unfinished prompts, `going_on`. nodes: the nodes to verify. scored: requests that miss
    log probabilities of their prompts, each with the rows of `logits` that give them."""

    spans: list[Span]
    emitting: list[Request]
    going_on: list[Request]
    nodes: DraftTrees
    layout: RowLayout
    scored: list[tuple[Request, list[int]]]


def lay_out(batch: Batch, draft: Draft) -> VerificationRows:
    """Return the rows of a round."""
    trees, kept = draft.trees, draft.kept
    ending = [(r, n) for r, n in batch.prefill if n == r.pending]
    unfinished = [(r, n) for r, n in batch.prefill if n < r.pending]
    counts = trees.counts(kept)
    spans = [_span(r, 1, 1 + count) for r, count in zip(batch.decode, counts, strict=True)]
    spans += [_span(r, n, n) for r, n in ending + unfinished]
    emitting = batch.decode + [r for r, _ in ending]
    going_on = [r for r, _ in unfinished]
    nodes = trees.take(kept, len(emitting)) if len(trees) else DraftTrees.empty(len(emitting))
    layout = build_rows(spans, nodes, [i < len(emitting) for i in range(len(spans))])
    scored = _prompt_rows([*emitting, *going_on], spans, layout)
    return VerificationRows(spans, emitting, going_on, nodes, layout, scored)


def _prompt_rows(
    requests: Sequence[Request], spans: Sequence[Span], layout: RowLayout
) -> list[tuple[Request, list[int]]]:
    """Return `VerificationRows.scored`, and request the logits of these rows behind all others."""
    scored = []
    for request, span, last in zip(requests, spans, layout.last, strict=True):
        if request.prompt_logprobs is None or not request.scores_prompt:
            continue
        first = last + 1 - len(span.tokens)  # the row of position span.start
        begin = len(request.prompt_logprobs) - 1  # the position that the next token follows
        end = min(span.start + len(span.tokens), len(request.prompt) - 1)
        rows = [first + position - span.start for position in range(begin, end)]
        if layout.rows.logit_rows is not None:
            known = len(layout.rows.logit_rows)
            layout.rows.logit_rows = np.append(layout.rows.logit_rows, np.array(rows, np.int64))
            rows = list(range(known, known + len(rows)))
        scored.append((request, rows))
    return scored


def settle(
    model: RowModel, rows: VerificationRows, scores: TargetScores, forward_seconds: float
) -> Verified:
    """Draw tokens down the trees, move the keys of accepted nodes, and advance recurrent states."""
    sample_start = model.clock()
    acceptance = _accept(model, rows.emitting, rows.nodes, rows.layout, scores)
    for request, at in rows.scored:
        _score_prompt(model, request, np.array(at, np.int64), scores)
    sampled = model.clock()
    if len(rows.nodes):
        _commit_keys(model, acceptance, rows.layout)
        if scores.advance is not None:
            scores.advance([[rows.layout.node_row[n] for n in path] for path in acceptance.path])
    moved = model.clock()
    if scores.draws_all:  # the wait for the tokens was the wait for the forward
        forward_seconds += sampled - sample_start
        sample_start = sampled
    requests = rows.emitting + rows.going_on
    return Verified(
        rows.emitting,
        acceptance,
        len(rows.layout.rows),
        scores.features,
        _committed(requests, rows.spans, acceptance, rows.layout),
        forward_seconds=forward_seconds,
        sample_seconds=sampled - sample_start,
        kv_seconds=moved - sampled,
        experts=scores.experts,
    )


def _span(request: Request, count: int, slots: int) -> Span:
    start = request.table.length
    tokens = request.tokens[start : start + count]
    span = Span(tokens, start, request.table.reserve(slots), request.table.array)
    span.state = request.table.state
    if request.media is not None:
        span.mm_embeds = request.media.mm_embeds(start, count)
        span.rotary = request.media.positions(start, count)
    return span


def _logit_rows(layout: RowLayout, nodes: DraftTrees) -> list[int]:
    """Return the row of `logits` of each root, then of each node: the numbering of `accept`."""
    if layout.rows.logit_rows is not None:
        return list(range(nodes.batch + len(nodes)))
    return layout.last[: nodes.batch] + layout.node_row


def _accept(
    model: RowModel,
    emitting: list[Request],
    nodes: DraftTrees,
    layout: RowLayout,
    scores: TargetScores,
) -> Acceptance:
    """Draw the target's tokens down the trees."""
    at = _logit_rows(layout, nodes)

    def draw(rows: Sequence[int]) -> list[int]:
        which = np.array([at[row] for row in rows])
        specs = specs_of(rows, emitting, nodes, model.eos_token_ids)
        drawn: list[int] = model.sample(scores.logits, which, specs).tolist()
        return drawn

    tokens: list[int] | None = None  # of all rows, where they are known at once
    if not all(r.takes_argmax for r in emitting):
        tokens = draw(range(len(at))) if scores.draws_all else None
    elif scores.greedy is None:
        tokens = model.argmax(scores.logits, np.array(at)).tolist()
    else:
        tokens = scores.greedy[at].tolist()

    def take(rows: Sequence[int]) -> list[int]:
        found = draw(rows) if tokens is None else [tokens[row] for row in rows]
        require_finite(min(found, default=0) >= 0)  # unvisited rows may be -1, visited ones not
        return found

    acceptance = accept(nodes, take)
    _add_logprobs(model, emitting, at, acceptance, scores)
    return acceptance


def _add_logprobs(
    model: RowModel,
    emitting: list[Request],
    at: list[int],
    acceptance: Acceptance,
    scores: TargetScores,
) -> None:
    """Append the log probabilities that requests need: all at once, which is one wait for a
    device."""
    receivers: list[list[Any]] = []
    visited: list[int] = []
    k: list[int] = []
    emitted: list[int] = []
    for i, request in enumerate(emitting):
        if request.logprobs is not None:
            rows = [i, *(node + len(emitting) for node in acceptance.path[i])]
            receivers += [request.logprobs] * len(rows)
            visited += [at[row] for row in rows]
            k += [request.params.logprobs or 0] * len(rows)
            emitted += acceptance.emitted[i]
    if receivers:
        entries = model.logprobs(scores.logits, np.array(visited), emitted, k)
        for receiver, entry in zip(receivers, entries, strict=True):
            receiver.append(entry)


def _score_prompt(model: RowModel, request: Request, at: IntArray, scores: TargetScores) -> None:
    """Append log probabilities of the prompt's next tokens, from the rows `at` of the logits."""
    assert request.prompt_logprobs is not None
    known = len(request.prompt_logprobs)
    tokens = request.prompt[known : known + len(at)]
    k = [request.params.prompt_logprobs or 0] * len(at)
    request.prompt_logprobs += model.logprobs(scores.logits, at, tokens, k)


def _commit_keys(model: RowModel, acceptance: Acceptance, layout: RowLayout) -> None:
    """Move the keys of accepted nodes to the slots of their positions, behind the root's."""
    moves = [
        (layout.node_row[node], root + depth)
        for root, path in zip(layout.last, acceptance.path, strict=False)
        for depth, node in enumerate(path, start=1)
        if layout.node_row[node] != root + depth
    ]
    if moves:
        source, destination = zip(*moves, strict=True)
        slots = layout.rows.slot_mapping
        model.move(slots.take(source), slots.take(destination))


def _committed(
    requests: Sequence[Request],
    spans: Sequence[Span],
    acceptance: Acceptance,
    layout: RowLayout,
) -> list[Committed]:
    committed = []
    for i, (request, span, last) in enumerate(zip(requests, spans, layout.last, strict=True)):
        first = last + 1 - len(span.tokens)
        path = acceptance.path[i] if i < len(acceptance.path) else []
        nodes = [layout.node_row[node] for node in path]
        rows: slice | list[int] = slice(first, last + 1 + len(nodes))
        if nodes and nodes[-1] != last + len(nodes):  # rows of a path ascend
            rows = [*range(first, last + 1), *nodes]
        committed.append(Committed(request, span.start, len(span.tokens) + len(nodes), rows))
    return committed
