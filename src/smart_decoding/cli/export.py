"""`smart export`: writes a draft head in the layout that another engine reads."""

from __future__ import annotations

import argparse
from pathlib import Path

from smart_decoding.engine_args import EngineArgs
from smart_decoding.options import add_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The head, its target, the layout and where to write it."""
    parser.add_argument(
        "head", help="folder, hub id, or a built-in model whose head comes with this package"
    )
    parser.add_argument(
        "--model", help="its target: name, hub id, folder or GGUF file (default: HEAD, if built in)"
    )
    layouts = ("eagle3", "speculators", "eagle")
    parser.add_argument("--layout", required=True, choices=layouts, help="to write the head in")
    add_options(parser, EngineArgs, ("trust_pickle",))
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")


def main(args: argparse.Namespace) -> int:
    """Read the head and write it in the other layout."""
    from smart_decoding.errors import ConfigError
    from smart_decoding.models.checkpoints.loading import load_checkpoint
    from smart_decoding.models.checkpoints.registry import shipped_head
    from smart_decoding.models.heads.export import check_layout, write_head
    from smart_decoding.models.heads.files import head_path, load_head

    own = shipped_head(args.head)
    model = args.model or (args.head if own else None)
    if model is None:
        raise ConfigError("give the head's target: --model NAME")
    if args.output.exists() and (own or Path(args.head)).resolve() == args.output.resolve():
        raise ConfigError(f"--output {args.output} is the head itself: give another folder")
    checkpoint = load_checkpoint(model, trust_pickle=args.trust_pickle)
    files = load_head(
        own or head_path(args.head, args.trust_pickle), checkpoint.config, args.trust_pickle
    )
    check_layout(files, args.layout)
    write_head(files, checkpoint, args.layout, args.output)
    print(f"wrote {args.output} ({args.layout} layout, for {checkpoint.provenance['model']})")
    return 0
