"""The command line that asks for a run, as results and pages show it: names of files only, no
folders of a machine."""

from __future__ import annotations

import shlex
from pathlib import Path

from smart_decoding.bench.options import BenchOptions

OUTPUTS = ("resume", "json", "html", "plots")


def command_of(options: BenchOptions) -> str:
    """The command line that asks for this run."""
    return shlex.join(["smart", "bench", "--model", options.model, *words_of(options)])


def words_of(options: BenchOptions) -> list[str]:
    """The options, but for the model, as words of a command line."""
    words = ["--policies", ",".join(options.policies)]
    words += [word for setting in options.policy_options for word in ("--policy-options", setting)]
    words += ["--least-blocks", str(options.least_blocks)] if options.least_blocks > 1 else []
    words += ["--method", options.method] if options.method else []
    words += ["--draft", Path(options.draft).name] if options.draft else []
    words += [
        word
        for name, value in options.method_options.items()
        for word in ("--method-option", f"{name}={value}")
    ]
    words += [
        "--batch-sizes",
        ",".join(map(str, options.batch_sizes)),
        "--tasks",
        ",".join(options.tasks),
    ]
    words += [
        "--dtype",
        options.dtype,
        "--temperature",
        f"{options.temperature:g}",
        "--limit",
        str(options.limit),
    ]
    words += ["--skip", str(options.skip)] if options.skip else []
    words += [
        "--max-tokens",
        str(options.max_tokens),
        "--seed",
        str(options.seed),
        "--device",
        options.device,
    ]
    words += ["--allow-slow"] if options.allow_slow else []
    words += ["--sampled", f"{options.sampled:g}"] if options.sampled else []
    words += ["--load", ",".join(f"{share:g}" for share in options.load)] if options.load else []
    words += ["--blocks"] if options.blocks else []
    words += ["--time-limit", f"{options.time_limit:g}"] if options.time_limit is not None else []
    for name in OUTPUTS:
        path = getattr(options, name)
        words += [f"--{name}", path.name] if path is not None else []
    return words
