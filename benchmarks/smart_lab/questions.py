"""Questions that replay answers: how far every policy is from oracle and why, and what each
ingredient gives.

Everything is a speedup over plain decoding at the same costs, on recorded answers; nothing runs
live.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from smart_lab.ablations import (
    ABLATIONS,
    CHEAP,
    Foreseeing,
    FrozenCosts,
    askew,
    fitted,
    flat,
    smart,
)
from smart_lab.oracle import oracle
from smart_lab.replay import HostCosts, Replayed, replay
from smart_lab.simulate import EAGLE_2, enough, name_of
from smart_lab.sweep import Sweep, likelihood_settings

if TYPE_CHECKING:
    from smart_decoding.core.cost import CostModel
    from smart_decoding.core.policies.base import Policy
    from smart_lab.recording import Recording
    from smart_lab.trace import Trace

SHORT = likelihood_settings(range(5), (1, 2, 3, 4, 5, 6, 8, 12, 16))
BUDGETS, ALPHAS = (2, 4, 8, 16, 32), (1.0, 0.8, 0.5)  # nodes per request
LONG = 1500  # tokens of context
FORESEEN = 1000  # rounds of requests: trying all levels beforehand is slow


class Bench:
    """One recording at one batch size."""

    def __init__(self, trace: Trace, cost: CostModel, host: HostCosts, size: int) -> None:
        self.trace, self.cost, self.host, self.size = trace, cost, host, size
        self.recording = enough(trace.recording, size)
        self.plain = self.run(trace.policy("off")).tokens_per_s

    def run(
        self, policy: Policy, recording: Recording | None = None, rounds: int | None = None
    ) -> Replayed:
        return replay(
            policy, recording or self.recording, self.cost, self.size, self.host, rounds=rounds
        )

    def speedup(self, policy: Policy, recording: Recording | None = None) -> float:
        if recording is None:
            return self.run(policy).tokens_per_s / self.plain
        plain = self.run(self.trace.policy("off"), recording).tokens_per_s
        return self.run(policy, recording).tokens_per_s / plain


def gap(bench: Bench, stale: CostModel, sweep: Sweep) -> dict[str, Any]:
    """Question 2 at one batch size: policies, steps of knowledge, oracle, all over plain
    decoding."""
    trace, cost = bench.trace, bench.cost
    ranked = sweep.repeated(bench.recording).rank(cost, bench.size, bench.host)
    best = oracle(bench.recording, cost, bench.size, bench.host)
    rounds = max(100, FORESEEN // bench.size)
    extra = bench.host.seconds(bench.size, True) - bench.host.seconds(bench.size, False)
    known = replace(cost, overhead_seconds=extra)  # what the others learn
    knowing = [
        smart(trace, known, fitted(trace.recording)) for _ in range(3)
    ]  # each policy gets its own
    fits = bench.speedup(knowing[0])
    few, foreseen = (
        bench.run(policy, rounds=rounds).tokens_per_s
        for policy in (knowing[1], Foreseeing(knowing[2], trace.eos_token_ids))
    )
    return {
        "eagle2, EAGLE-2's size": bench.speedup(trace.policy("eagle2", None, **EAGLE_2)),
        "best fixed": ranked[0][1].tokens_per_s / bench.plain,
        "best fixed is": name_of(ranked[0][0]),
        "paper": bench.speedup(trace.policy("paper", cost)),
        "smart from a wrong profile": bench.speedup(smart(trace, stale)),
        "smart": bench.speedup(smart(trace, cost)),
        "+ calibration fitted to these answers": fits,
        "+ deeper levels foreseen": fits * foreseen / few,
        "oracle, a plan": best.reached / bench.plain,
        "oracle, bound": best.bound / bench.plain,
    }


def ablation(bench: Bench, stale: CostModel) -> dict[str, Any]:
    """Question 3 at one batch size."""
    trace, cost = bench.trace, bench.cost
    rows = {name: bench.speedup(make(trace, cost)) for name, make in ABLATIONS.items()}
    rows["a wrong profile, corrected"] = bench.speedup(smart(trace, stale))
    rows["a wrong profile, no correction"] = bench.speedup(FrozenCosts(smart(trace, stale)))
    long = bench.recording.at_context(LONG)
    rows[f"at {LONG} tokens of context"] = bench.speedup(smart(trace, cost), long)
    rows[f"at {LONG} tokens, no context in the cost"] = bench.speedup(
        FrozenCosts(smart(trace, flat(cost))), long
    )
    return rows


def paper(bench: Bench) -> list[dict[str, Any]]:
    """The published rule over alpha, budget, cost family and length, the fastest first."""
    rounds = max(40, 500 // bench.size)
    plain = bench.run(bench.trace.policy("off"), rounds=rounds).tokens_per_s
    rows = []
    for family in ("published", "offset"):
        for l_tree in ("published", "node_sum"):
            for alpha in ALPHAS:
                for each in BUDGETS:
                    given = {
                        "alpha": alpha,
                        "budget": each * bench.size,
                        "family": family,
                        "l_tree": l_tree,
                    }
                    found = bench.run(
                        bench.trace.policy("paper", bench.cost, **given), rounds=rounds
                    )
                    rows.append({**given, "speedup": found.tokens_per_s / plain})
    return sorted(rows, key=lambda row: -row["speedup"])


class Asker:
    """One recording, asked at batch size after batch size."""

    def __init__(self, trace: Trace, answers: int = 24) -> None:
        assert trace.cost is not None
        some = trace.recording.take(range(min(answers, len(trace.recording.answers))))
        self.trace = replace(trace, recording=some)
        self.cost, self.host = trace.cost, trace.host or HostCosts.of(trace.cost)
        self.stale = askew(trace.cost, *CHEAP)
        self.sweep = Sweep(some, SHORT, trace.eos_token_ids)

    def answers(self, size: int) -> dict[str, Any]:
        """{'gap': …, 'ablations': …, 'paper': the sweep's best, the default's neighbour and the
        worst}."""
        bench = Bench(self.trace, self.cost, self.host, size)
        rows = paper(bench)
        near = next(
            r
            for r in rows
            if (r["alpha"], r["family"], r["l_tree"]) == (0.8, "published", "published")
        )
        return {
            "gap": gap(bench, self.stale, self.sweep),
            "ablations": ablation(bench, self.stale),
            "paper": [rows[0], near, rows[-1]],
            "settings": len(SHORT),
        }
