"""What a policy believed of its rounds and what they were, by kind; and what each request took.

Needed by `never-slower` and `ablate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from smart_decoding.core.policies.smart import Smart

if TYPE_CHECKING:
    from smart_decoding.core.batch import Round
    from smart_decoding.core.policies.base import Policy
    from smart_decoding.core.tree import FloatArray, IntArray

PLAIN, NGRAMS, MODEL, PROMPTS = "plain", "n-grams", "model", "with prompts"
# Which prompts an answer meets is luck, and the same for all policies in the mean.
ALL_ROUNDS, OWN = "all rounds", "rounds without prompts"
CLOSE = 0.05  # an estimate of the speedup so near is right
SLOW = 1.05  # times its plain time per token, that a request may take


def kind_of(round: Round) -> str:
    """Return the kind of a round, by what it drafted with."""
    if round.batch.prefill_rows:
        return PROMPTS
    if round.rule is None:
        return PLAIN
    return MODEL if round.level_widths else NGRAMS


def controller(policy: Policy) -> Smart | None:
    """Return the `smart` of a policy, which may be a variant of it; None for others."""
    inner = getattr(policy, "inner", policy)
    return inner if isinstance(inner, Smart) else None


def predicted_seconds(smart: Smart, round: Round) -> float:
    """Return what `smart` predicts of a round that it has not observed yet."""
    size, context = round.batch.size, round.batch.mean_context
    cost = smart.cost
    verify = float(cost.verify_seconds(size, round.verify_rows, context))
    levels = sum(cost.levels_seconds(size, round.level_widths, context))
    return verify + levels + smart.state.overhead.of(size, round.rule is not None)


class Figures:
    """Sums over the rounds of one policy."""

    def __init__(self, answers: int) -> None:
        # By kind: seconds predicted and real, tokens expected and real, rounds.
        self._sums: dict[str, FloatArray] = {}
        # [2, 2, answers]: seconds and tokens of the rounds in which each answer decoded, those with
        # prompts apart.
        self._taken = np.zeros((2, 2, answers))

    def add(
        self, policy: Policy, round: Round, answers: IntArray, emitted: IntArray, seconds: float
    ) -> None:
        """Count a round before the policy observes it. answers: its requests, which gained the
        tokens `emitted` in `seconds`."""
        taken = self._taken[int(round.batch.prefill_rows > 0)]
        taken[0, answers] += seconds
        taken[1, answers] += emitted
        smart, size = controller(policy), round.batch.size
        if smart is not None and size:
            predicted = predicted_seconds(smart, round)
            new = (predicted, round.seconds, size + round.expected, size + round.accepted, 1)
            self._sums[kind_of(round)] = self._sums.get(kind_of(round), 0.0) + np.array(new)

    def summary(self, policy: Policy) -> dict[str, Any]:
        """Return predicted over real seconds and expected over real tokens by kind of round, the
        policy's own estimate of its speedup, and each answer's seconds per token in ALL_ROUNDS, and
        in OWN ones. Policies other than `smart` believe nothing."""
        smart = controller(policy)
        return {
            "rounds": {kind: int(sums[4]) for kind, sums in self._sums.items()},
            "seconds": {kind: sums[0] / sums[1] for kind, sums in self._sums.items()},
            "tokens": {kind: sums[2] / sums[3] for kind, sums in self._sums.items()},
            "estimated_speedup": smart and smart.stats()["estimated_speedup"],
            "per_token": {
                name: (taken[0] / np.maximum(taken[1], 1)).tolist()
                for name, taken in ((ALL_ROUNDS, self._taken.sum(axis=0)), (OWN, self._taken[0]))
            },
        }


def slowdowns(found: Mapping[str, Any], plain: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return seconds per token over those of plain decoding in ALL_ROUNDS and in OWN ones, of the
    answers that both have decoded."""
    slower = {}
    for name in (ALL_ROUNDS, OWN):
        ours, plainly = (np.array(each["per_token"][name]) for each in (found, plain))
        both = (ours > 0) & (plainly > 0)
        slower[name] = (ours[both] / plainly[both]).tolist()
    return slower


def beliefs(rows: Sequence[tuple[Mapping[str, Any], float]]) -> str:
    """Return a table by kind of round, runs weighted by their rounds, and a line on the estimated
    speedup; nothing where nothing was believed. rows: summaries, each with the speedup that was
    real."""
    if any(found["estimated_speedup"] is None for found, _ in rows):
        return ""
    lines = [
        f"{'rounds':14}{'runs':>6}{'rounds':>9}{'seconds, predicted / real: 5 %':>32}{'mean':>8}"
        f"{'95 %':>8}{'tokens, expected / real: 5 %':>32}{'mean':>8}{'95 %':>8}"
    ]
    for kind in (PLAIN, NGRAMS, MODEL, PROMPTS):
        runs = [found for found, _ in rows if kind in found["rounds"]]
        if runs:
            counts = [found["rounds"][kind] for found in runs]
            seconds, tokens = (
                _spread([found[name][kind] for found in runs], counts)
                for name in ("seconds", "tokens")
            )
            line = f"{kind:14}{len(runs):>6}{sum(counts):>9}{seconds:>48}{tokens:>48}"
            lines.append(line)
    ratio = [found["estimated_speedup"] / real for found, real in rows]
    close = np.mean(np.abs(np.array(ratio) - 1) <= CLOSE)
    spread = _spread(ratio, [1] * len(ratio))
    lines.append(f"estimated / real speedup{spread:>38}, within {CLOSE:.0%}: {close:.2f}\n")
    return "\n".join(lines)


def _spread(ratios: Sequence[float], weights: Sequence[int]) -> str:
    each = np.repeat(ratios, weights)
    low, high = np.quantile(each, (0.05, 0.95))
    mean = np.exp(np.log(each).mean())
    return f"{low:.3f}{mean:>8.3f}{high:>8.3f}"


def requests(slower: Sequence[Mapping[str, Sequence[float]]]) -> str:
    """Return lines on single requests: of each run what `slowdowns` returns."""
    lines = []
    for name in (ALL_ROUNDS, OWN):
        each = np.concatenate([run[name] for run in slower])
        lines.append(
            f"requests, {name}: {(each <= SLOW).mean():.3f} take at most {SLOW} of their plain "
            f"time per token; 95 % {np.quantile(each, 0.95):.3f}, slowest {each.max():.2f}, "
            f"mean speedup {np.exp(-np.log(each).mean()):.3f}"
        )
    return "\n".join(lines)
