"""Verification: a round's rows through the target, its tokens down the trees, and the keys of what
was accepted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from smart_decoding.core.acceptance import Acceptance, accept
from smart_decoding.core.tree import DraftTrees, IntArray
from smart_decoding.engine.kv import OutOfPages
from smart_decoding.engine.protocols import (
    Drafter,
    Features,
    GreedyBatch,
    Target,
    TargetScores,
    VerifyGreedy,
)
from smart_decoding.engine.request import Request
from smart_decoding.engine.rows import Rows, Span, build_rows
from smart_decoding.engine.scheduler import Batch
from smart_decoding.engine.specs import specs_of
from smart_decoding.errors import ModelError

Clock = Callable[[], float]


@dataclass(slots=True)
class Verified:
    """What came of it.

    requests: those that get tokens, the decoding ones first, then those whose prompt ended.
    committed: the rows of `features` that hold their committed tokens, and after them those of
    prompts that go on. Seconds: of the forward, of drawing tokens, of moving keys, and of all of
    it."""

    requests: list[Request]
    acceptance: Acceptance
    rows: int
    features: Features
    committed: list[slice | list[int]]
    forward_seconds: float
    sample_seconds: float
    kv_seconds: float
    seconds: float


def make_room(batch: Batch, trees: DraftTrees, kept: IntArray) -> IntArray:
    """Reserves KV memory for the nodes `kept`; where it is short a request's nodes yield. Returns
    those left."""
    if not len(kept):
        return kept
    for i, count in enumerate(np.bincount(trees.owner[kept], minlength=len(batch.decode)).tolist()):
        try:
            batch.decode[i].table.cover(1 + count)
        except OutOfPages:
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
    aux_layers, sees_logits = (
        (drafter.aux_layers, drafter.wants_logits) if drafter is not None else ((), False)
    )
    if (
        target.verify_greedy is not None
        and not (batch.prefill or sees_logits)
        and all(map(_is_plain, batch.decode))
    ):
        return _in_one_call(target.verify_greedy, aux_layers, batch.decode, trees, kept, clock)
    spans, asking = _spans(batch, trees, kept)
    nodes = trees.take(kept, len(asking)) if len(trees) else DraftTrees.empty(len(asking))
    rows, last, node_row = build_rows(spans, nodes, [i < len(asking) for i in range(len(spans))])
    start = clock()
    scores = target.verify(rows, aux_layers)
    verified = clock()
    if drafter is not None and sees_logits:
        seen = rows.token if rows.logit_rows is None else rows.token[rows.logit_rows]
        drafter.observe_logits(seen, scores.logits)
    sample_start = clock()
    # Row numbers of accept() -> rows of the logits.
    at = (
        list(range(len(asking) + len(nodes)))
        if rows.logit_rows is not None
        else last[: len(asking)] + node_row
    )
    acceptance = _accept(target, asking, nodes, at, scores)
    sampled = clock()
    if len(nodes):
        _commit_keys(target, acceptance, rows, last, node_row)
    moved = clock()
    committed = _committed(spans, acceptance, last, node_row)
    return Verified(
        asking,
        acceptance,
        len(rows),
        scores.features,
        committed,
        verified - start,
        sampled - sample_start,
        moved - sampled,
        sampled - start,
    )


def _is_plain(request: Request) -> bool:
    """Is it answered by the first maxima of logits that nobody else wants to see?"""
    return request.takes_argmax and request.logprobs is None and request.media is None


def _in_one_call(
    verify_greedy: VerifyGreedy,
    aux_layers: tuple[int, ...],
    requests: list[Request],
    trees: DraftTrees,
    kept: IntArray,
    clock: Clock,
) -> Verified:
    start = clock()
    roots, lengths = [r.tokens[-1] for r in requests], [r.table.length for r in requests]
    done = verify_greedy(
        GreedyBatch(roots, lengths, [r.table.address for r in requests], trees, kept, aux_layers)
    )
    paths = done.acceptance.path
    committed: list[slice | list[int]] = [
        slice(row, row + 1 + len(path)) for row, path in zip(done.first, paths, strict=True)
    ]
    rows, forward = len(requests) + len(kept), done.forward_seconds
    seconds = clock() - start
    return Verified(
        requests,
        done.acceptance,
        rows,
        done.features,
        committed,
        forward,
        0.0,
        done.kv_seconds,
        seconds,
    )


def _spans(batch: Batch, trees: DraftTrees, kept: IntArray) -> tuple[list[Span], list[Request]]:
    """Committed tokens of the round, requests that get a token first."""
    counts = [0] * len(batch.decode)
    if len(kept):
        counts = np.bincount(trees.owner[kept], minlength=len(batch.decode)).tolist()
    spans = [
        _span(request, 1, 1 + count) for request, count in zip(batch.decode, counts, strict=True)
    ]
    ending = [(r, n) for r, n in batch.prefill if n == r.pending]
    unfinished = [(r, n) for r, n in batch.prefill if n < r.pending]
    spans += [_span(request, count, count) for request, count in ending + unfinished]
    return spans, batch.decode + [request for request, _ in ending]


def _span(request: Request, count: int, slots: int) -> Span:
    start = request.table.length
    span = Span(
        request.tokens[start : start + count],
        start,
        request.table.reserve(slots),
        request.table.array,
    )
    if request.media is not None:
        span.mm_embeds, span.rotary = (
            request.media.mm_embeds(start, count),
            request.media.positions(start, count),
        )
    return span


def _accept(
    target: Target,
    asking: list[Request],
    nodes: DraftTrees,
    at: Sequence[int],
    scores: TargetScores,
) -> Acceptance:
    """Draws the target's tokens down the trees. at: row of the logits of each root, then of each
    node."""
    if all(r.takes_argmax for r in asking):
        greedy = (
            target.argmax(scores.logits, np.array(at))
            if scores.greedy is None
            else scores.greedy[at]
        )
        tokens = greedy.tolist()
        acceptance = accept(nodes, lambda wanted: _finite([tokens[row] for row in wanted]))
    else:
        eos = target.eos_token_ids
        acceptance = accept(
            nodes,
            lambda wanted: target.sample(
                scores.logits,
                np.array([at[row] for row in wanted]),
                specs_of(wanted, asking, nodes, eos),
            ),
        )
    for i, request in enumerate(asking):
        if request.logprobs is not None:
            which = np.array(
                [at[row] for row in (i, *(node + len(asking) for node in acceptance.path[i]))]
            )
            k = request.params.logprobs or 0
            request.logprobs += target.logprobs(scores.logits, which, acceptance.emitted[i], k)
    return acceptance


def _finite(tokens: list[int]) -> list[int]:
    """The same tokens. Raises ModelError for one of a row without a maximum; rows that the walk
    leaves out may be."""
    require_finite(min(tokens, default=0) >= 0)
    return tokens


def require_finite(finite: ArrayLike) -> None:
    """Raises ModelError unless all the rows' maxima are: `finite` says so of each."""
    if not np.all(finite):
        raise ModelError(
            "the model's logits are NaN or infinite: check the weights, or use dtype float32"
        )


