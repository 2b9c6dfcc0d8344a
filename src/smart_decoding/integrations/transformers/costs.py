"""Costs of a transformers model's forwards: measured at first use, and stored."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from transformers import PreTrainedModel

from smart_decoding.core.costs import CostModel
from smart_decoding.engine.kv import PAGE
from smart_decoding.integrations.transformers.state import bucket, setting_of, state_of
from smart_decoding.integrations.transformers.target import HostTarget
from smart_decoding.models.target import pages_for
from smart_decoding.profiling.cache import load_profile, profile_path, save_profile
from smart_decoding.profiling.fit import fit_costs
from smart_decoding.profiling.measure import ForwardTimer, grid_of, least_seconds, verification
from smart_decoding.profiling.profile import ROUND_OVERHEAD
from smart_decoding.speculation import level_drafter

if TYPE_CHECKING:
    from smart_decoding.integrations.transformers.sources import DraftSource

SLOW = 100  # with fewer forwards than this in the given time, only batch size 1 is measured
VERY_SLOW = 30  # and with so few, at fewer sizes


def cost_of(
    target: HostTarget, batch: int, seconds: float, source: DraftSource | None
) -> CostModel:
    """Return the costs of forwards of the target and the drafter's model, up to this batch size.

    They are measured in about `seconds` at first use on this machine; 0: a guess."""
    if seconds <= 0:
        return CostModel.default()
    costs = state_of(target.model).costs
    shape = source and source.shape
    setting = setting_of(target.model)
    key = (*setting, torch.get_num_threads(), bucket(batch), target.tree, shape)
    if key not in costs:
        path = _profile_path(target.model, key)
        cost = load_profile(path)
        if cost is None:
            cost, busy = _measured(target, batch, seconds, source)
            save_profile(path, cost, str(target.model.config.name_or_path), busy)
        costs[key] = cost
    return costs[key]


def _measured(
    target: HostTarget, batch: int, seconds: float, source: DraftSource | None
) -> tuple[CostModel, bool]:
    """Return the costs, and whether the machine was busy."""
    model = target.model
    stand_in = HostTarget(model, len(target.cache.layers), target.tree)
    window = getattr(model.config.get_text_config(decoder=True), "sliding_window", None)
    stand_in.max_positions = min(stand_in.max_positions, window or stand_in.max_positions)
    row = _one_row(stand_in)
    widest = bucket(batch) if row < seconds / SLOW else 1
    grid = grid_of(model.device)
    shortest = grid.contexts[0] + grid.max_rows
    longest = grid.contexts[-1] + grid.max_rows
    pages = max(pages_for(shortest * widest, 1), pages_for(longest, 1))
    drafter = level_drafter(source.drafter(pages, longest, target.tree) if source else None)
    coarse = row > seconds / VERY_SLOW
    measurement = ForwardTimer(stand_in, drafter, pages, widest, seconds, coarse=coarse)  # type: ignore[arg-type]
    cost = fit_costs(measurement.run(), ROUND_OVERHEAD if source else 0.0)
    return cost, measurement.busy


def _profile_path(model: PreTrainedModel, key: tuple[object, ...]) -> Path:
    """Return the path of the profile of a model of this shape, with any weights."""
    shape = hashlib.sha256(model.config.to_json_string(use_diff=False).encode()).hexdigest()
    longest = grid_of(model.device).contexts[-1]
    engine = {"engine": f"transformers {transformers.__version__}", "model": shape}
    return profile_path(engine, model.dtype, model.device, str(key), longest)


def _one_row(target: HostTarget) -> float:
    """Return seconds of a forward of one row."""
    run = verification(target, 1, 1, PAGE, 2)  # type: ignore[arg-type]
    assert run is not None
    return least_seconds(run, 2)
