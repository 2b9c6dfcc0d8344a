"""What is kept on a model from call to call: how it may be run, what its forwards cost, and what a
policy learned."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from smart_decoding.core.cost import CostModel
from smart_decoding.core.policies import make_policy, policy_options
from smart_decoding.core.policies.protocol import Policy
from smart_decoding.drafters.ngram import NgramDrafter
from smart_decoding.drafters.recycling import RecyclingDrafter
from smart_decoding.drafters.union import UnionDrafter
from smart_decoding.engine.kv import PAGE
from smart_decoding.engine.protocols import Drafter, TargetScores
from smart_decoding.engine.rows import Rows
from smart_decoding.errors import ConfigError
from smart_decoding.integrations.transformers.draft_models import HostDraftModel, check_length
from smart_decoding.integrations.transformers.heads import HostHead
from smart_decoding.integrations.transformers.report import Report
from smart_decoding.integrations.transformers.sources import Source, key_of, load_source
from smart_decoding.integrations.transformers.state import setting_of, state_of
from smart_decoding.integrations.transformers.target import HostTarget
from smart_decoding.models.ranking import torch_top_k
from smart_decoding.models.target import pages_for
from smart_decoding.profiling.cache import load_profile, profile_path, save_profile
from smart_decoding.profiling.measure import CONTEXTS, MAX_ROWS, fake_rows, measure
from smart_decoding.speculation import ROUND_OVERHEAD, level_drafter, made, stored_prior

METHODS = ("ngram", "recycling", "eagle", "draft_model", "union", "none")
PROFILE_SECONDS = 2.0
SLOW = 100  # with fewer forwards than this in the given time, only batch size 1 is measured
VERY_SLOW = 30  # and with so few, at fewer sizes
CHAIN = {"ngram": {"occurrences": 1}, "recycling": {"successors": 1, "max_nodes": 8}}


@dataclass(slots=True)
class Drafting:
    """A policy and drafters, lent to one call at a time. free: those without a model of their
    own."""

    method: str
    policy: Policy
    free: list[Drafter]

    def drafter(self, source: Source | None, pages: int, positions: int) -> Drafter | None:
        """For one call, with room for so many pages and positions."""
        parts = ([source.drafter(pages, positions)] if source else []) + self.free
        return UnionDrafter(parts) if len(parts) > 1 else parts[0] if parts else None


def options_of(config: Mapping[str, Any] | bool | None) -> dict[str, Any]:
    """`speculative_config` in full. Raises ConfigError for unknown methods and policies."""
    if config is not None and not isinstance(config, bool | Mapping):
        raise ConfigError("speculative_config must be a dict, a bool or None")
    options = (
        dict(config)
        if isinstance(config, Mapping)
        else {}
        if config is not False
        else {"method": "none"}
    )
    options = {"method": "ngram", "policy": "smart", "profile_seconds": PROFILE_SECONDS, **options}
    if options["method"] not in METHODS:
        raise ConfigError(
            f"unknown method {options['method']!r}; choose one of: {', '.join(METHODS)}"
        )
    policy_options(options["policy"])
    return options


def source_for(
    model: PreTrainedModel, options: Mapping[str, Any], max_length: int
) -> Source | None:
    """The head or draft model that the options name, as an earlier call left it, or loaded; None if
    there is none.

    Raises SmartError, before any forward, if it does not fit."""
    key = key_of(options)
    if key is None:
        return None
    kept = state_of(model).sources.get(key)
    if kept is None:
        return load_source(model, options, max_length)
    if isinstance(kept, HostDraftModel):
        check_length(kept.model.config, max_length)  # of this call, which may be longer
    return state_of(model).sources.pop(key)


def borrow(
    model: PreTrainedModel,
    options: Mapping[str, Any],
    target: HostTarget,
    batch: int,
    source: Source | None,
) -> tuple[str, Drafting]:
    """The drafting for these options, as an earlier call left it, or new; give it back with
    `give_back`.

    Raises ConfigError for options that neither the method nor the policy has."""
    if source and not target.tree:
        source.widest = 1
    told = {**options, "model": key_of(options)} if source else options
    key = json.dumps(
        [told, target.eos_token_ids, target.tree, _bucket(batch)], sort_keys=True, default=str
    )
    known = state_of(model).idle.pop(key, None)
    return key, known or _new(model, dict(options), target, batch, source)


def give_back(
    model: PreTrainedModel,
    key: str,
    drafting: Drafting,
    options: Mapping[str, Any],
    source: Source | None,
    report: Report,
) -> None:
    state = state_of(model)
    state.idle[key], state.last = drafting, report
    if source:
        state.sources[key_of(options)] = source


def _new(
    model: PreTrainedModel,
    options: dict[str, Any],
    target: HostTarget,
    batch: int,
    source: Source | None,
) -> Drafting:
    method, policy, seconds = (
        options.pop(name) for name in ("method", "policy", "profile_seconds")
    )
    if method == "none":
        return Drafting(method, make_policy("off"), [])
    if source:
        del options["model"]
        options.pop("trust_pickle", None)
    chain = {} if target.tree else CHAIN
    makers: dict[str, Callable[[], Drafter]] = {
        "ngram": lambda: made(NgramDrafter, options, **chain.get("ngram", {})),
        "recycling": lambda: made(
            RecyclingDrafter,
            options,
            vocab=target.vocab,
            top_k=torch_top_k,
            **chain.get("recycling", {}),
        ),
    }
    if method == "union" and not target.tree:
        raise ConfigError(
            "method 'union' needs a tree mask, which this model's attention does not take: use ngram"
        )
    wanted = {
        "union": ["ngram"] if source else ["ngram", "recycling"],
        "eagle": [],
        "draft_model": [],
    }
    free = [makers[name]() for name in wanted.get(method, [method])]
    unknown = [name for name in options if name not in policy_options(policy)]
    if unknown:
        raise ConfigError(
            f"neither method {method!r} nor policy {policy!r} has an option {unknown[0]!r}"
        )
    offered: dict[str, Any] = {"eos_token_ids": target.eos_token_ids}
    if isinstance(source, HostHead):
        offered |= stored_prior(source.folder)
    if "cost" in policy_options(policy):
        offered["cost"] = _cost(model, target, batch, float(seconds), source)
    return Drafting(method, make_policy(policy, offered, **options), free)


def _cost(
    model: PreTrainedModel, target: HostTarget, batch: int, seconds: float, source: Source | None
) -> CostModel:
    """What forwards of this model, and of the drafter's, cost up to this batch size; a guess if
    `seconds` is 0.

    Measured at first use on this machine, and stored."""
    if seconds <= 0:
        return CostModel.default()
    state = state_of(model)
    key = (
        *setting_of(model),
        torch.get_num_threads(),
        _bucket(batch),
        target.tree,
        source and source.shape,
    )
    if key not in state.costs:
        path = _profile_path(model, key)
        cost = load_profile(path)
        if cost is None:
            cost = _measured(model, target, batch, seconds, source)
            save_profile(path, cost)
        state.costs[key] = cost
    return state.costs[key]


def _measured(
    model: PreTrainedModel, target: HostTarget, batch: int, seconds: float, source: Source | None
) -> CostModel:
    probe = _Probe(model, len(target.cache.layers), target.tree)
    window = getattr(model.config.get_text_config(decoder=True), "sliding_window", None)
    probe.max_positions = min(probe.max_positions, window or probe.max_positions)
    row = _one_row(probe)
    widest = _bucket(batch) if row < seconds / SLOW else 1
    pages = max(
        pages_for((CONTEXTS[0] + MAX_ROWS) * widest, 1), pages_for(CONTEXTS[1] + MAX_ROWS, 1)
    )
    drafter = level_drafter(source.drafter(pages, CONTEXTS[1] + MAX_ROWS) if source else None)
    samples = measure(probe, drafter, pages, widest, seconds, coarse=row > seconds / VERY_SLOW)  # type: ignore[arg-type]
    return CostModel.fit(samples, ROUND_OVERHEAD if source else 0.0)


def _profile_path(model: PreTrainedModel, key: tuple[object, ...]) -> Path:
    """Where the profile of a model of this shape lies, whatever its weights are."""
    shape = hashlib.sha256(model.config.to_json_string(use_diff=False).encode()).hexdigest()
    engine = {"engine": f"transformers {transformers.__version__}", "model": shape}
    return profile_path(engine, model.dtype, model.device, str(key), CONTEXTS[-1])


def _one_row(target: HostTarget) -> float:
    """Seconds of a forward of one row."""
    seconds = []
    for _ in range(2):
        rows = fake_rows(1, 1, PAGE, 2)
        assert rows is not None
        start = time.perf_counter()
        target.verify(rows, ())
        seconds.append(time.perf_counter() - start)
    return min(seconds)


class _Probe(HostTarget):
    """For measuring, whose made-up token ids may lie beyond a small vocabulary."""

    def verify(self, rows: Rows, aux_layers: tuple[int, ...]) -> TargetScores:
        rows.token %= self.vocab
        return super().verify(rows, aux_layers)


def _bucket(batch: int) -> int:
    """The power of two at or above it."""
    return 1 << (batch - 1).bit_length()
