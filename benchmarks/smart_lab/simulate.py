"""Predicted speedups on other hardware: policies replayed at the costs of a profile or a data
sheet.

Needed by `simulate` and the tuning of `bench`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from smart_lab.replay import HostCosts, Replayed, replay
from smart_lab.sweep import Setting, Sweep

if TYPE_CHECKING:
    from smart_decoding.core.costs import CostModel
    from smart_lab.recording import Recording
    from smart_lab.trace import Trace

# Few settings of `eagle2` that are best somewhere; EAGLE-2's own is apart.
SETTINGS: Sequence[Setting] = [
    {"depth": depth, "top_k": top_k, "total_tokens": nodes + 1}
    for depth, top_k, nodes in (
        (0, 1, 1),
        (0, 3, 3),
        (1, 1, 2),
        (1, 3, 4),
        (1, 4, 8),
        (2, 1, 3),
        (2, 3, 5),
        (2, 4, 8),
        (3, 1, 4),
        (3, 4, 12),
        (4, 2, 8),
        (4, 6, 16),
        (6, 1, 7),
        (6, 6, 24),
        (6, 10, 40),
    )
]
EAGLE_2: Setting = {"depth": 7, "top_k": 10, "total_tokens": 60}
SMART, PAPER, EAGLE2 = "smart", "paper", "eagle2, EAGLE-2's size"
ROUNDS, LEAST_ROUNDS = 2400, 120  # of requests; of the batch
PAYS = 1.02  # smaller speedups are within the error of costs


@dataclass(frozen=True, slots=True)
class Prediction:
    """One batch size. plain: tokens per second without speculation; speedup: per policy; fixed: the
    best setting of `eagle2`; smart: counts of `smart`."""

    batch_size: int
    plain: float
    speedup: dict[str, float]
    fixed: Setting
    smart: Replayed

    @property
    def best(self) -> str:
        """The policy to use: `smart` unless another one is clearly better, `off` where none
        pays."""
        if max(self.speedup.values()) < PAYS:
            return "off"
        name = max(self.speedup, key=lambda policy: self.speedup[policy])
        return SMART if self.speedup[SMART] * 1.01 >= self.speedup[name] else name


@dataclass(slots=True)
class Simulation:
    """The simulated setting, in words, and a prediction for each batch size."""

    hardware: str
    model: str
    acceptance: str
    predictions: list[Prediction] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def crossing(self, policy: str) -> float | None:
        """Return the batch size at which a policy's speedup falls below 1, interpolated; None where
        it never does."""
        before: tuple[int, float] | None = None
        for prediction in self.predictions:
            value = prediction.speedup[policy]
            if value < 1.0:
                if before is None:
                    return float(prediction.batch_size)
                size, above = before
                return size + (prediction.batch_size - size) * (above - 1.0) / (above - value)
            before = (prediction.batch_size, value)
        return None

    def to_dict(self) -> dict[str, Any]:
        return {
            "simulated": True,
            "hardware": self.hardware,
            "model": self.model,
            "acceptance": self.acceptance,
            "notes": self.notes,
            "outlooks": [
                {
                    "batch_size": o.batch_size,
                    "plain_tokens_per_s": o.plain,
                    "speedup": o.speedup,
                    "use": o.best,
                    "fixed": o.fixed,
                    "smart_tokens_per_round": o.smart.tokens_per_round,
                    "smart_rows_per_round": o.smart.rows / o.smart.rounds,
                    "smart_off_share": o.smart.off / o.smart.rounds,
                }
                for o in self.predictions
            ],
        }


class Simulator:
    """Replays policies at batch sizes; trees that do not depend on them are drawn once."""

    def __init__(
        self,
        trace: Trace,
        cost: CostModel,
        host: HostCosts | None = None,
        tree: Setting | None = None,
    ) -> None:
        """tree: the setting of `eagle2` that stands for fixed trees of full size; EAGLE-2's by
        default. The published rule, which leaves the drafter as it is, is bound to its levels and
        children."""
        self.trace, self.cost, self.host, self.rounds = trace, cost, host, 0
        tree = tree or EAGLE_2
        self._paper = limits_of(tree)
        self._eagle = Sweep(trace.recording, [tree], trace.eos_token_ids)
        self._fixed = Sweep(trace.recording, SETTINGS, trace.eos_token_ids)

    def prediction(
        self, batch_size: int, on_policy: Callable[[str], object] = lambda name: None
    ) -> Prediction:
        """Return all policies at one batch size."""
        cost, host = self.cost, self.host
        recording = enough(self.trace.recording, batch_size)
        found = []
        for name in ("off", "smart", "paper"):
            on_policy(name)
            found.append(self.replayed(name, batch_size))
        plain = found[0].tokens_per_s
        _, smart, paper = found
        on_policy("eagle2")
        ((_, eagle),) = self._over(self._eagle, recording).rank(cost, batch_size, host)
        ranked = self._over(self._fixed, recording).rank(cost, batch_size, host)
        self.rounds += batch_size * sum(found.rounds for _, found in [*ranked, (EAGLE_2, eagle)])
        setting, fixed = ranked[0]
        speedup = {SMART: smart, PAPER: paper, EAGLE2: eagle, name_of(setting): fixed}
        rates = {name: result.tokens_per_s / plain for name, result in speedup.items()}
        return Prediction(batch_size, plain, rates, setting, smart)

    def replayed(self, name: str, batch_size: int, assumed: CostModel | None = None) -> Replayed:
        """Return one policy at one batch size. assumed: its costs, if not the real ones."""
        options = self._paper if name == "paper" else {}
        policy = self.trace.policy(name, assumed or self.cost, **options)
        recording = enough(self.trace.recording, batch_size)
        rounds = max(LEAST_ROUNDS, ROUNDS // batch_size)
        return self._counted(
            replay(policy, recording, self.cost, batch_size, self.host, rounds=rounds)
        )

    def _counted(self, found: Replayed) -> Replayed:
        self.rounds += found.rounds * found.batch_size  # of requests
        return found

    def _over(self, sweep: Sweep, recording: Recording) -> Sweep:
        return sweep if recording is self.trace.recording else sweep.repeated(recording)


def limits_of(tree: Setting) -> dict[str, int]:
    """Options of `paper` that bind it to the levels and children of a setting of `eagle2`."""
    return {"max_levels": tree["depth"] + 1, "children": tree["top_k"]}


def enough(recording: Recording, batch_size: int) -> Recording:
    """Return the recording, its answers used several times where a batch would soon run dry."""
    usable = sum(answer.positions > 0 for answer in recording.answers)
    times = -(-2 * batch_size // max(usable, 1))
    return recording if times <= 1 else recording.repeated(times)


def name_of(setting: Setting) -> str:
    """Return a setting in the form of `smart bench --policy-options`."""
    return "eagle2:" + ",".join(f"{name}={value}" for name, value in setting.items())
