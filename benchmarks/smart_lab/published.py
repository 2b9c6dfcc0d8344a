"""The published figures, simulated: MSD's trees without and with the published rule on L40S and RTX
PRO 6000, and `smart` beside them.

Nothing is measured: costs are the rooflines of hardware.json, trees are drawn (`simulate
--acceptance msd`). The published figures are drawn beside what they are figures of; only the one of
MSD on L40S at batch 1 was used, to choose the number of tokens per round. --assumptions exchanges
one assumption at a time (assumptions.py).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smart_decoding.bench.options import check_outputs
from smart_decoding.bench.plots import COLOURS
from smart_lab.hardware import acceptances, card, dimensions, roofline
from smart_lab.simulate import EAGLE2, PAPER, SMART, Prediction, Simulation, Simulator, name_of
from smart_lab.synthetic import synthetic
from smart_lab.trace import Trace

CARDS = ("l40s", "rtx-pro-6000")
SIZES = (1, 2, 4, 8, 12, 16, 24, 32)
FIXED = "best fixed"
LINES = {
    PAPER: ("MSD with the published rule", "D"),
    EAGLE2: ("MSD's tree, 59 nodes", "^"),
    SMART: ("smart (ours)", "o"),
    FIXED: ("best of 15 fixed trees", "s"),
}
PUBLISHED = {PAPER: "smart", EAGLE2: "msd"}  # the paper's rule, and MSD without it
COLOUR = dict(zip((SMART, FIXED, PAPER, EAGLE2), COLOURS, strict=False))
MARKS = {PAPER: "published: MSD with SMART", EAGLE2: "published: MSD"}


def simulated(name: str, level: Mapping[str, Any]) -> Simulation:
    """A card's predictions at the published method's acceptance."""
    sheet, model = card(name, eager=True), dimensions("vicuna-7b")
    trace = Trace(
        synthetic(level["tokens_per_round"], context=level["context"], tree=level["tree"]), {}
    )
    simulator = Simulator(trace, roofline(sheet, model), tree=level["tree"])
    return Simulation(
        sheet.name, model.name, level["source"], [simulator.prediction(size) for size in SIZES]
    )


def speedup_of(prediction: Prediction, policy: str) -> float:
    """A policy's speedup, FIXED's that of the best fixed tree."""
    return prediction.speedup[name_of(prediction.fixed) if policy == FIXED else policy]


def cell(prediction: Prediction, policy: str, published: Mapping[str, Mapping[str, float]]) -> str:
    """A speedup, the published one in brackets."""
    value = speedup_of(prediction, policy)
    known = published.get(PUBLISHED.get(policy, ""), {}).get(str(prediction.batch_size))
    return f"{value:.2f}" + (f" ({known:.2f})" if known else "")


def picture(
    found: Mapping[str, Simulation], published: Mapping[str, Mapping[str, Any]], path: Path
) -> None:
    """One panel per card: simulated lines, published figures as hollow marks."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(11, 5.2), layout="constrained")
    axes = canvas.subplots(1, len(found), sharey=True)
    for panel, (name, simulation) in zip(axes, found.items(), strict=True):
        _lines(panel, simulation, published[name])
        _finish(panel, simulation)
    axes[0].set_ylabel("speedup over plain decoding")
    handles, names = axes[0].get_legend_handles_labels()
    canvas.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    title = "Simulated from data sheets, not measured: a 7B model with MSD's acceptance"
    canvas.suptitle(title, fontsize=13)
    canvas.savefig(path, dpi=120)


def _lines(panel: Any, simulation: Simulation, published: Mapping[str, Any]) -> None:
    for policy, (told, marker) in LINES.items():
        values = [speedup_of(prediction, policy) for prediction in simulation.predictions]
        style = {"color": COLOUR[policy], "marker": marker}
        panel.plot(SIZES, values, linewidth=2.2, markersize=5, label=told, **style)
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


def _finish(panel: Any, simulation: Simulation) -> None:
    """The line at 1×, where MSD's tree crosses it, and the axes."""
    panel.axhline(1.0, color="black", linestyle=(0, (4, 4)), linewidth=1)
    panel.axhspan(0.4, 1.0, color="#c0392b", alpha=0.06, linewidth=0)
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
    panel.set_xticks(SIZES, [str(size) for size in SIZES])
    panel.set_ylim(0.4, 2.3)
    panel.set_xlabel("batch size")
    panel.set_title(simulation.hardware, fontsize=11)
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
    level = acceptances()["msd"]
    if args.assumptions:
        from smart_lab.assumptions import table

        table(level, lambda line: print(line, flush=True))
        return 0
    found = {name: simulated(name, level) for name in CARDS}
    print("SIMULATED, not measured; speedups over plain decoding (published ones in brackets)")
    for name, simulation in found.items():
        heads = (f"{told:>28}" for told, _ in LINES.values())
        print(f"{simulation.hardware}\n  batch{''.join(heads)}")
        for prediction in simulation.predictions:
            cells = (
                f"{cell(prediction, policy, level['published'][name]):>28}" for policy in LINES
            )
            print(f"  {prediction.batch_size:5}{''.join(cells)}")
        crossings = (simulation.crossing(policy) for policy in (EAGLE2, PAPER, SMART))
        print(
            "  MSD's tree crosses 1x at {}, the published rule at {}, smart at {}".format(
                *crossings
            )
        )
    if args.json is not None:
        args.json.write_text(json.dumps({name: s.to_dict() for name, s in found.items()}, indent=1))
    if args.plots is not None:
        args.plots.mkdir(exist_ok=True)
        picture(found, level["published"], args.plots / "simulated.png")
    return 0
