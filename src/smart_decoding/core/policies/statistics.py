"""Running figures about a policy's rounds, for metrics. They decide nothing."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from smart_decoding.core.batch import Round
    from smart_decoding.core.tree import DraftTrees, IntArray

KEEP = 1.0 - 1.0 / 256.0  # decay per round
FIGURES = (
    "rounds",
    "off",
    "tokens",
    "seconds",
    "plain_tokens",
    "plain_seconds",
    "accepted",
    "expected",
)


class Statistics:
    """Exponentially decayed sums over rounds.

    verified: rounds by batch size and shape: "plain", "chain" or "tree"."""

    def __init__(self) -> None:
        self.verified: Counter[tuple[int, str]] = Counter()
        self._sums = [0.0] * len(FIGURES)

    def record(self, round: Round, plain_seconds: float) -> None:
        """Count a round. plain_seconds: the predicted seconds of a plain round."""
        size = round.batch.size
        accepted = round.accepted
        figures = (
            1.0,
            round.rule is None,
            size + accepted,
            round.seconds,
            size,
            plain_seconds,
            accepted,
            round.expected,
        )
        self._sums = [KEEP * sum_ + new for sum_, new in zip(self._sums, figures, strict=True)]
        self.verified[size, shape_of(round.trees, round.kept)] += 1

    def summary(self) -> dict[str, float]:
        """Return estimated speedup over plain decoding, share of rounds without drafting, accepted
        over expected nodes - 1, and the numbers of rounds that verified chains and trees."""
        rounds, off, tokens, seconds, plain_tokens, plain_seconds, accepted, expected = self._sums
        speedup = 1.0
        if seconds > 0 and plain_seconds > 0:
            speedup = tokens / seconds / (plain_tokens / plain_seconds)
        kinds: Counter[str] = Counter()
        for (_, kind), count in list(self.verified.items()):  # a copy: other threads call this
            kinds[kind] += count
        return {
            "estimated_speedup": speedup,
            "share_off": off / rounds if rounds else 0.0,
            "calibration_error": accepted / expected - 1.0 if expected > 0 else 0.0,
            "chain_rounds": float(kinds["chain"]),
            "tree_rounds": float(kinds["tree"]),
        }


def shape_of(trees: DraftTrees, kept: IntArray) -> str:
    """Return the shape of a round: "plain" where no node is kept, "chain" where no request has two
    nodes of one depth, else "tree"."""
    if not len(kept):
        return "plain"
    places = set(zip(trees.owner[kept].tolist(), trees.depth[kept].tolist(), strict=True))
    return "tree" if len(places) < len(kept) else "chain"
