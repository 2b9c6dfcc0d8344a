"""Why the published rule is not simulated as published: one assumption exchanged at a time.

MSD with the rule on L40S, beside the published speedups. Each line is scaled so that MSD's own tree
has its published speedup at batch 1, by which the level of acceptance was chosen: what is left is
what the rule makes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from smart_decoding.core.policies.eagle2 import Eagle2
from smart_decoding.core.policies.off import Off
from smart_lab.hardware import card, dimensions, roofline
from smart_lab.replay import replay
from smart_lab.simulate import limits_of
from smart_lab.sweep import Fixed, add_up
from smart_lab.synthetic import SPREAD, synthetic
from smart_lab.trace import Trace

if TYPE_CHECKING:
    from smart_decoding.core.cost import CostModel
    from smart_lab.recording import Recording

L40S = "l40s"
ANSWERS = 48  # drawn; twice as many as elsewhere, against noise


@dataclass(frozen=True)
class Assumptions:
    """paper: options of the policy. sheet: fields of the card. spread: of the drawn confidences;
    seed: of what is drawn. eager: kernels are launched from Python."""

    name: str
    paper: Mapping[str, Any] = field(default_factory=dict)
    sheet: Mapping[str, float] = field(default_factory=dict)
    spread: float = SPREAD
    seed: int = 0
    eager: bool = True

    @property
    def cost(self) -> CostModel:
        """Of the model on the card."""
        sheet: dict[str, Any] = dict(self.sheet)
        return roofline(replace(card(L40S, self.eager), **sheet), dimensions("vicuna-7b"))


VARIANTS: Sequence[Assumptions] = (
    Assumptions("as documented"),
    Assumptions("the same, other draws", seed=1),
    Assumptions("8 levels, 8 children", {"max_levels": 8, "children": 8}),
    Assumptions("5 levels", {"max_levels": 5}),
    Assumptions("costs with offsets", {"family": "offset"}),
    Assumptions("L_tree a node sum", {"l_tree": "node_sum"}),
    Assumptions("the same, other draws", {"l_tree": "node_sum"}, seed=1),
    Assumptions("alpha 1", {"alpha": 1.0}),
    Assumptions("budget 100", {"budget": 100}),
    Assumptions("budget 400", {"budget": 400}),
    Assumptions("CUDA graphs", eager=False),
    Assumptions("a level's host time halved", sheet={"level_seconds": 450e-6}),
    Assumptions("no host time of a round", sheet={"round_seconds": 0.0}),
    Assumptions("0.4 of the arithmetic peak", sheet={"efficiency": 0.4}),
    Assumptions("confidences 1.5 times as far apart", spread=1.5 * SPREAD),
    Assumptions("confidences twice as far apart", spread=2 * SPREAD),
)


def table(level: Mapping[str, Any], on_line: Callable[[str], object]) -> None:
    """A line for each variant, with the difference from the published speedups."""
    published = {int(size): value for size, value in level["published"][L40S]["smart"].items()}
    on_line(
        "SIMULATED: MSD with the published rule on L40S, and the difference from what is published"
    )
    heads = (f"batch {size}: {value:.2f}".rjust(18) for size, value in published.items())
    on_line(f"{'':36}{''.join(heads)}")
    drawn: dict[tuple[float, int], Recording] = {}
    for variant in VARIANTS:
        key = (variant.spread, variant.seed)
        if key not in drawn:
            drawn[key] = _drawn(level, variant)
        found = speedups(variant, level, drawn[key], tuple(published))
        cells = (
            f"{value:.2f} ({100 * (value / published[size] - 1):+.0f} %)".rjust(18)
            for size, value in found.items()
        )
        on_line(f"{variant.name:36}{''.join(cells)}")


def speedups(
    assumed: Assumptions, level: Mapping[str, Any], recording: Recording, sizes: Sequence[int]
) -> dict[int, float]:
    """Of MSD with the published rule, for each batch size, scaled."""
    cost = assumed.cost
    trace = Trace(recording, {})
    own = add_up(Fixed.draw(Eagle2(**level["tree"]), recording), recording, cost, 1)
    scale = level["published"][L40S]["msd"]["1"] * _plain(recording, cost, 1) / own.tokens_per_s
    options = {**limits_of(level["tree"]), **assumed.paper}
    found = {}
    for size in sizes:
        rule = replay(trace.policy("paper", cost, **options), recording, cost, size)
        found[size] = scale * rule.tokens_per_s / _plain(recording, cost, size)
    return found


def _plain(recording: Recording, cost: CostModel, size: int) -> float:
    """Tokens per second of plain decoding."""
    return replay(Off(), recording, cost, size).tokens_per_s


def _drawn(level: Mapping[str, Any], assumed: Assumptions) -> Recording:
    return synthetic(
        level["tokens_per_round"],
        ANSWERS,
        context=level["context"],
        tree=level["tree"],
        seed=assumed.seed,
        spread=assumed.spread,
    )
