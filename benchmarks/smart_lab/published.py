"""The published figures, simulated: MSD's trees without and with the published rule on L40S and RTX
PRO 6000, and `smart` beside them; then H100s with models of 8B and 70B.

Nothing is measured: costs are the rooflines of hardware.json, trees are drawn (`simulate
--acceptance msd`). The published figures are drawn beside what they are figures of; only the one of
MSD on L40S at batch 1 was used, to choose the number of tokens per round. --assumptions exchanges
one assumption at a time (assumptions.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smart_decoding.bench.provenance import provenance, write_json
from smart_decoding.bench.sections import as_text
from smart_lab import tables
from smart_lab.hardware import acceptances, card, dimensions, roofline, too_large
from smart_lab.plots import COLOURS, check_outputs
from smart_lab.profiled import RANGES, profiled
from smart_lab.simulate import EAGLE2, PAPER, SMART, Prediction, Simulation, Simulator, name_of
from smart_lab.synthetic import synthetic
from smart_lab.trace import Trace


@dataclass(frozen=True)
class Setup:
    """A panel: a card and a model of hardware.json, whose acceptance it has, whether kernels are
    launched from Python, and batch sizes."""

    card: str
    model: str
    acceptance: str
    eager: bool
    sizes: Sequence[int]


MSD_SIZES = (1, 4, 8, 12, 16, 24, 32)
LARGE_SIZES = (1, 8, 32, 64, 128)
SETUPS = (
    Setup("l40s", "vicuna-7b", "msd", True, MSD_SIZES),
    Setup("rtx-pro-6000", "vicuna-7b", "msd", True, MSD_SIZES),
    Setup("h100", "llama-3.1-8b", "eagle3", False, LARGE_SIZES),
    Setup("4-h100", "llama-3.3-70b", "eagle3", False, LARGE_SIZES),
)
FIXED = "best fixed"
LINES = {
    PAPER: ("the published rule", "D"),
    EAGLE2: ("fixed tree, 59 nodes", "^"),
    SMART: ("smart (ours)", "o"),
    FIXED: ("best of 15 fixed trees", "s"),
}
PUBLISHED = {PAPER: "smart", EAGLE2: "msd"}  # the paper's rule, and MSD without it
COLOUR = dict(zip((SMART, FIXED, PAPER, EAGLE2), COLOURS, strict=False))
MARKS = {PAPER: "published: MSD with SMART", EAGLE2: "published: MSD"}


def simulated(setup: Setup) -> Simulation:
    """A card's predictions; `smart` also as it would do after a profile."""
    sheet = card(setup.card, setup.eager)
    model = dimensions(setup.model)
    level = acceptances()[setup.acceptance]
    recording = synthetic(level["tokens_per_round"], context=level["context"], tree=level["tree"])
    simulator = Simulator(Trace(recording, {}), roofline(sheet, model), tree=level["tree"])
    found = Simulation(sheet.name, model.name, level["source"])
    known = {name: profiled(simulator.cost, grid) for name, grid in RANGES.items()}
    for size in setup.sizes:
        prediction = simulator.prediction(size)
        found.predictions.append(prediction)
        found.profiled[size] = {
            name: simulator.replayed("smart", size, cost).tokens_per_s / prediction.plain
            for name, cost in known.items()
        }
    longest = level["context"] + max(len(answer.tokens) for answer in recording.answers)
    found.notes = too_large(sheet, model, max(setup.sizes), longest)
    return found


def published_of(setup: Setup) -> Mapping[str, Mapping[str, float]]:
    """The published speedups of a card, by method and batch size."""
    found: Mapping[str, Any] = acceptances()[setup.acceptance].get("published", {})
    speedups: Mapping[str, Mapping[str, float]] = found.get(setup.card, {})
    return speedups


def speedup_of(prediction: Prediction, policy: str) -> float:
    """A policy's speedup, FIXED's that of the best fixed tree."""
    return prediction.speedup[name_of(prediction.fixed) if policy == FIXED else policy]


