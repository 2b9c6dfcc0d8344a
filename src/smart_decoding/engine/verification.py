"""Verification: a round's rows through the target, its tokens down the trees, and the keys of what
was accepted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from smart_decoding.core.tree import Acceptance, DraftTrees, IntArray, accept
from smart_decoding.engine.history import specs_of
from smart_decoding.engine.kv import OutOfPagesError
from smart_decoding.engine.protocols import (
    Clock,
    Drafter,
    Features,
    NativeBatch,
    Target,
    TargetScores,
    VerifyRound,
)
from smart_decoding.engine.rows import RowLayout, Span, build_rows
from smart_decoding.errors import require_finite

if TYPE_CHECKING:
    from smart_decoding.engine.request import Request
    from smart_decoding.engine.scheduler import Batch


@dataclass(slots=True)
class Committed:
    """What the target has now computed for good: `count` positions of a request from `first` on.

    rows: where their features are. A slice where they are neighbours, as in the best chain, which
    saves a copy."""

    request: Request
    first: int
    count: int
    rows: slice | list[int]


@dataclass(slots=True)
class Verified:
    """What came of it.

    requests: those that get tokens, the decoding ones first, then those whose prompt ended.
    rows: of the forward. committed: of `requests` in order, then of prompts that go on. Seconds: of
    the forward, of drawing tokens, of moving keys, and of forward and drawing together."""

    requests: list[Request]
    acceptance: Acceptance
    rows: int
    features: Features
    committed: list[Committed]
    forward_seconds: float
    sample_seconds: float
    kv_seconds: float
    seconds: float


def make_room(batch: Batch, trees: DraftTrees, kept: IntArray) -> IntArray:
    """Reserve KV memory for the nodes `kept`; where it is short a request's nodes yield. Returns
    those left."""
    if not len(kept):
        return kept
    for i, count in enumerate(trees.counts(kept)):
        try:
            batch.decode[i].table.cover(1 + count)
        except OutOfPagesError:
            kept = kept[trees.owner[kept] != i]
    return kept


def verify(
    target: Target,
    drafter: Drafter | None,
    batch: Batch,
    trees: DraftTrees,
    kept: IntArray,
    clock: Clock,
) -> Verified:
    """Runs the batch's rows and the nodes `kept`, for which there is memory."""
    aux_layers = drafter.aux_layers if drafter is not None else ()
    if target.verify_round is not None and _is_plain(batch):
        return _in_one_call(target, target.verify_round, aux_layers, batch, trees, kept, clock)
    laid_out = _lay_out(batch, trees, kept)
    start = clock()
    scores = target.verify(laid_out.layout.rows, aux_layers)
    forward_seconds = clock() - start
    return _settle(target, laid_out, scores, start, forward_seconds, clock)


def _is_plain(batch: Batch) -> bool:
    """Return whether all decode, and draw from logits that nobody changes and nobody else wants."""
    return not batch.prefill and all(
        (r.takes_argmax or not r.params.changes_logits) and r.logprobs is None for r in batch.decode
    )


def _in_one_call(
    target: Target,
    verify_round: VerifyRound,
    aux_layers: tuple[int, ...],
    batch: Batch,
    trees: DraftTrees,
    kept: IntArray,
    clock: Clock,
) -> Verified:
    """Return the native round; where rounding would decide a token, the reference goes on from its
    logits."""
    start = clock()
    requests = batch.decode
    done = verify_round(_native_batch(requests, trees, kept, aux_layers))
    acceptance = done.acceptance
    if acceptance is None:
        laid_out = _lay_out(batch, trees, kept)
        return _settle(target, laid_out, done.scores, start, done.forward_seconds, clock)
    committed = [
        Committed(request, request.table.length, 1 + len(path), slice(row, row + 1 + len(path)))
        for request, row, path in zip(requests, done.first, acceptance.path, strict=True)
    ]
    return Verified(
        requests,
        acceptance,
        len(requests) + len(kept),
        done.scores.features,
        committed,
        forward_seconds=done.forward_seconds,
        sample_seconds=done.sample_seconds,
        kv_seconds=done.kv_seconds,
        seconds=clock() - start - done.kv_seconds,
    )


def _native_batch(
    requests: list[Request], trees: DraftTrees, kept: IntArray, aux_layers: tuple[int, ...]
) -> NativeBatch:
    greedy = all(r.takes_argmax for r in requests)
    lengths = [r.table.length for r in requests]
    return NativeBatch(
        [r.tokens[-1] for r in requests],
        lengths,
        # roots are tokens of answers, behind all pictures
        [
            n if r.media is None else n + r.media.shift
            for r, n in zip(requests, lengths, strict=True)
        ],
        [r.table.address for r in requests],
        trees,
        kept,
        aux_layers,
        None if greedy else specs_of(range(len(requests)), requests, trees, ()),
    )


@dataclass(slots=True)
class _LaidOut:
    """A round's rows. spans: committed tokens, those of the requests that get a token first, who
    are `asking`; others have prompts that go on. nodes: those to verify. scored: requests whose
    prompts have log probabilities to come, each with the rows of the logits that give them."""

    spans: list[Span]
    asking: list[Request]
    going_on: list[Request]
    nodes: DraftTrees
    layout: RowLayout
    scored: list[tuple[Request, list[int]]]


