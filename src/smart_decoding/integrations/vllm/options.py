"""Options of the vLLM scheduler, and the reasons to refuse or not to act. Imports no vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from smart_decoding.errors import ConfigError
from smart_decoding.integrations.vllm.seams import find

METHODS = ("ngram", "draft_model", "eagle", "eagle3", "mtp")  # they draft only the requested tokens


@dataclass(frozen=True, slots=True)
class Options:
    """`--additional-config '{"smart": {...}}'`.

    enabled: false leaves everything to vLLM. exploration_budget: share of the time for checking
    lengths that are not predicted best. metrics_port: port of Prometheus metrics on 127.0.0.1 (0:
    none)."""

    enabled: bool = True
    exploration_budget: float = 0.005
    metrics_port: int = 0


def read_options(additional_config: Any) -> Options:
    """Return our options in vLLM's additional_config.

    Raises ConfigError for unknown names and values of the wrong kind."""
    section = additional_config.get("smart", {}) if isinstance(additional_config, Mapping) else {}
    if not isinstance(section, Mapping):
        raise ConfigError('additional_config["smart"] must be a mapping of options')
    known = {field.name: type(field.default) for field in fields(Options)}
    for name, value in section.items():
        where = f"additional_config['smart'][{name!r}]"
        if name not in known:
            raise ConfigError(
                f"unknown option {name!r} of additional_config['smart']; known: {', '.join(known)}"
            )
        good = (int, float) if known[name] is float else known[name]
        if not isinstance(value, good) or (known[name] is not bool and isinstance(value, bool)):
            raise ConfigError(f"{where} must be of type {known[name].__name__}")
    options = Options(**section)
    if not 0.0 <= options.exploration_budget <= 0.5 or not 0 <= options.metrics_port <= 65535:
        raise ConfigError(
            "additional_config['smart']: exploration_budget is in [0, 0.5], "
            "metrics_port in [0, 65535]"
        )
    return options


def refuse_class(async_scheduling: Any, is_async: bool) -> None:
    """Raise ConfigError for the wrong one of the two classes, which does harm even when idle."""
    if async_scheduling in (True, False) and async_scheduling != is_async:
        required = "SmartAsyncScheduler" if async_scheduling else "SmartScheduler"
        raise ConfigError(
            f"async_scheduling is {'on' if async_scheduling else 'off'} here: use --scheduler-cls "
            f"smart_decoding.integrations.vllm.{required}"
        )


def refuse_layout(size: int, executor: Any) -> None:
    """Raise ConfigError for layouts in which the scheduler does harm. size: of data parallelism."""
    if executor == "external_launcher":
        raise ConfigError(
            "SMART's scheduler cannot run with distributed_executor_backend='external_launcher': "
            "every rank has a scheduler of its own there, and they would choose by their own clocks"
        )
    if size > 1:
        raise ConfigError(
            f"SMART's scheduler cannot run with data_parallel_size={size}: ranks that choose "
            "different draft lengths would wait for each other for ever; use tensor parallelism, "
            "or several servers"
        )


def refuse_missing(version: str, what: str, gone: Sequence[str]) -> None:
    """Raise ConfigError if this vLLM has not all names that the scheduler `what` relies on."""
    if gone:
        raise ConfigError(
            f"vLLM {version} has no {', '.join(gone)}: {what} needs it; leave out --scheduler-cls"
        )


def reason_for_stock(scheduler: object, options: Options) -> str | None:
    """Return why the scheduler should leave everything to vLLM, or None."""
    if not options.enabled:
        return "it is switched off (additional_config)"
    speculative = find(scheduler, "vllm_config.speculative_config")
    if speculative is None:
        return "there is no --speculative-config, hence nothing to choose"
    if find(speculative, "enable_adaptive_verification"):
        return "enable_adaptive_verification chooses how many drafts are verified, on the device"
    method = find(speculative, "method", METHODS[0])  # a name that is gone is refused afterwards
    if method not in METHODS or find(speculative, "parallel_drafting"):
        return f"the drafting method {method!r} drafts all tokens at once, or is not known"
    return None
