"""`python -m smart_lab COMMAND`: the laboratory's command line, with the errors and exit codes of
`smart`."""

from __future__ import annotations

import sys

from smart_decoding.cli.main import Program, main

LAB = Program(
    "smart_lab",
    "Replay, simulation, tuning, other engines and results: what is not in the wheel.",
    {
        "bench": ("smart bench, with what needs the laboratory", "smart_lab.bench_command"),
        "report": ("smart report, with what the laboratory measured", "smart_lab.report_command"),
        "results": ("write the pages of benchmarks/results", "smart_lab.results_command"),
        "simulate": (
            "what speculation would bring on other hardware",
            "smart_lab.simulate_command",
        ),
        "divergence": (
            "how often bf16 output differs under speculation, and why",
            "smart_lab.divergence",
        ),
    },
)

if __name__ == "__main__":
    sys.exit(main(program=LAB))
