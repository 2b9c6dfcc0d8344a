"""Policies and drafters, kept on a model from call to call with their learned state."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from smart_decoding.core.policies import make_policy, policy_options
from smart_decoding.drafters import METHODS
from smart_decoding.errors import ConfigError
from smart_decoding.integrations.transformers.sources import Drafting, DraftSource
from smart_decoding.integrations.transformers.state import bucket, layers_of, layout_of, state_of

if TYPE_CHECKING:
    from smart_decoding.engine.protocols import Drafter
    from smart_decoding.integrations.transformers.target import HostTarget

WITH_MODEL = ("eagle", "draft_model")
PROFILE_SECONDS = 2.0


def options_of(config: Mapping[str, Any] | bool | None) -> dict[str, Any]:
    """Return the full `speculative_config`. Raises ConfigError for unknown methods and policies."""
    if config is not None and not isinstance(config, bool | Mapping):
        raise ConfigError("speculative_config must be a dict, a bool or None")
    options: dict[str, Any] = {
        "method": "none" if config is False else "ngram",
        "policy": "smart",
        "profile_seconds": PROFILE_SECONDS,
    }
    if isinstance(config, Mapping):
        options |= config
    known = [method for method in METHODS if method != "mtp"]  # transformers loads no such layer
    if options["method"] not in known:
        raise ConfigError(
            f"unknown method {options['method']!r}; choose one of: {', '.join(known)}"
        )
    policy_options(options["policy"])
    return options


def key_of(options: Mapping[str, Any]) -> str | None:
    """Return a key of the model that these options name; None if they need none."""
    method = options["method"]
    model = options.get("model")
    if method == "union" and model:
        method = "eagle"
    if method not in WITH_MODEL:
        return None
    return f"{method} {id(model)}" if isinstance(model, PreTrainedModel) else f"{method} {model}"


def load_source(
    target: PreTrainedModel, options: Mapping[str, Any], max_length: int
) -> DraftSource:
    """Load the head or draft model of `key_of`.

    Raises SmartError, before any forward of either model, if it does not fit."""
    if options["method"] != "draft_model":
        from smart_decoding.integrations.transformers.heads import load_host_head

        return load_host_head(target, options.get("model"), bool(options.get("trust_pickle")))
    from smart_decoding.integrations.transformers.draft_models import (
        HostDraftModel,
        load_draft_model,
    )

    model = load_draft_model(target, options.get("model"), max_length)
    layers = layers_of(model)
    vocab = int(target.config.get_text_config(decoder=True).vocab_size)
    return HostDraftModel(model, layers, layout_of(model, layers) == "tree", vocab)


def source_for(
    model: PreTrainedModel, options: Mapping[str, Any], max_length: int
) -> DraftSource | None:
    """Return the head or draft model that the options name, or None if there is none.

    It is kept from an earlier call, or loaded. Raises SmartError, before any forward, if it does
    not fit."""
    key = key_of(options)
    if key is None:
        return None
    kept = state_of(model).sources.get(key)
    if kept is None:
        return load_source(model, options, max_length)
    kept.check_length(max_length)  # this call may be longer
    return state_of(model).sources.pop(key)


@contextmanager
def borrowed(
    options: Mapping[str, Any], target: HostTarget, batch: int, source: DraftSource | None
) -> Iterator[Drafting]:
    """Yield the drafting for these options, kept from an earlier call, or new.

    At the end of the block it is kept for the next call, as is `source`. Raises ConfigError for
    options of neither the method nor the policy."""
    state = state_of(target.model)
    source_key = key_of(options)
    named = {**options, "model": source_key} if source else options
    setting = [named, target.eos_token_ids, target.tree, bucket(batch)]
    key = json.dumps(setting, sort_keys=True, default=str)
    drafting = state.idle.pop(key, None) or _new(dict(options), target, batch, source)
    drafting.source = source
    try:
        yield drafting
    finally:
        drafting.source = None
        state.idle[key] = drafting
        if source:
            state.sources[source_key] = source


def _new(
    options: dict[str, Any], target: HostTarget, batch: int, source: DraftSource | None
) -> Drafting:
    from smart_decoding.integrations.transformers.costs import cost_of
    from smart_decoding.speculation import ngram_drafter, stored_prior

    method = options.pop("method")
    policy = options.pop("policy")
    seconds = float(options.pop("profile_seconds"))
    if method == "none":
        return Drafting(method, make_policy("off"), [])
    if source:
        del options["model"]
        options.pop("trust_pickle", None)
    if method == "union" and not target.tree:
        raise ConfigError(
            "method 'union' needs a tree mask, which this model's attention does not take: "
            "use ngram"
        )
    free: list[Drafter] = []
    if method in ("ngram", "union"):
        chain = {} if target.tree else {"occurrences": 1}
        free.append(ngram_drafter(options, **chain))
    known = policy_options(policy)
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ConfigError(
            f"neither method {method!r} nor policy {policy!r} has an option {unknown[0]!r}"
        )
    offered: dict[str, Any] = {"eos_token_ids": target.eos_token_ids}
    if source:
        offered |= stored_prior(source.folder)
    if "cost" in known:
        offered["cost"] = cost_of(target, batch, seconds, source)
    return Drafting(method, make_policy(policy, offered, **options), free)
