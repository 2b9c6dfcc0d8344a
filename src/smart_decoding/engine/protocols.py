"""Protocols of the target and of drafters, the only part of them that the engine knows.

`Features` are opaque to the engine: the target's hidden states after a drafter's `aux_layers`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from smart_decoding.core.rule import Draft
from smart_decoding.core.tree import DraftTrees

if TYPE_CHECKING:
    from smart_decoding.core.rule import TreeRule
    from smart_decoding.core.tree import Acceptance
    from smart_decoding.engine.request import Request
    from smart_decoding.engine.scheduler import Batch

Features: TypeAlias = Any
Clock: TypeAlias = Callable[[], float]


@dataclass(slots=True)
class Committed:
    """Newly committed positions of one request: `count` of them from `first` on.

    rows: the rows of their features. A slice where these are neighbours, as in the best chain: it
    saves a copy."""

    request: Request
    first: int
    count: int
    rows: slice | list[int]


@dataclass(slots=True)
class Verified:
    """Results of a round's verification.

    requests: the requests that get tokens: first the decoding ones, then the ones whose prompt
    ended. rows: number of the forward's rows. committed: of `requests` in order, then of prompts
    that go on. Seconds: of the forward, of drawing tokens, and of moving keys. experts: that the
    rows woke, in the mean of a mixture's layers."""

    requests: list[Request]
    acceptance: Acceptance
    rows: int
    features: Features
    committed: list[Committed]
    forward_seconds: float
    sample_seconds: float
    kv_seconds: float
    experts: float = 0.0


class Target(Protocol):
    """The model that answers. states: requests whose recurrent states it has room for, 0: it has
    none; snapshots: copies of states that it has room for beside them."""

    vocab: int
    max_positions: int
    eos_token_ids: tuple[int, ...]
    states: int
    snapshots: int

    def verify(self, batch: Batch, draft: Draft, aux_layers: tuple[int, ...]) -> Verified:
        """Run a round: forward the batch's rows and the draft's nodes `kept`, for which there is
        memory; draw the target's tokens down the trees; move accepted keys into place."""

    def copy_state(self, source: int, target: int, beyond: int = 0) -> None:
        """Copy a recurrent state from a place to another; never called on a model without any.
        beyond: rows of the last accepted path that the copy does not have."""

    def encode_image(self, pixels: Any) -> Any:
        """Return the embeddings [length, hidden] of a picture; never called on a text model."""

    def forget_pictures(self) -> None:
        """Make `encode_image` compute all pictures anew; never called on a text model."""


class Drafter(Protocol):
    """Proposes tokens. has_model: whether a model of its own drafts, which takes time. free:
    whether a drafter without a model proposes. resting_layers: read in place of `aux_layers` in
    rounds with prompts, while the model rarely drafts. needs_ends: whether `extend` gets the
    features of an ended answer's last round, too."""

    name: str
    has_model: bool
    free: bool
    aux_layers: tuple[int, ...]
    resting_layers: tuple[int, ...]
    needs_ends: bool

    def pending_rows(self, requests: Sequence[Request]) -> int:
        """Return the number of rows of the first level for these requests."""

    def draft(
        self, requests: Sequence[Request], rule: TreeRule, interrupted: Callable[[], bool]
    ) -> Draft:
        """Propose a round's trees as `rule` says, and choose the nodes to verify.

        interrupted: returns whether a request has arrived that needs the next round; called where
        drafting can stop. The trees are then dropped."""

    def extend(
        self, request: Request, features: Features, first: int, tokens: Sequence[int]
    ) -> None:
        """Take `tokens` that the target has processed at the positions first, first + 1, ...;
        features: [tokens, ...] or None."""

    def extend_each(self, requests: Sequence[Request], features: Features) -> None:
        """Take one more token of each request, after a plain round. It must cost next to nothing:
        rounds in backoff must not pay for a drafter. features: [requests, ...] or None."""

    def release(self, request: Request) -> None:
        """Forget a request that ended or was preempted."""


class NoDrafter:
    """Proposes nothing, and keeps no state: plain decoding."""

    name = "none"
    has_model = False
    free = False
    aux_layers: tuple[int, ...] = ()
    resting_layers: tuple[int, ...] = ()
    needs_ends = False

    def pending_rows(self, requests: Sequence[Request]) -> int:
        """Return 0: there is no model."""
        return 0

    def draft(
        self, requests: Sequence[Request], rule: TreeRule, interrupted: Callable[[], bool]
    ) -> Draft:
        """Return trees without nodes."""
        return Draft(DraftTrees.empty(len(requests)), rule)

    def extend(
        self, request: Request, features: Features, first: int, tokens: Sequence[int]
    ) -> None:
        """Do nothing: there is no state."""

    def extend_each(self, requests: Sequence[Request], features: Features) -> None:
        """Do nothing: there is no state."""

    def release(self, request: Request) -> None:
        """Do nothing: there is no state."""
