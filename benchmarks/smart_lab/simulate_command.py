"""`python -m smart_lab simulate`: would speculation pay on that machine, and which policy?

Needed by docs/lab.md.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from smart_decoding.cli.arguments import whole_numbers
from smart_decoding.core.costs import CostModel
from smart_decoding.errors import ConfigError
from smart_decoding.files import write_json
from smart_lab.provenance import check_outputs
from smart_lab.simulate import EAGLE2, EAGLE_2, PAPER, SMART, Simulation, Simulator, name_of
from smart_lab.trace import Trace, read_trace

if TYPE_CHECKING:
    from smart_lab.replay import HostCosts
    from smart_lab.sweep import Setting

MEASURED, MODEL = "measured", "llama-3.1-8b"
LARGEST = 256  # batch size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--hardware",
        default=MEASURED,
        metavar="NAME",
        help="a card (rtx-pro-6000, l40s, a100, h100, h200, cpu-zen5-2c), the JSON of a profile, "
        "or 'measured': the recording machine (default)",
    )
    add("--model", help=f"whose dimensions a card is given, or a config.json (default: {MODEL})")
    add(
        "--trace",
        type=Path,
        metavar="FILE",
        help="a recording by smart_lab bench --record: acceptance as it was",
    )
    add(
        "--acceptance",
        metavar="NAME",
        help="instead of a recording: msd, eagle3, or tokens per round such as 3.5",
    )
    add("--batch-sizes", type=whole_numbers, default=(1, 2, 4, 8, 16, 32), metavar="1,4")
    add("--context", type=int, metavar="TOKENS", help="length that every prompt is given")
    add(
        "--eager",
        action="store_true",
        help="a card's engine launches every kernel from Python, without CUDA graphs",
    )
    add("--json", type=Path, metavar="FILE", help="write the figures there")


def main(args: argparse.Namespace) -> int:
    """Print the table. Raises SmartError for what a user can mend."""
    sizes = sorted(set(args.batch_sizes))
    if sizes[-1] > LARGEST:
        raise ConfigError(f"batch sizes must lie between 1 and {LARGEST}, not {sizes[-1]}")
    check_outputs((args.json,))
    if (args.trace is None) == (args.acceptance is None):
        raise ConfigError(
            "give either --trace FILE (smart_lab bench --record makes one) or --acceptance NAME"
        )
    if args.context is not None and args.context < 1:
        raise ConfigError(f"--context must be at least 1, not {args.context}")
    if (args.model or args.eager) and not _is_card(args.hardware):
        raise ConfigError(
            "--model and --eager change a card's costs, not measured ones: give --hardware NAME"
        )
    trace, acceptance, tree = _acceptance(args)
    if args.context is not None:
        trace = replace(trace, recording=trace.recording.at_context(args.context))
    cost, host, simulation = _costs(args, trace, acceptance, max(sizes))
    simulator, started = Simulator(trace, cost, host, tree), time.perf_counter()
    with tqdm(total=len(sizes), desc="simulating", unit="batch size", leave=False) as bar:
        for size in sizes:
            simulation.predictions.append(
                simulator.prediction(size, lambda name: bar.set_postfix_str(name, refresh=True))
            )
            bar.update()
    print(text(simulation))
    seconds = time.perf_counter() - started
    print(f"({simulator.rounds} rounds of requests replayed in {seconds:.1f} s)")
    if args.json is not None:
        write_json(args.json, simulation.to_dict())
    return 0


def text(simulation: Simulation) -> str:
    """Return what is simulated, a line per batch size, and the answer."""
    lines = [
        "SIMULATED, not measured: policies replayed on recorded or drawn trees at modelled costs.",
        f"  costs:      {simulation.hardware}",
        f"  model:      {simulation.model}",
        f"  acceptance: {simulation.acceptance}",
        *(f"  note:       {note}" for note in simulation.notes),
        "",
        f"{'batch':>5}{'plain tok/s':>13}{'smart':>8}{'paper':>8}{'EAGLE-2':>9}"
        f"{'best fixed':>12}   use",
    ]
    for o in simulation.predictions:
        fixed = o.speedup[name_of(o.fixed)]
        values = (
            f"{o.speedup[SMART]:8.2f}{o.speedup[PAPER]:8.2f}{o.speedup[EAGLE2]:9.2f}{fixed:12.2f}"
        )
        use = f"{o.best} ({_did(o.smart.off / o.smart.rounds)})" if o.best == SMART else o.best
        lines.append(f"{o.batch_size:>5}{o.plain:13.0f}{values}   {use}")
    return "\n".join([*lines, "", *_answers(simulation)])


def _answers(simulation: Simulation) -> list[str]:
    lines = []
    for policy in (EAGLE2, PAPER, SMART):
        crossing = simulation.crossing(policy)
        where = (
            "stays at or above 1x here"
            if crossing is None
            else f"falls below 1x near batch {crossing:.0f}"
        )
        lines.append(f"{policy} {where}")
    paying = [o for o in simulation.predictions if o.best != "off"]
    if not paying:
        return [*lines, "Speculation does not pay at any of these batch sizes: decode plainly."]
    last = paying[-1]
    if last is simulation.predictions[-1]:
        return [
            *lines,
            f"Speculation pays at every batch size up to {last.batch_size}: use {last.best}.",
        ]
    return [
        *lines,
        f"Speculation stops paying beyond batch {last.batch_size}; "
        "smart then decodes plainly by itself.",
    ]


def _did(off: float) -> str:
    return "drafts always" if off < 0.05 else f"{100 * off:.0f} % of rounds off"


def _acceptance(args: argparse.Namespace) -> tuple[Trace, str, Setting]:
    """Return trees to replay, what they are in words, and the setting of `eagle2` that fixed trees
    of full size have."""
    if args.trace is not None:
        trace = read_trace(args.trace)
        recording, origin = trace.recording, trace.about.get("provenance", {})
        weights = origin.get("weights", {}).get("model", "unknown model")
        head = origin.get("head", "unknown drafter")
        said = f"recorded: {args.trace.name}, {weights}, {head}, temperature "
        return (
            trace,
            f"{said}{trace.about.get('temperature', '?')}, {len(recording.answers)} answers",
            EAGLE_2,
        )
    from smart_lab.hardware import acceptances
    from smart_lab.synthetic import synthetic

    known = acceptances()
    if args.acceptance in known:
        level = known[args.acceptance]
        tokens, context, source, tree = (
            level[name] for name in ("tokens_per_round", "context", "source", "tree")
        )
    else:
        tokens, context, source, tree = (
            _tokens(args.acceptance, list(known)),
            200,
            "requested",
            EAGLE_2,
        )
    recording = synthetic(tokens, context=context, tree=tree)
    said = (
        f"SYNTHETIC trees, {tokens:g} tokens per round of {name_of(tree)}, "
        f"prompts of {context} tokens; {source}"
    )
    return Trace(recording, {}), said, tree


def _costs(
    args: argparse.Namespace, trace: Trace, acceptance: str, largest: int
) -> tuple[CostModel, HostCosts | None, Simulation]:
    name = args.hardware
    if name == MEASURED:
        if trace.cost is None:
            raise ConfigError(
                "there is no measured profile without a recording: give --hardware NAME"
            )
        hardware = trace.about.get("provenance", {}).get("hardware", {})
        device = hardware.get("gpu") or hardware.get("cpu", "an unknown machine")
        profile = f"measured profile of {device}"
        return trace.cost, trace.host, Simulation(profile, "the recorded one", acceptance)
    if not _is_card(name):
        return (
            _profile(Path(name)),
            trace.host,
            Simulation(f"profile {Path(name).name}", "as profiled", acceptance),
        )
    from smart_lab.hardware import card, dimensions, roofline, too_large

    sheet, model = card(name, args.eager), dimensions(args.model or MODEL)
    how = "every kernel launched from Python" if args.eager else "CUDA graphs"
    simulation = Simulation(
        f"roofline of {sheet.name}: {sheet.bytes_s / 1e9:.0f} GB/s, "
        f"{sheet.flop_s / 1e12:g} TFLOP/s bf16 at {100 * sheet.efficiency:.0f} % efficiency, {how}",
        f"{model.name}, {model.weights / 1e9:.2f} G weights in bf16, one-layer draft head",
        acceptance,
    )
    longest = max((a.prompt_length + len(a.tokens) for a in trace.recording.answers), default=0)
    simulation.notes += too_large(sheet, model, largest, longest)
    return roofline(sheet, model), None, simulation


def _is_card(hardware: str) -> bool:
    return hardware != MEASURED and Path(hardware).suffix != ".json"


def _profile(path: Path) -> CostModel:
    try:
        return CostModel.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not a profile as the cache has it") from error


def _tokens(said: str, known: list[str]) -> float:
    try:
        return float(said)
    except ValueError as error:
        raise ConfigError(
            f"unknown acceptance {said!r}; known: {', '.join(known)}, or tokens per round"
        ) from error
