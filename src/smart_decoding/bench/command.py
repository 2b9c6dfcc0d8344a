"""The command line that asks for a run, as results and pages show it: names of files only, no
folders of a machine."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smart_decoding.bench.options import BenchOptions


def command_of(options: BenchOptions) -> str:
    """The command line that asks for this run."""
    return shlex.join(["smart", "bench", "--model", options.model, *words_of(options)])


def words_of(options: BenchOptions) -> list[str]:
    """The options, but for the model, as words of a command line."""
    given: dict[str, Any] = {
        "policies": ",".join(options.policies),
        "policy-options": list(options.policy_options),
        "least-blocks": options.least_blocks if options.least_blocks > 1 else None,
        "method": options.method or None,
        "draft": Path(options.draft).name if options.draft else None,
        "method-option": [f"{name}={value}" for name, value in options.method_options.items()],
        "batch-sizes": ",".join(map(str, options.batch_sizes)),
        "tasks": ",".join(options.tasks),
        "dtype": options.dtype,
        "quantization": options.quantization,
        "activations": options.activations,
        "temperature": f"{options.temperature:g}",
        "limit": options.limit,
        "skip": options.skip or None,
        "max-tokens": options.max_tokens,
        "seed": options.seed,
        "device": options.device,
        "chat-template": options.chat_template,
        "trust-pickle": options.trust_pickle,
        "allow-slow": options.allow_slow,
        "load": ",".join(f"{share:g}" for share in options.load) or None,
        "blocks": options.blocks,
        "time-limit": None if options.time_limit is None else f"{options.time_limit:g}",
        "json": options.json.name if options.json is not None else None,
    }
    return [word for name, value in given.items() for word in option_words(name, value)]


def option_words(name: str, value: Any) -> list[str]:
    """One option: a flag where the value is true, nothing where it is None or false, once for each
    element of a list."""
    if value is None or value is False:
        return []
    if value is True:
        return [f"--{name}"]
    values = value if isinstance(value, list) else [value]
    return [word for each in values for word in (f"--{name}", str(each))]
