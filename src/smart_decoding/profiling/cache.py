"""Profiles on disk: one small JSON per model, device and machine. A missing, stale or broken
profile never stops a run. A profile measured beside other work counts for an hour only: its costs
may be wrong by a factor."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from smart_decoding.core.costs import CostModel
from smart_decoding.errors import ModelError
from smart_decoding.files import read_json, reading, whole
from smart_decoding.kernels import library
from smart_decoding.models.checkpoints.hub import cache_dir
from smart_decoding.models.checkpoints.registry import lasting_name

log = logging.getLogger("smart.profile")

BUSY_LASTS = 3600.0  # seconds for which costs measured beside other work count
VERSION = 11  # raise when the engine's speed changes; other kernels are other costs anyway


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
    machine = _cpu() + (torch.cuda.get_device_name(device) if device.type == "cuda" else "")
    native = library.identity() if library.unavailable() is None else ""
    model = json.dumps(dict(weights), sort_keys=True)
    parts = [VERSION, torch.__version__, model, dtype, machine, head, native]
    parts += [torch.get_num_threads(), longest, tuple(steps)]
    key = hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]
    return cache_dir() / "profiles" / f"{key}.json"


def load_profile(path: Path) -> CostModel | None:
    """Return the stored cost model, or None if there is none that can be read."""
    if not path.exists():
        return None
    try:
        with reading(path):
            stored = read_json(path)
            if stored["sha256"] != _sum(stored["model"], stored["cost"], stored["busy"]):
                raise ValueError("it has another checksum")
            if stored["busy"] and time.time() - path.stat().st_mtime > BUSY_LASTS:
                return None
            return CostModel.from_dict(stored["cost"])
    except ModelError as error:
        reason = error.__cause__ or error
        log.warning("the profile %s cannot be used, costs are measured again: %s", path, reason)
        return None


def save_profile(path: Path, cost: CostModel, model: str = "", busy: bool = False) -> None:
    """Store the costs of a model of that name, all of it or nothing; a full disk only means
    measuring again next time. busy: whether other processes ran beside the measurement."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as scratch:
            state = cost.to_dict()
            model = lasting_name(model)
            checksum = _sum(model, state, busy)
            stored = {"model": model, "sha256": checksum, "cost": state, "busy": busy}
            scratch.write_text(json.dumps(stored))
    except OSError as error:
        log.warning(
            f"the profile {path} cannot be kept, "
            f"costs will be measured again next time: {error.strerror}"
        )


def _sum(*what: Any) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    prefixes = ("model name", "model\t", "stepping", "flags")
    return "\n".join(sorted({line for line in lines if line.startswith(prefixes)}))
