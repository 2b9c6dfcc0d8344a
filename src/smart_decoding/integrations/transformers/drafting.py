"""What is kept on a model from call to call: how it may be run, what its forwards cost, and what a policy learned."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from smart_decoding.backends.torch.target import pages_for
from smart_decoding.core.cost import CostModel
from smart_decoding.core.policies import make_policy, policy_options
from smart_decoding.core.policies.protocol import Policy
from smart_decoding.drafters.ngram import NgramDrafter
from smart_decoding.drafters.recycling import RecyclingDrafter, torch_top_k
from smart_decoding.drafters.union import UnionDrafter
from smart_decoding.engine.kv import PAGE
from smart_decoding.engine.protocols import Drafter, TargetScores
from smart_decoding.engine.rows import Rows
from smart_decoding.errors import ConfigError, ModelError
from smart_decoding.integrations.transformers.checks import fitting_layout
from smart_decoding.integrations.transformers.report import Report
from smart_decoding.integrations.transformers.target import HostTarget
from smart_decoding.profiling.measure import CONTEXTS, MAX_ROWS, fake_rows, measure

ATTRIBUTE = "_smart_decoding"  # on the model
METHODS = ("ngram", "recycling", "union", "none")
PROFILE_SECONDS = 2.0
SLOW = 100  # with fewer forwards than this in the given time, only batch size 1 is measured
CHAIN = {"ngram": {"occurrences": 1}, "recycling": {"successors": 1, "max_nodes": 8}}


@dataclass(slots=True)
class Drafting:
    """A policy and a drafter, lent to one call at a time."""

    method: str
    policy: Policy
    drafter: Drafter | None


@dataclass
class ModelState:
    """All that is remembered of one model. layouts, costs: by attention, dtype, device; idle: by configuration."""

    layouts: dict[tuple[object, ...], str] = field(default_factory=dict)
    costs: dict[tuple[object, ...], CostModel] = field(default_factory=dict)
    idle: dict[str, Drafting] = field(default_factory=dict)
    last: Report | None = None


def state_of(model: PreTrainedModel) -> ModelState:
    """The model's state, made at first use."""
    state = getattr(model, ATTRIBUTE, None)
    if not isinstance(state, ModelState):
        state = ModelState()
        setattr(model, ATTRIBUTE, state)
    return state


def options_of(config: Mapping[str, Any] | bool | None) -> dict[str, Any]:
    """`speculative_config` in full. Raises ConfigError for unknown methods and policies."""
    if config is not None and not isinstance(config, bool | Mapping):
        raise ConfigError("speculative_config must be a dict, a bool or None")
    options = dict(config) if isinstance(config, Mapping) else {} if config is not False else {"method": "none"}
    options = {"method": "ngram", "policy": "smart", "profile_seconds": PROFILE_SECONDS, **options}
    if options["method"] not in METHODS:
        raise ConfigError(f"unknown method {options['method']!r}; choose one of: {', '.join(METHODS)}")
    policy_options(options["policy"])
    return options


def layout_of(model: PreTrainedModel, layers: int) -> str:
    """'tree' or 'chain', found once. Raises ModelError for a model whose logits change through our cache."""
    state, key = state_of(model), _setting(model)
    if key not in state.layouts:
        layout = fitting_layout(model, layers)
        if layout is None:
            raise ModelError(
                f"{type(model).__name__} ({key[0]} attention) gives other logits through a cache that we manage than "
                "without: it cannot be used here"
            )
        state.layouts[key] = layout
    return state.layouts[key]


def borrow(model: PreTrainedModel, options: Mapping[str, Any], target: HostTarget, batch: int) -> tuple[str, Drafting]:
    """The drafting for these options, as an earlier call left it, or new; give it back with `give_back`.

    Raises ConfigError for options that neither the method nor the policy has."""
    key = json.dumps([options, target.eos_token_ids, target.tree, _bucket(batch)], sort_keys=True, default=str)
    known = state_of(model).idle.pop(key, None)
    return key, known or _new(model, dict(options), target, batch)


def give_back(model: PreTrainedModel, key: str, drafting: Drafting, report: Report) -> None:
    state = state_of(model)
    state.idle[key], state.last = drafting, report


def _new(model: PreTrainedModel, options: dict[str, Any], target: HostTarget, batch: int) -> Drafting:
    method, policy, seconds = (options.pop(name) for name in ("method", "policy", "profile_seconds"))
    if method == "none":
        return Drafting(method, make_policy("off"), None)
    chain = {} if target.tree else CHAIN
    makers: dict[str, Callable[[], Drafter]] = {
        "ngram": lambda: _made(NgramDrafter, options, chain.get("ngram", {})),
        "recycling": lambda: _made(
            RecyclingDrafter, options, {"vocab": target.vocab, "top_k": torch_top_k, **chain.get("recycling", {})}
        ),
    }
    if method == "union" and not target.tree:
        raise ConfigError("method 'union' needs a tree mask, which this model's attention does not take: use ngram")
    drafter = UnionDrafter([make() for make in makers.values()]) if method == "union" else makers[method]()
    unknown = [name for name in options if name not in policy_options(policy)]
    if unknown:
        raise ConfigError(f"neither method {method!r} nor policy {policy!r} has an option {unknown[0]!r}")
    offered: dict[str, Any] = {"eos_token_ids": target.eos_token_ids}
    if "cost" in policy_options(policy):
        offered["cost"] = _cost(model, target, batch, float(seconds))
    return Drafting(method, make_policy(policy, offered, **options), drafter)


def _made(cls: Callable[..., Drafter], options: dict[str, Any], fixed: Mapping[str, Any]) -> Drafter:
    """The drafter, with those of the options that it has; they are taken out of `options`."""
    names = [name for name in inspect.signature(cls).parameters if name in options and name not in fixed]
    return cls(**fixed, **{name: options.pop(name) for name in names})


def _cost(model: PreTrainedModel, target: HostTarget, batch: int, seconds: float) -> CostModel:
    """What this model's forwards cost up to this batch size, measured at first use; a guess if `seconds` is 0."""
    if seconds <= 0:
        return CostModel.default()
    state, key = state_of(model), (*_setting(model), torch.get_num_threads(), _bucket(batch))
    if key not in state.costs:
        probe = _Probe(model, len(target.cache.layers), target.tree)
        window = getattr(model.config.get_text_config(decoder=True), "sliding_window", None)
        probe.max_positions = min(probe.max_positions, window or probe.max_positions)
        widest = _bucket(batch) if _one_row(probe) < seconds / SLOW else 1
        pages = max(pages_for((CONTEXTS[0] + MAX_ROWS) * widest, 1), pages_for(CONTEXTS[1] + MAX_ROWS, 1))
        state.costs[key] = CostModel.fit(measure(probe, None, pages, widest, seconds))  # type: ignore[arg-type]
    return state.costs[key]


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

    def verify(self, rows: Rows, taps: tuple[int, ...]) -> TargetScores:
        rows.token %= self.vocab
        return super().verify(rows, taps)


def _setting(model: PreTrainedModel) -> tuple[object, ...]:
    return (str(model.config._attn_implementation), str(model.dtype), str(model.device))


def _bucket(batch: int) -> int:
    """The power of two at or above it."""
    return 1 << (batch - 1).bit_length()
