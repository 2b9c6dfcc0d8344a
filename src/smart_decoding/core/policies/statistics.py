"""Running figures about a policy's rounds, for metrics. They decide nothing."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smart_decoding.core.batch import Round
    from smart_decoding.core.tree import DraftTrees, IntArray

KEEP = 1.0 - 1.0 / 256.0  # decay per round
FIGURES = ("rounds", "off", "seconds", "in plain", "at most", "accepted", "expected")
SUMS = ("predicted seconds", "real seconds", "expected tokens", "real tokens")
KINDS = ("plain", "ngrams", "model", "prompts")  # of rounds


class Statistics:
    """Exponentially decayed sums over rounds.

    verified: rounds by batch size and shape: "plain", "chain" or "tree". kinds: KINDS -> predicted
    and real seconds, expected and real tokens, of the rounds of a kind."""

    def __init__(self) -> None:
        self.verified: Counter[tuple[int, str]] = Counter()
        self.kinds = {kind: [0.0] * len(SUMS) for kind in KINDS}
        self._rounds = [0.0] * len(FIGURES)

    def record(self, round: Round, predicted_seconds: float | None, plain_seconds: float) -> None:
        """Count a round. predicted_seconds: of the round, or None if nothing predicted it;
        plain_seconds: of a plain round in its place."""
        size = round.batch.size
        accepted = round.accepted
        seconds = round.seconds
        tokens = size + accepted
        # Plain decoding would have needed tokens / size rounds, none of them longer than this one.
        rounds = tokens / size if size else 0.0
        plain = (plain_seconds * rounds, seconds * rounds)
        figures = (1.0, round.rule is None, seconds, *plain, accepted, round.expected)
        self._rounds = _faded(self._rounds, figures)
        if predicted_seconds is not None:
            kind = kind_of(round)
            sums = (predicted_seconds, seconds, size + round.expected, tokens)
            self.kinds[kind] = _faded(self.kinds[kind], sums)
        self.verified[size, shape_of(round.trees, round.kept)] += 1

    def summary(self) -> dict[str, float]:
        """Return estimated speedup over plain decoding, share of rounds without drafting, accepted
        over expected nodes - 1, and the numbers of rounds that verified chains and trees; and of
        each kind of rounds predicted over real seconds, and expected over real tokens."""
        rounds, off, seconds, in_plain, at_most, accepted, expected = self._rounds
        in_plain = min(in_plain, at_most)
        shapes: Counter[str] = Counter()
        for (_, shape), count in list(self.verified.items()):  # a copy: other threads call this
            shapes[shape] += count
        found = {
            "estimated_speedup": in_plain / seconds if seconds > 0 and in_plain > 0 else 1.0,
            "share_off": off / rounds if rounds else 0.0,
            "calibration_error": accepted / expected - 1.0 if expected > 0 else 0.0,
            "chain_rounds": float(shapes["chain"]),
            "tree_rounds": float(shapes["tree"]),
        }
        for kind, sums in self.kinds.items():
            predicted, real, of_tokens, tokens = sums
            if real > 0 and tokens > 0:
                found[f"{kind}_predicted_seconds"] = predicted / real
                found[f"{kind}_expected_tokens"] = of_tokens / tokens
        return found


def _faded(sums: Sequence[float], new: Sequence[float]) -> list[float]:
    """Return the sums with the figures of one more round. Lists: an array takes longer."""
    return [KEEP * old + value for old, value in zip(sums, new, strict=True)]


def kind_of(round: Round) -> str:
    """Return the kind of a round: what drafted, or whose prompts are in it."""
    if round.batch.prefill_rows:
        return "prompts"
    if round.rule is None:
        return "plain"
    return "model" if round.level_widths else "ngrams"


def shape_of(trees: DraftTrees, kept: IntArray) -> str:
    """Return the shape of a round: "plain" where no node is kept, "chain" where no request has two
    nodes of one depth, else "tree"."""
    if not len(kept):
        return "plain"
    places = set(zip(trees.owner[kept].tolist(), trees.depth[kept].tolist(), strict=True))
    return "tree" if len(places) < len(kept) else "chain"
