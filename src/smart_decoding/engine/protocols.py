"""What the engine needs of a model and of a drafter: it knows these protocols, not their
implementations.

`Features` are opaque to the engine: the target's hidden states after a drafter's `aux_layers`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    from smart_decoding.core.rule import TreeRule
    from smart_decoding.core.tree import Acceptance
    from smart_decoding.engine.drafting import Draft
    from smart_decoding.engine.request import Request
    from smart_decoding.engine.scheduler import Batch

Features: TypeAlias = Any
Clock: TypeAlias = Callable[[], float]


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
    """What came of a round.

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


class Target(Protocol):
    """The model that answers."""

    vocab: int
    max_positions: int
    eos_token_ids: tuple[int, ...]

    def verify(self, batch: Batch, draft: Draft, aux_layers: tuple[int, ...]) -> Verified:
        """Run a round: the batch's rows and the draft's nodes `kept`, for which there is memory;
        the target's tokens down the trees; and the keys of what was accepted, put into place."""

    def encode_image(self, pixels: Any) -> Any:
        """[length, hidden] the embeddings of a picture; of text models never called."""

    def forget_pictures(self) -> None:
        """`encode_image` computes all pictures anew; of text models never called."""


class Drafter(Protocol):
    """Whatever proposes tokens. has_model: whether a model of its own drafts, which costs
    something. free: whether a drafter without such costs proposes."""

    name: str
    has_model: bool
    free: bool
    aux_layers: tuple[int, ...]
    wants_ends: bool  # whether features of the round that ended an answer are wanted, too

    def pending_rows(self, requests: Sequence[Request]) -> int:
        """Return rows the first level must process for these requests."""

    def draft(
        self, requests: Sequence[Request], rule: TreeRule, interrupted: Callable[[], bool]
    ) -> Draft:
        """Propose a round's trees as `rule` says, and choose the nodes to verify.

        interrupted: whether a request has arrived for which the trees are to be dropped; asked
        where the drafting can stop."""

    def extend(
        self, request: Request, features: Features, first: int, tokens: Sequence[int]
    ) -> None:
        """The target processed `tokens` at the positions first, first + 1, ...; features: [tokens,
        ...] or None."""

    def extend_each(self, requests: Sequence[Request], features: Features) -> None:
        """The target processed one more token of each request, and that was all of the round: plain
        decoding, whose rounds must not pay for a drafter in backoff. features: [requests, ...] or
        None."""

    def release(self, request: Request) -> None:
        """The request ended or was preempted: forget it."""