def picture(found: Mapping[Setup, Simulation], path: Path) -> None:
    """One panel per setup: simulated lines, published figures as hollow marks."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(11, 9.6), layout="constrained")
    axes = canvas.subplots(-(-len(found) // 2), 2, squeeze=False).ravel()
    for panel, (setup, simulation) in zip(axes, found.items(), strict=True):
        _lines(panel, simulation, published_of(setup))
        _finish(panel, simulation)
        panel.set_ylabel("speedup over plain decoding")
    handles, names = axes[0].get_legend_handles_labels()
    canvas.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    canvas.suptitle("Simulated from data sheets, not measured", fontsize=13)
    canvas.savefig(path, dpi=110)


def _lines(panel: Any, simulation: Simulation, published: Mapping[str, Any]) -> None:
    for policy, (told, marker) in LINES.items():
        values = [speedup_of(prediction, policy) for prediction in simulation.predictions]
        style = {"color": COLOUR[policy], "marker": marker}
        panel.plot(_sizes(simulation), values, linewidth=2.2, markersize=5, label=told, **style)
        known = published.get(PUBLISHED.get(policy, ""), {})
        if known:
            panel.plot(
                [int(size) for size in known],
                list(known.values()),
                linestyle="none",
                markersize=10,
                markerfacecolor="none",
                markeredgewidth=1.8,
                label=MARKS[policy],
                **style,
            )


def _sizes(simulation: Simulation) -> list[int]:
    return [prediction.batch_size for prediction in simulation.predictions]


def _finish(panel: Any, simulation: Simulation) -> None:
    """The line at 1×, where MSD's tree crosses it, and the axes."""
    panel.axhline(1.0, color="black", linestyle=(0, (4, 4)), linewidth=1)
    panel.axhspan(0.0, 1.0, color="#c0392b", alpha=0.06, linewidth=0)
    crossing = simulation.crossing(EAGLE2)
    if crossing:
        panel.annotate(
            f"below 1× from\nbatch {crossing:.0f}",
            (crossing, 1.0),
            xytext=(-74, -44),
            textcoords="offset points",
            arrowprops={"arrowstyle": "->"},
            fontsize=9,
        )
    panel.set_xscale("log", base=2)
    sizes = _sizes(simulation)
    panel.set_xticks(sizes, [str(size) for size in sizes])
    panel.set_ylim(0.0, 1.15 * max(max(o.speedup.values()) for o in simulation.predictions))
    panel.set_xlabel("batch size")
    panel.set_title(f"{simulation.hardware}, {simulation.model}", fontsize=11)
    panel.grid(axis="y", color="#e4e4df")
    panel.spines[["top", "right"]].set_visible(False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the figures go."""
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write simulated.png there")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument(
        "--assumptions",
        action="store_true",
        help="the published rule on L40S instead, with one assumption exchanged at a time",
    )


def main(args: argparse.Namespace) -> int:
    """Prints a table a card. Raises ConfigError for outputs that cannot be written."""
    check_outputs((args.json,), args.plots)
    if args.assumptions:
        from smart_lab.assumptions import table

        table(acceptances()["msd"], lambda line: print(line, flush=True))
        return 0
    found = {setup: simulated(setup) for setup in SETUPS}
    told = [
        {**simulation.to_dict(), "published": published_of(setup)}
        for setup, simulation in found.items()
    ]
    for part in tables.simulated(told):
        print(as_text(part))
    if args.json is not None:
        weights = {"model": "none: costs by data sheets, drawn trees"}
        origin = provenance("python -m smart_lab published --json FILE", 0, weights, None)
        write_json(args.json, {"provenance": origin, "simulated": told})
    if args.plots is not None:
        args.plots.mkdir(exist_ok=True)
        picture(found, args.plots / "simulated.png")
    return 0
