"""A simulation as one self-contained page: speedup against batch size, and what is simulated, said first."""

from __future__ import annotations

from html import escape

from smart_decoding.bench.figures import Figure, Panel, Point, Series
from smart_decoding.bench.html_report import document, section
from smart_decoding.bench.simulate import LIKELIHOOD, PAPER, SMART, Simulation, name_of

WARNING = "Simulated, not measured: policies replayed on recorded or drawn trees at modelled costs."
CAPTION = (
    "Simulated tokens per second over those of plain decoding on the same hardware. 'Best fixed' is, at each batch "
    "size, the fastest of fifteen settings of likelihood. Below the line at 1× speculation costs time."
)


def page(simulation: Simulation) -> str:
    """The whole document."""
    facts = {"costs": simulation.hardware, "model": simulation.model, "acceptance": simulation.acceptance}
    told = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    notes = "".join(f"<p>{escape(note)}</p>" for note in simulation.notes)
    warning = f'<p class="warn">{WARNING}</p>'
    title = f"{simulation.model}: speculation simulated"
    said = f"<section>{warning}<dl>{told}</dl>{notes}</section>"
    return document(title, [f"<header><h1>{escape(title)}</h1></header>", said,
                            section(figure(simulation)), _table(simulation)])  # fmt: skip


def figure(simulation: Simulation) -> Figure:
    """Speedup against batch size."""
    series = []
    for colour, policy in enumerate((SMART, PAPER, LIKELIHOOD, "best fixed")):
        points = []
        for o in simulation.outlooks:
            value = o.speedup[name_of(o.fixed) if policy == "best fixed" else policy]
            points.append(Point(o.batch_size, value, note=f"{policy}, batch {o.batch_size}: {value:.2f}×"))
        series.append(Series(policy, colour, points, tag=f"{policy} {points[-1].y:.2f}×"))
    sizes = [float(o.batch_size) for o in simulation.outlooks]
    level = (1.0, "1×, plain decoding: below it is slower")
    panel = Panel("", "batch size", "speedup, simulated", series, sizes, True, level=level)
    return Figure("speedup", "Speedup against batch size, simulated", CAPTION, [panel])


def _table(simulation: Simulation) -> str:
    rows = []
    for o in simulation.outlooks:
        values = [o.speedup[SMART], o.speedup[PAPER], o.speedup[LIKELIHOOD], o.speedup[name_of(o.fixed)]]
        cells = "".join(f'<td class="{"faster" if v >= 1 else "slower"}">{v:.2f}</td>' for v in values)
        rows.append(f"<tr><th>{o.batch_size}</th><td>{o.plain:.0f}</td>{cells}<td>{escape(name_of(o.fixed))}</td>"
                    f"<td>{escape(o.best)}</td></tr>")  # fmt: skip
    names = ("batch", "plain tok/s", SMART, PAPER, LIKELIHOOD, "best fixed", "which", "use")
    heads = "".join(f"<th>{escape(name)}</th>" for name in names)
    return (f'<section><h2>Batch by batch</h2><div class="scroll"><table><thead><tr>{heads}</tr></thead>'
            f"<tbody>{''.join(rows)}</tbody></table></div></section>")  # fmt: skip
