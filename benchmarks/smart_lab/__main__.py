"""`python -m smart_lab COMMAND`: the laboratory's command line, with the errors and exit codes of
`smart`.

Needed by `make lab`.
"""

from __future__ import annotations

import sys

from smart_decoding.cli.main import Program, main

LAB = Program(
    "smart_lab",
    "Replay, simulation, tuning, other engines and results: what is not in the wheel.",
    {
        "bench": ("smart bench, with what needs the laboratory", "smart_lab.bench_command"),
        "report": ("draw what a benchmark measured", "smart_lab.report_command"),
        "results": ("write the pages of benchmarks/results", "smart_lab.results_command"),
        "simulate": (
            "what speculation would bring on other hardware",
            "smart_lab.simulate_command",
        ),
        "ablate": ("what each ingredient of smart gives, by replay", "smart_lab.ablate"),
        "robustness": (
            "never slower? bad heads, prompts, neighbours, profiles",
            "smart_lab.robustness",
        ),
        "never-slower": (
            "smart against plain decoding in worlds drawn at random",
            "smart_lab.never_slower",
        ),
        "experts": ("what it brings to price a mixture's experts", "smart_lab.experts"),
        "identity": ("is the output the same under every policy", "smart_lab.identity"),
        "rounding": ("what rounding does to a GGUF file's logits", "smart_lab.rounding"),
        "busy": ("speed beside busy processes, of every entry point", "smart_lab.busy"),
        "gguf-speed": ("a GGUF file here and in llama.cpp", "smart_lab.gguf_speed"),
        "vllm": ("SMART inside vLLM against stock vLLM", "smart_lab.vllm_speed"),
        "transformers": (
            "SMART inside transformers against its own generation",
            "smart_lab.transformers_speed",
        ),
    },
)

if __name__ == "__main__":
    from smart_lab.rival_policies import register

    register()
    sys.exit(main(program=LAB))
