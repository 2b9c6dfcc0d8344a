"""Profiles on disk: one small JSON per model, device and machine. A missing, stale or broken one
never stops a run."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from smart_decoding.core.cost import CostModel
from smart_decoding.files import whole
from smart_decoding.kernels import library
from smart_decoding.models.hub import cache_dir

log = logging.getLogger("smart.profile")

VERSION = 6  # raise when the engine's speed changes; other kernels are other costs anyway


def profile_path(
    weights: Mapping[str, str],
    dtype: torch.dtype,
    device: torch.device,
    head: str,
    longest: int,
    steps: Sequence[int] = (),
) -> Path:
    """Where the profile of this model on this machine lies. longest: the longest context that it
    knows; steps: of its costs over rows."""
    machine = _cpu() + (torch.cuda.get_device_name(device) if device.type == "cuda" else "")
    native = library.identity() if library.unavailable() is None else ""
    parts = [
        str(VERSION),
        torch.__version__,
        json.dumps(dict(weights), sort_keys=True),
        str(dtype),
        machine,
    ]
    parts += [head, native, str(torch.get_num_threads()), str(longest), str(tuple(steps))]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    return cache_dir() / "profiles" / f"{key}.json"


def load_profile(path: Path) -> CostModel | None:
    """The stored cost model, or None if there is none that can be read."""
    try:
        return CostModel.from_dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        log.warning(f"the profile {path} cannot be used, costs are measured again: {reason}")
        return None


def save_profile(path: Path, cost: CostModel, model: str = "") -> None:
    """Stores the costs of a model of that name, all of it or nothing; a full disk only means
    measuring again next time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as scratch:
            scratch.write_text(json.dumps({"model": model, **cost.to_dict()}))
    except OSError as error:
        log.warning(
            f"the profile {path} cannot be kept, "
            f"costs will be measured again next time: {error.strerror}"
        )


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "model\t", "stepping", "flags")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