def _lay_out(batch: Batch, trees: DraftTrees, kept: IntArray) -> _LaidOut:
    ending = [(r, n) for r, n in batch.prefill if n == r.pending]
    unfinished = [(r, n) for r, n in batch.prefill if n < r.pending]
    counts = trees.counts(kept)
    spans = [_span(r, 1, 1 + count) for r, count in zip(batch.decode, counts, strict=True)]
    spans += [_span(r, n, n) for r, n in ending + unfinished]
    asking = batch.decode + [r for r, _ in ending]
    going_on = [r for r, _ in unfinished]
    nodes = trees.take(kept, len(asking)) if len(trees) else DraftTrees.empty(len(asking))
    layout = build_rows(spans, nodes, [i < len(asking) for i in range(len(spans))])
    scored = _prompt_rows([*asking, *going_on], spans, layout)
    return _LaidOut(spans, asking, going_on, nodes, layout, scored)


def _prompt_rows(
    requests: Sequence[Request], spans: Sequence[Span], layout: RowLayout
) -> list[tuple[Request, list[int]]]:
    """`scored` of _LaidOut. The logits of these rows come behind all others."""
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


def _settle(
    target: Target,
    what: _LaidOut,
    scores: TargetScores,
    start: float,
    forward_seconds: float,
    clock: Clock,
) -> Verified:
    """Draw tokens down the trees, and move the keys of what was accepted. start: when the round's
    verification began."""
    sample_start = clock()
    acceptance = _accept(target, what.asking, what.nodes, what.layout, scores)
    for request, at in what.scored:
        _score_prompt(target, request, np.array(at, np.int64), scores)
    sampled = clock()
    if len(what.nodes):
        _commit_keys(target, acceptance, what.layout)
    moved = clock()
    if scores.draws_all:  # the wait for the tokens was that for the forward
        forward_seconds += sampled - sample_start
        sample_start = sampled
    requests = what.asking + what.going_on
    return Verified(
        what.asking,
        acceptance,
        len(what.layout.rows),
        scores.features,
        _committed(requests, what.spans, acceptance, what.layout),
        forward_seconds=forward_seconds,
        sample_seconds=sampled - sample_start,
        kv_seconds=moved - sampled,
        seconds=sampled - start,
    )


def _span(request: Request, count: int, slots: int) -> Span:
    start = request.table.length
    tokens = request.tokens[start : start + count]
    span = Span(tokens, start, request.table.reserve(slots), request.table.array)
    if request.media is not None:
        span.mm_embeds = request.media.mm_embeds(start, count)
        span.rotary = request.media.positions(start, count)
    return span


def _logit_rows(layout: RowLayout, nodes: DraftTrees) -> list[int]:
    """Return the row of the logits of each root, then of each node: the numbering of `accept`."""
    if layout.rows.logit_rows is not None:
        return list(range(nodes.batch + len(nodes)))
    return layout.last[: nodes.batch] + layout.node_row


def _accept(
    target: Target,
    asking: list[Request],
    nodes: DraftTrees,
    layout: RowLayout,
    scores: TargetScores,
) -> Acceptance:
    """Draw the target's tokens down the trees."""
    at = _logit_rows(layout, nodes)

    def draw(wanted: Sequence[int]) -> list[int]:
        which = np.array([at[row] for row in wanted])
        specs = specs_of(wanted, asking, nodes, target.eos_token_ids)
        drawn: list[int] = target.sample(scores.logits, which, specs).tolist()
        return drawn

    tokens: list[int] | None = None  # of all rows, where they are known at once
    if not all(r.takes_argmax for r in asking):
        tokens = draw(range(len(at))) if scores.draws_all else None
    elif scores.greedy is None:
        tokens = target.argmax(scores.logits, np.array(at)).tolist()
    else:
        tokens = scores.greedy[at].tolist()

    def take(wanted: Sequence[int]) -> list[int]:
        found = draw(wanted) if tokens is None else [tokens[row] for row in wanted]
        require_finite(min(found, default=0) >= 0)  # of rows that the walk leaves out, some may be
        return found

    acceptance = accept(nodes, take)
    _add_logprobs(target, asking, at, acceptance, scores)
    return acceptance


def _add_logprobs(
    target: Target,
    asking: list[Request],
    at: list[int],
    acceptance: Acceptance,
    scores: TargetScores,
) -> None:
    """Log probabilities for the requests that want them: at once, which is one wait for a
    device."""
    receivers: list[list[Any]] = []
    visited: list[int] = []
    k: list[int] = []
    emitted: list[int] = []
    for i, request in enumerate(asking):
        if request.logprobs is not None:
            rows = [i, *(node + len(asking) for node in acceptance.path[i])]
            receivers += [request.logprobs] * len(rows)
            visited += [at[row] for row in rows]
            k += [request.params.logprobs or 0] * len(rows)
            emitted += acceptance.emitted[i]
    if receivers:
        entries = target.logprobs(scores.logits, np.array(visited), emitted, k)
        for receiver, entry in zip(receivers, entries, strict=True):
            receiver.append(entry)


def _score_prompt(target: Target, request: Request, at: IntArray, scores: TargetScores) -> None:
    """Log probabilities of the prompt's next tokens, from the rows `at` of the logits."""
    assert request.prompt_logprobs is not None
    known = len(request.prompt_logprobs)
    tokens = request.prompt[known : known + len(at)]
    k = [request.params.prompt_logprobs or 0] * len(at)
    request.prompt_logprobs += target.logprobs(scores.logits, at, tokens, k)


def _commit_keys(target: Target, acceptance: Acceptance, layout: RowLayout) -> None:
    """Move accepted nodes' keys to their final positions, which follow the root's in the reserved
    slots."""
    moves = [
        (layout.node_row[node], root + depth)
        for root, path in zip(layout.last, acceptance.path, strict=False)
        for depth, node in enumerate(path, start=1)
        if layout.node_row[node] != root + depth
    ]
    if moves:
        source, destination = zip(*moves, strict=True)
        slots = layout.rows.slot_mapping
        target.move(slots.take(source), slots.take(destination))


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
