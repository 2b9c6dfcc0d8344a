"""`smart models`: the built-in names and the caches; `pull` fetches, `rm` removes."""

from __future__ import annotations

import argparse
import shutil
import sys
from contextlib import suppress

from smart_decoding.engine_args import EngineArgs
from smart_decoding.errors import ConfigError
from smart_decoding.models.checkpoints.gguf_parts import files_of
from smart_decoding.models.checkpoints.hub_repository import repository_of
from smart_decoding.models.checkpoints.kept import (
    OUTDATED,
    PARTLY,
    Kept,
    conversions,
    holds_mtp,
    hub_repositories,
    kept_of,
    made_of,
    readable,
    size_of,
)
from smart_decoding.models.checkpoints.ollama import ollama_file, ollama_models
from smart_decoding.models.checkpoints.registry import (
    DEFAULT_MODEL,
    NAMED_MODELS,
    resolve,
    shipped_head,
    unknown_model,
)
from smart_decoding.options import add_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands list (the default), pull and rm."""
    verbose = "name the sources of the built-in models"
    parser.add_argument("-v", "--verbose", action="store_true", help=verbose)
    actions = parser.add_subparsers(dest="action", metavar="list | pull MODEL | rm MODEL")
    listing = actions.add_parser("list", help="names, sizes, and what is cached")
    as_above = argparse.SUPPRESS
    listing.add_argument("-v", "--verbose", action="store_true", default=as_above, help=verbose)
    pull = actions.add_parser("pull", help="fetch a model into the cache")
    pull.add_argument("model", help="built-in name or hub id")
    add_options(pull, EngineArgs, ("trust_pickle",))
    remove = actions.add_parser(
        "rm", help="remove a model's download, converted weights and profiles from the caches"
    )
    remove.add_argument("model", help="built-in name, hub id, GGUF file or converted folder")
    remove.add_argument("-y", "--yes", action="store_true", help="do not ask")


def main(args: argparse.Namespace) -> None:
    """List, fetch or remove models."""
    if args.action == "pull":
        pull(args.model, args.trust_pickle)
    elif args.action == "rm":
        remove(args.model, args.yes)
    else:
        show(args.verbose)


def show(verbose: bool = False) -> None:
    """Print one block per model, then the other contents of the caches, and Ollama's models; their
    sources, too, if `verbose`."""
    listed = set()
    for name, model in NAMED_MODELS.items():
        kept = kept_of(name)
        listed |= {each.path for each in kept}
        default = " (default)" if name == DEFAULT_MODEL else ""
        is_here = any(each.kind in ("download", "hub") for each in kept)
        missing = [] if is_here else [f"{readable(model.pinned.wheel_size)} to fetch"]
        print(f"{name}{default}: {', '.join(missing + _summary(kept))}")
        print(f"  {model.described}")
        if verbose:
            print(f"  {name}@hub   {model.on_hub}")
            print(f"  {name}@pypi  {model.pinned.origin}, {model.quantisation}, pinned by sha256")
        if shipped_head(name) is not None:
            print("  drafts with its own head, which is here already")
    for each in hub_repositories():
        if each.path not in listed:
            partly = f", {PARTLY}" if each.kind == PARTLY else ""
            print(f"{repository_of(each.path)}: {readable(each.size)} in the hub's cache{partly}")
            _tell_mtp(each)
    made = conversions()
    for each in made:
        if each.path not in listed:
            print(f"{each.path.name}: {readable(each.size)}, {each.kind}, {made_of(each.path)}")
            _tell_mtp(each)
    old = sum(each.size for each in made if each.kind == OUTDATED)
    if old:
        print(f"{readable(old)} are outdated conversions, which nothing uses: smart models rm NAME")
    _show_ollamas()
    print("also: a hub id (owner/name, owner/name:Q4_K_M or owner/name:FILE.gguf),")
    print("a folder with config.json and safetensors, or a GGUF file")


def pull(name: str, trust_pickle: bool = False) -> None:
    """Fetch a model, and say where it lies."""
    from smart_decoding.models.checkpoints.loading import require_usable  # late: torch is slow

    path = resolve(name, trust_pickle, require_usable).path
    size = sum(size_of(part, links=True) for part in files_of(path))
    print(f"{name}: {readable(size)} in {path}")


def remove(name: str, yes: bool) -> None:
    """Remove a model from the caches. Raises ConfigError if they hold nothing of it, or without a
    terminal to confirm the removal."""
    kept = kept_of(name)
    theirs = _told_of_ollama(name)
    if not kept:
        hint = f", and {theirs}" if theirs else unknown_model(name)
        raise ConfigError(f"the caches hold nothing of {name!r}{hint}")
    for each in kept:
        print(f"{each.kind:<14} {readable(each.size):>8}  {each.path}")
        if each.path.is_dir():
            for file in sorted(each.path.glob("snapshots/*/**/*")):
                print(f"{'':<25}{file.relative_to(each.path / 'snapshots')}")
    total = sum(each.size for each in kept)
    if not yes:
        if sys.stdin is None or not sys.stdin.isatty():
            raise ConfigError("there is no terminal to confirm the removal: give -y")
        answer = ""
        with suppress(EOFError):  # Ctrl-D is no
            answer = input(f"remove {readable(total)}? [y/N] ")
        if answer.strip().lower() not in ("y", "yes"):
            print("nothing was removed")
            return
    for each in kept:
        if each.path.is_dir() and not each.path.is_symlink():
            shutil.rmtree(each.path)
        else:
            each.path.unlink()
    print("\n".join(filter(None, [f"removed {total:,} bytes ({readable(total)})", theirs])))


def _show_ollamas() -> None:
    """Print the models that Ollama has here, if it has any."""
    found = ollama_models()
    if found:
        print("fetched by Ollama, under its names:")
    for name, file in found.items():
        print(f"  {name}: {readable(size_of(file, links=True))}")


def _told_of_ollama(name: str) -> str:
    """Return how a model of Ollama's is removed; nothing for another model."""
    is_ollamas = ollama_file(name) is not None
    return f"{name} belongs to Ollama: ollama rm {name} removes it" if is_ollamas else ""


def _tell_mtp(kept: Kept) -> None:
    if holds_mtp(kept.path):
        print("  drafts with its own layer for multi-token prediction")


def _summary(kept: list[Kept]) -> list[str]:
    totals: dict[str, int] = {}
    for each in kept:
        totals[each.kind] = totals.get(each.kind, 0) + each.size
    sizes = [f"{kind} {readable(size)}" for kind, size in totals.items() if kind != "profile"]
    return sizes + (["profile"] if "profile" in totals else [])
