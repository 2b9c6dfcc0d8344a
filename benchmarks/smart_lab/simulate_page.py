"""A simulation as one self-contained page: speedup against batch size, and what is simulated, said
first."""

from __future__ import annotations

from collections.abc import Sequence

from smart_decoding.bench.sections import FASTER, SLOWER, Cell, Marked, Section
from smart_lab.page import document, figure_sections
from smart_lab.panels import Figure, Panel, Point, Series
from smart_lab.simulate import EAGLE2, PAPER, SMART, Simulation, name_of

WARNING = "Simulated, not measured: policies replayed on recorded or drawn trees at modelled costs."
CAPTION = (
    "Simulated tokens per second over those of plain decoding on the same hardware. 'Best fixed' "
    "is, at each batch size, the fastest of fifteen settings of eagle2. Below the line at 1× "
    "speculation costs time."
)


def page(simulation: Simulation) -> str:
    """The whole document."""
    facts = {
        "costs": simulation.hardware,
        "model": simulation.model,
        "acceptance": simulation.acceptance,
    }
    about = Section("about", "What is simulated", lines=simulation.notes, facts=facts)
    sections = [about, *figure_sections([figure(simulation)]), _table(simulation)]
    return document(f"{simulation.model}: speculation simulated", sections, warnings=[WARNING])


def figure(simulation: Simulation) -> Figure:
    """Speedup against batch size."""
    series = []
    for colour, policy in enumerate((SMART, PAPER, EAGLE2, "best fixed")):
        points = []
        for o in simulation.predictions:
            value = o.speedup[name_of(o.fixed) if policy == "best fixed" else policy]
            points.append(Point(o.batch_size, value))
        series.append(Series(policy, colour, points))
    sizes = [float(o.batch_size) for o in simulation.predictions]
    level = (1.0, "1×, plain decoding: below it is slower")
    panel = Panel("", "batch size", "speedup, simulated", series, sizes, True, level=level)
    return Figure("speedup", "Speedup against batch size, simulated", CAPTION, [panel])


def _table(simulation: Simulation) -> Section:
    rows: list[Sequence[Cell]] = []
    for o in simulation.predictions:
        fixed = name_of(o.fixed)
        values = [o.speedup[name] for name in (SMART, PAPER, EAGLE2, fixed)]
        cells = (Marked(f"{value:.2f}", FASTER if value >= 1 else SLOWER) for value in values)
        rows.append((str(o.batch_size), f"{o.plain:.0f}", *cells, fixed, o.best))
    head = ("batch", "plain tok/s", SMART, PAPER, EAGLE2, "best fixed", "which", "use")
    return Section("batches", "Batch by batch", head=head, rows=rows)
