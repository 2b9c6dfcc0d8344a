"""What the scheduler relies on in vLLM beyond its public interface, and the reasons not to act. Imports no vLLM.

tests/integrations/test_vllm_engine.py compares these names with the installed vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from smart_decoding.errors import ConfigError

TESTED = ("0.32",)  # minor versions that the tests were run on

# Of vllm.v1.core.sched.scheduler.Scheduler: methods that are overridden, and attributes.
METHODS = ("schedule", "update_from_output", "update_draft_token_ids", "_update_after_schedule", "shutdown")
ATTRIBUTES = {
    "dynamic_sd_lookup": "K by batch size, looked up once a step: replaced by ours",
    "num_spec_tokens": "the longest K",
    "requests": "request id -> Request",
    "running": "the running Requests, those of the step that is being scheduled included",
}
REQUEST = (
    "request_id", "spec_token_ids", "max_tokens", "num_output_tokens", "sampling_params", "is_prefill_chunk",
    "is_finished",
)  # fmt: skip
DRAFT_TOKEN_IDS = ("req_ids",)
SCHEDULER_OUTPUT = (
    "num_scheduled_tokens", "total_num_scheduled_tokens", "scheduled_spec_decode_tokens", "num_spec_tokens_to_schedule"
)  # fmt: skip
REJECTION_SAMPLER = ("forward",)  # replaced by shortcuts.py, which calls the `sampler` that it is made with
SPEC_DECODE_METADATA = ("num_draft_tokens",)  # of each request, as a list
RUNNER_OUTPUT = ("req_ids", "req_id_to_index", "sampled_token_ids")

FREE = ("ngram", "suffix")  # drafters that run no model
MODEL = ("draft_model", "eagle", "eagle3", "mtp")


@dataclass(frozen=True, slots=True)
class Options:
    """`--additional-config '{"smart": {...}}'`.

    enabled: false leaves everything to vLLM. probe_budget: share of the time for checking the mode believed worse.
    metrics_port: port of Prometheus metrics on 127.0.0.1 (0: none). allow_untested: act in other versions too, if they
    have all names that are relied on. shortcuts: skip vLLM's work for drafts in steps without any (shortcuts.py)."""

    enabled: bool = True
    shortcuts: bool = True
    probe_budget: float = 0.005
    metrics_port: int = 0
    allow_untested: bool = False


def read_options(additional_config: Any) -> Options:
    """Our part of vLLM's additional_config. Raises ConfigError for unknown names and values of the wrong kind."""
    given = additional_config.get("smart", {}) if isinstance(additional_config, Mapping) else {}
    if not isinstance(given, Mapping):
        raise ConfigError('additional_config["smart"] must be a mapping of options')
    known = {field.name: type(field.default) for field in fields(Options)}
    for name, value in given.items():
        if name not in known:
            raise ConfigError(f"unknown option {name!r} of additional_config['smart']; known: {', '.join(known)}")
        good = (int, float) if known[name] is float else known[name]
        if not isinstance(value, good) or (known[name] is not bool and isinstance(value, bool)):
            raise ConfigError(f"additional_config['smart'][{name!r}] must be of type {known[name].__name__}")
    options = Options(**given)
    if not 0.0 <= options.probe_budget <= 0.5 or not 0 <= options.metrics_port <= 65535:
        raise ConfigError("additional_config['smart']: probe_budget is in [0, 0.5], metrics_port in [0, 65535]")
    return options


def refuse(data_parallel_size: int, async_scheduling: bool, is_async: bool) -> None:
    """Raises ConfigError for set-ups in which the scheduler would do harm."""
    if data_parallel_size > 1:
        raise ConfigError(
            f"SMART's scheduler cannot run with data_parallel_size={data_parallel_size}: ranks that choose different "
            "draft lengths would wait for each other for ever; use tensor parallelism, or several servers"
        )
    if async_scheduling != is_async:
        wanted = "SmartAsyncScheduler" if async_scheduling else "SmartScheduler"
        raise ConfigError(
            f"async_scheduling is {'on' if async_scheduling else 'off'} here: use --scheduler-cls "
            f"smart_decoding.integrations.vllm.{wanted}"
        )


def reason_for_stock(version: str, speculative: Any, scheduler: object, options: Options) -> str | None:
    """Why the scheduler should leave everything to vLLM, or None."""
    if not options.enabled:
        return "it is switched off (additional_config)"
    if speculative is None:
        return "there is no --speculative-config, hence nothing to choose"
    if not options.allow_untested and ".".join(version.split(".")[:2]) not in TESTED:
        return f"vLLM {version} is not a version that it was tested with ({', '.join(TESTED)}; allow_untested to try)"
    missing = [n for n in METHODS if not callable(getattr(type(scheduler), n, None))]
    missing += [n for n in ATTRIBUTES if not hasattr(scheduler, n)]
    if missing:
        return f"vLLM {version} has no {', '.join(missing)}"
    if speculative.method not in (*FREE, *MODEL) or getattr(speculative, "parallel_drafting", False):
        return f"the drafting method {speculative.method!r} drafts all tokens at once, or is not known"
    return None
