"""What the engine needs of a model and of a drafter: it knows these protocols, not their
implementations.

`Features` are opaque to the engine: the target's hidden states that a drafter asked for through
`aux_layers`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

if TYPE_CHECKING:
    from smart_decoding.core.rule import TreeRule
    from smart_decoding.core.tree import Acceptance, DraftTrees, IntArray
    from smart_decoding.engine.drafting import Draft
    from smart_decoding.engine.history import SampleSpec
    from smart_decoding.engine.kv import Ints
    from smart_decoding.engine.request import Request
    from smart_decoding.engine.rows import Rows

Features: TypeAlias = Any
Logits: TypeAlias = Any
Clock: TypeAlias = Callable[[], float]


@dataclass(slots=True)
class TargetScores:
    """logits: the wanted rows' [wanted, vocab], on the backend; features: all rows' aux hidden
    states, or None; greedy: what `argmax` says of the wanted rows, where the backend knows it
    anyway; draws_all: whether the forward goes on while its rows are drawn, all at once, which
    is the one wait for a device. Tokens of rows that are not visited may be -1."""

    logits: Logits
    features: Features
    greedy: IntArray | None = None
    draws_all: bool = False


class NativeBatch(NamedTuple):
    """A round of decoding in which the logits are drawn from as they come from the model.

    roots: each request's last token; lengths: its position; rotary: the same as rotary embeddings
    take it; tables: the addresses of the block tables, which have room for the nodes; kept: which
    of the trees' nodes are verified; aux_layers: as in Target.verify; specs: how the token after
    each root is drawn, or None where all requests take the first maximum."""

    roots: Sequence[int]
    lengths: Sequence[int]
    rotary: Sequence[int]
    tables: Sequence[int]
    trees: DraftTrees
    kept: IntArray
    aux_layers: tuple[int, ...]
    specs: Sequence[SampleSpec] | None = None


class NativeRound(NamedTuple):
    """What came of it.

    acceptance: None where the forward is all that was done, since rounding would decide a token.
    scores: of all rows; logits only where `specs` were given. first: the row of each request's root
    in the features, which those of its accepted nodes follow. Seconds: of the forward, of drawing
    tokens, of moving keys."""

    acceptance: Acceptance | None
    scores: TargetScores
    first: list[int]
    forward_seconds: float
    sample_seconds: float
    kv_seconds: float


# A whole round in one call: `verify`, `sample`, the walk down the trees, and `move` of what was
# accepted.
VerifyRound: TypeAlias = Callable[[NativeBatch], NativeRound]


class Target(Protocol):
    """The model whose output is wanted."""

    vocab: int
    max_positions: int
    eos_token_ids: tuple[int, ...]

    verify_round: VerifyRound | None

    def verify(self, rows: Rows, aux_layers: tuple[int, ...]) -> TargetScores:
        """Return one forward of the rows; their keys and values are written to their slots."""

    def sample(self, logits: Logits, which: IntArray, specs: Sequence[Any]) -> IntArray:
        """[which] the target's tokens at rows `which` of `logits`."""

    def argmax(self, logits: Logits, which: IntArray) -> IntArray:
        """[which] greedy tokens of the rows `which`, ties to the lowest id."""

    def logprobs(
        self, logits: Logits, which: IntArray, tokens: Sequence[int], k: Sequence[int]
    ) -> list[Any]:
        """Log probabilities of drawn tokens and of each row's k most likely ones."""

    def encode_image(self, pixels: Any) -> Any:
        """[length, hidden] the embeddings of a picture; of text models never called."""

    def forget_pictures(self) -> None:
        """`encode_image` computes all pictures anew; of text models never called."""

    def move(self, source: Ints, target: Ints) -> None:
        """Copy KV slots source[i] -> target[i], in order."""


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
