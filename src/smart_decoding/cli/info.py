"""`smart info`: the CPU kernels that run here, the machine, the cache, versions; loads no model."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterator, Mapping
from typing import Any

from smart_decoding.drafters import METHODS
from smart_decoding.errors import ConfigError
from smart_decoding.models.checkpoints.hub import cache_dir
from smart_decoding.models.checkpoints.hub_repository import hub_cache
from smart_decoding.models.checkpoints.kept import readable, size_of

OPTIONAL = (
    "transformers",
    "pillow",
    "llguidance",
    "fastapi",
    "uvicorn",
    "prometheus-client",
    "matplotlib",
    "sentencepiece",
    "vllm",
    "sglang",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def main(args: argparse.Namespace) -> None:
    """Print the information."""
    found = gather()
    print(json.dumps(found, indent=1) if args.json else "\n".join(lines(found)))


def gather() -> dict[str, Any]:
    """Return everything, as --json prints it."""
    from smart_decoding.measuring.machine import machine, version_of, versions
    from smart_decoding.profiling.cache import told

    root = cache_dir()
    return {
        "kernels": kernels(),
        "machine": {**machine(), "cpus": os.cpu_count()},
        "auto": told(),  # what activations="auto" chose and why, by model and number of requests
        "cache": {"path": str(root), "bytes": size_of(root), "hub": str(hub_cache())},
        "versions": versions(),
        "optional": {name: version_of(name) for name in OPTIONAL},
        "methods": [method for method in METHODS if method != "none"],
    }


def kernels() -> dict[str, Any]:
    """Return the variant that runs, why, and for each variant of this kind of machine why it does
    not run."""
    from smart_decoding.kernels import library

    mine = [variant for variant in library.variants() if variant.machine == platform.machine()]
    try:
        chosen: str | None = library.chosen()
        why = "named by SMART_ISA" if os.environ.get("SMART_ISA") else "the best one that runs here"
    except ConfigError as error:
        chosen = None
        why = str(error)
    return {
        "chosen": chosen,
        "why": why,
        "variants": {variant.name: _refusal(variant) for variant in mine},
    }


def _refusal(variant: Any) -> str | None:
    """Return why a variant does not run, or None. Load it, since the system may refuse a feature
    that the CPU has."""
    from smart_decoding.kernels import library

    reason: str | None = variant.refusal()
    if reason is not None:
        return reason
    try:
        library.load(variant.name)
    except ConfigError as error:
        return str(error)
    return None


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Return the information as lines for people."""
    of_kernels = found["kernels"]
    machine = found["machine"]
    kept = found["cache"]
    yield f"CPU kernels: {of_kernels['chosen'] or 'none'} ({of_kernels['why']})"
    for name, reason in of_kernels["variants"].items():
        yield f"  {name:<12} {reason or 'runs here'}"
    yield "activations of quantised weights (auto): measured at a model's first start"
    for model, reasons in found["auto"].items():
        yield from (f"  {model}: {reason}" for reason in reasons.values())
    usable = f"{machine['cores']} of {machine['cpus']} CPUs usable"
    yield f"CPU: {machine['cpu']} ({machine['machine']}), {usable}"
    yield f"threads: {machine['threads']} (torch's)"
    yield f"memory: {machine['memory_gib'] or 'unknown'} GiB"
    yield f"GPU: {machine['gpu'] or 'none'}"
    yield f"cache: {kept['path']}, {readable(kept['bytes'])}"
    yield f"hub's cache: {kept['hub']} (smart models lists what both hold)"
    yield f"versions: {_listed(found['versions'])}"
    yield f"optional: {_listed(found['optional'])}"
    yield f"what can draft: {', '.join(found['methods'])}"


def _listed(versions: Mapping[str, str | None]) -> str:
    return ", ".join(f"{name} {version or 'absent'}" for name, version in versions.items())
