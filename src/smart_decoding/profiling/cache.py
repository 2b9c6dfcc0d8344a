"""Profiles on disk: one small JSON per model, device and machine. A missing, stale or broken
profile never stops a run. A profile measured beside other work counts for an hour only: its costs
may be wrong by a factor."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from smart_decoding.core.costs import CostModel
from smart_decoding.errors import ModelError
from smart_decoding.files import read_json, reading, whole
from smart_decoding.kernels import library
from smart_decoding.models.checkpoints.hub import cache_dir
from smart_decoding.models.checkpoints.registry import lasting_name

log = logging.getLogger("smart.profile")
T = TypeVar("T")

BUSY_LASTS = 3600.0  # seconds for which costs measured beside other work count
VERSION = 12  # raise when the engine's speed changes; other kernels are other costs anyway


def profile_path(
    weights: Mapping[str, str],
    dtype: torch.dtype,
    device: torch.device,
    head: str,
    longest: int,
    steps: Sequence[int] = (),
) -> Path:
    """Return the path of this model's profile on this machine. longest: the longest measured
    context; steps: of its costs over rows."""
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    native = "" if library.unavailable() else library.identity(library.chosen())
    return path_of(weights, VERSION, dtype, machine, head, native, longest, tuple(steps))


def path_of(weights: Mapping[str, str], *distinctions: object) -> Path:
    """Return the path of what was measured of a model, on this machine with so many threads."""
    model = json.dumps(dict(weights), sort_keys=True)
    parts = [torch.__version__, model, _cpu(), torch.get_num_threads(), *distinctions]
    key = hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]
    return cache_dir() / "profiles" / f"{key}.json"


def load_profile(path: Path) -> CostModel | None:
    """Return the stored cost model, or None if there is none that can be read."""
    return load(path, CostModel.from_dict)


def load(path: Path, parse: Callable[[Any], T]) -> T | None:
    """Return what `parse` makes of the stored costs, or None if there are none that can be read."""
    if not path.exists():
        return None
    try:
        with reading(path):
            stored = read_json(path)
            if stored["sha256"] != _sum(stored["model"], stored["cost"], stored["busy"]):
                raise ValueError("it has another checksum")
            if stored["busy"] and time.time() - path.stat().st_mtime > BUSY_LASTS:
                return None
            return parse(stored["cost"])
    except ModelError as error:
        reason = error.__cause__ or error
        log.warning("the profile %s cannot be used, costs are measured again: %s", path, reason)
        return None


def save_profile(path: Path, cost: CostModel, model: str = "", busy: bool = False) -> None:
    """Store the costs of a model of that name, all of it or nothing; a full disk only means
    measuring again next time. busy: whether other processes ran beside the measurement."""
    save(path, cost.to_dict(), model, busy)


def save(path: Path, cost: Mapping[str, Any], model: str, busy: bool = False) -> None:
    """Do the same with costs of any kind, in plain numbers, lists and dictionaries."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as scratch:
            model = lasting_name(model)
            checksum = _sum(model, cost, busy)
            stored = {"model": model, "sha256": checksum, "cost": cost, "busy": busy}
            scratch.write_text(json.dumps(stored))
    except OSError as error:
        log.warning(
            f"the profile {path} cannot be kept, "
            f"costs will be measured again next time: {error.strerror}"
        )


def told() -> dict[str, dict[str, str]]:
    """Return what was chosen by measurements (ways.py) and why: by model, requests and threads, the
    latest."""
    found: dict[str, dict[str, str]] = {}
    paths = (cache_dir() / "profiles").glob("*.json")
    for path in sorted(paths, key=lambda path: path.stat().st_mtime):
        with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
            stored = json.loads(path.read_text())
            found.setdefault(str(stored["model"]), {}).update(stored["cost"]["told"])
    return {model: choices for model, choices in found.items() if choices}


def _sum(*what: Any) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    prefixes = ("model name", "model\t", "stepping", "flags")
    return "\n".join(sorted({line for line in lines if line.startswith(prefixes)}))