def _commit_keys(
    target: Target, acceptance: Acceptance, rows: Rows, last: list[int], node_row: list[int]
) -> None:
    """Moves accepted nodes' keys to their final positions, which follow the root's in the reserved
    slots."""
    moves = [
        (node_row[node], last[i] + depth)
        for i, path in enumerate(acceptance.path)
        for depth, node in enumerate(path, start=1)
        if node_row[node] != last[i] + depth
    ]
    if moves:
        source, destination = zip(*moves, strict=True)
        target.move(rows.slot_mapping.take(source), rows.slot_mapping.take(destination))


def _committed(
    spans: Sequence[Span], acceptance: Acceptance, last: Sequence[int], node_row: Sequence[int]
) -> list[slice | list[int]]:
    """The rows of each span, and of the nodes accepted below it: a slice where they are neighbours,
    as in the best chain, which saves a copy of their features."""
    committed: list[slice | list[int]] = []
    for i, span in enumerate(spans):
        first, end = last[i] + 1 - len(span.tokens), last[i] + 1
        nodes = [node_row[node] for node in acceptance.path[i]] if i < len(acceptance.path) else []
        if nodes and nodes[-1] != end + len(nodes) - 1:  # rows of a path ascend
            committed.append([*range(first, end), *nodes])
        else:
            committed.append(slice(first, end + len(nodes)))
    return committed
