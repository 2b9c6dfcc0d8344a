"""Inputs and results of one native verification."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from smart_decoding.engine.history import specs_of
from smart_decoding.engine.protocols import Committed, Verified

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smart_decoding.core.rule import Draft
    from smart_decoding.core.tree import Acceptance, DraftTrees, IntArray
    from smart_decoding.engine.history import SampleSpec
    from smart_decoding.engine.request import Request
    from smart_decoding.engine.scheduler import Batch
    from smart_decoding.engine.verification import TargetScores


def draws_unchanged(batch: Batch) -> bool:
    """Return whether all decode, and draw from logits that nobody changes or reports."""
    return not batch.prefill and all(
        (r.takes_argmax or not r.params.changes_logits) and r.logprobs is None for r in batch.decode
    )


class NativeBatch(NamedTuple):
    """A round of decoding in which tokens are drawn from the logits as they come from the model.

    roots: each request's last token; lengths: its position; rotary: the same as rotary embeddings
    take it; tables: the addresses of the block tables, which have room for the nodes; kept: which
    of the trees' nodes are verified; aux_layers: as in Target.verify; specs: how the token after
    each root is drawn, or None where all requests take the first maximum; states: the places of
    recurrent states, empty where there are none."""

    roots: Sequence[int]
    lengths: Sequence[int]
    rotary: Sequence[int]
    tables: Sequence[int]
    trees: DraftTrees
    kept: IntArray
    aux_layers: tuple[int, ...]
    specs: Sequence[SampleSpec] | None = None
    states: Sequence[int] = ()

    @classmethod
    def of(
        cls, requests: Sequence[Request], draft: Draft, aux_layers: tuple[int, ...]
    ) -> NativeBatch:
        """Return the round of these requests and their draft."""
        greedy = all(r.takes_argmax for r in requests)
        lengths = [r.table.length for r in requests]
        return cls(
            [r.tokens[-1] for r in requests],
            lengths,
            # roots are tokens of answers, behind all pictures
            [
                n if r.media is None else n + r.media.shift
                for r, n in zip(requests, lengths, strict=True)
            ],
            [r.table.address for r in requests],
            draft.trees,
            draft.kept,
            aux_layers,
            None if greedy else specs_of(range(len(requests)), requests, draft.trees, ()),
            [r.table.state for r in requests],
        )


class NativeVerified(NamedTuple):
    """Result of one native verification.

    acceptance: None where the forward is all that was done, since rounding would decide a token.
    scores: of all rows; logits only where `specs` were given. first: the row of each request's root
    in the features, which those of its accepted nodes follow. Seconds: of the forward, of drawing
    tokens, of moving keys."""

    acceptance: Acceptance | None
    scores: TargetScores
    rows: int
    first: list[int]
    forward_seconds: float
    sample_seconds: float
    kv_seconds: float

    def verified(self, requests: list[Request]) -> Verified:
        """Return the same for the engine."""
        assert self.acceptance is not None
        committed = [
            Committed(request, request.table.length, 1 + len(path), slice(row, row + 1 + len(path)))
            for request, row, path in zip(requests, self.first, self.acceptance.path, strict=True)
        ]
        return Verified(
            requests,
            self.acceptance,
            self.rows,
            self.scores.features,
            committed,
            forward_seconds=self.forward_seconds,
            sample_seconds=self.sample_seconds,
            kv_seconds=self.kv_seconds,
            experts=self.scores.experts,
        )
