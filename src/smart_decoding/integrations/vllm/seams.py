"""What the scheduler relies on in vLLM beyond its public interface, and the reasons not to act.
Imports no vLLM.

`missing` compares these names with the installed vLLM: at every start, and in
tests/integrations/test_vllm_engine.py.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any

from smart_decoding.errors import ConfigError

TESTED = ("0.32",)  # minor versions that the tests were run on

# Of a live scheduler: attributes, and what is read of its configuration.
ATTRIBUTES = {
    "dynamic_sd_lookup": "K by batch size, looked up once a step: replaced by ours",
    "num_spec_tokens": "the longest K",
    "requests": "request id -> Request",
    "running": "the running Requests, those of the step that is being scheduled included",
    "vllm_config.additional_config": "our options",
    "vllm_config.parallel_config.data_parallel_size": "refused above 1",
    "vllm_config.parallel_config.distributed_executor_backend": "mp: ranks in processes of their own (ranks.py)",
    "vllm_config.parallel_config.nnodes": "machines that they are on",
    "vllm_config.scheduler_config.async_scheduling": "which of our classes is the right one",
    "vllm_config.speculative_config": "None: nothing is drafted",
}
SPECULATIVE = (
    "method",
    "parallel_drafting",
    "num_speculative_tokens_per_batch_size",
)  # of that, where there is one

# Of vLLM's classes (module:class): methods that are overridden or replaced, attributes that are
# read.
CLASSES = {
    "vllm.v1.core.sched.scheduler:Scheduler": (
        "schedule",
        "update_from_output",
        "update_draft_token_ids",
        "_update_after_schedule",
        "shutdown",
    ),
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler": ("_update_after_schedule",),
    "vllm.v1.core.sched.output:SchedulerOutput": (
        "num_scheduled_tokens",
        "total_num_scheduled_tokens",
        "scheduled_spec_decode_tokens",
        "num_spec_tokens_to_schedule",
    ),
    "vllm.v1.outputs:ModelRunnerOutput": ("req_ids", "req_id_to_index", "sampled_token_ids"),
    "vllm.v1.outputs:DraftTokenIds": ("req_ids",),
    "vllm.v1.request:Request": (
        "request_id",
        "spec_token_ids",
        "max_tokens",
        "num_output_tokens",
        "sampling_params",
        "is_prefill_chunk",
        "is_finished",
    ),
    "vllm.v1.spec_decode.metadata:SpecDecodeMetadata": (
        "num_draft_tokens",
    ),  # of each request, as a list
    "vllm.v1.sample.rejection_sampler:RejectionSampler": ("forward", "sampler"),  # shortcuts.py
    "vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer": (
        "propose",
        "_last_draft_probs",
    ),  # shortcuts.py
    "vllm.v1.executor.multiproc_executor:MultiprocExecutor": ("take_draft_token_ids",),  # ranks.py
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner": (  # shortcuts.py
        "execute_model",
        "sample_tokens",
        "execute_model_state",
        "speculative_config",
        "use_async_scheduling",
        "model_config",
        "input_batch",
    ),
    "vllm.v1.worker.gpu_input_batch:InputBatch": ("thinking_budget_state_holder",),  # shortcuts.py
    "vllm.v1.worker.gpu_model_runner:ExecuteModelState": ("scheduler_output",),
}
# All parameters of methods that ours take the place of; of those that are called, the keywords that
# are given.
REPLACED = {
    "vllm.v1.core.sched.scheduler:Scheduler.update_from_output": (
        "scheduler_output",
        "model_runner_output",
    ),
    "vllm.v1.core.sched.scheduler:Scheduler.update_draft_token_ids": ("draft_token_ids",),
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler._update_after_schedule": (
        "scheduler_output",
    ),
    "vllm.v1.sample.rejection_sampler:RejectionSampler.forward": (
        "metadata",
        "draft_probs",
        "logits",
        "sampling_metadata",
    ),
    "vllm.v1.executor.multiproc_executor:MultiprocExecutor.take_draft_token_ids": (),
}
CALLED = {
    "vllm.v1.sample.sampler:Sampler.forward": (
        "logits",
        "sampling_metadata",
        "predict_bonus_token",
    ),
    "vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer.propose": (
        "num_speculative_tokens",
        "next_token_ids",
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.execute_model": ("scheduler_output",),
}
# Classes whose objects are pickled by their attributes, to which one is added (ranks.py).
PICKLED = ("vllm.v1.outputs:ModelRunnerOutput",)

FREE = ("ngram", "suffix")  # drafters that run no model
MODEL = ("draft_model", "eagle", "eagle3", "mtp")


@dataclass(frozen=True, slots=True)
class Options:
    """`--additional-config '{"smart": {...}}'`.

    enabled: false leaves everything to vLLM. probe_budget: share of the time for checking the mode
    believed worse. metrics_port: port of Prometheus metrics on 127.0.0.1 (0: none). allow_untested:
    act in other versions too, if they have all names that are relied on. shortcuts: skip vLLM's
    work for drafts in steps without any, a draft model's pass included where it does not pay
    (shortcuts.py)."""

    enabled: bool = True
    shortcuts: bool = True
    probe_budget: float = 0.005
    metrics_port: int = 0
    allow_untested: bool = False


def read_options(additional_config: Any) -> Options:
    """Our part of vLLM's additional_config. Raises ConfigError for unknown names and values of the
    wrong kind."""
    given = additional_config.get("smart", {}) if isinstance(additional_config, Mapping) else {}
    if not isinstance(given, Mapping):
        raise ConfigError('additional_config["smart"] must be a mapping of options')
    known = {field.name: type(field.default) for field in fields(Options)}
    for name, value in given.items():
        if name not in known:
            raise ConfigError(
                f"unknown option {name!r} of additional_config['smart']; known: {', '.join(known)}"
            )
        good = (int, float) if known[name] is float else known[name]
        if not isinstance(value, good) or (known[name] is not bool and isinstance(value, bool)):
            raise ConfigError(
                f"additional_config['smart'][{name!r}] must be of type {known[name].__name__}"
            )
    options = Options(**given)
    if not 0.0 <= options.probe_budget <= 0.5 or not 0 <= options.metrics_port <= 65535:
        raise ConfigError(
            "additional_config['smart']: probe_budget is in [0, 0.5], metrics_port in [0, 65535]"
        )
    return options


def refuse_class(async_scheduling: Any, is_async: bool) -> None:
    """Raises ConfigError for the wrong one of the two classes, which would do harm whether it acts
    or not."""
    if async_scheduling in (True, False) and async_scheduling != is_async:
        wanted = "SmartAsyncScheduler" if async_scheduling else "SmartScheduler"
        raise ConfigError(
            f"async_scheduling is {'on' if async_scheduling else 'off'} here: use --scheduler-cls "
            f"smart_decoding.integrations.vllm.{wanted}"
        )


def refuse_layout(size: int, executor: Any) -> None:
    """Raises ConfigError where the scheduler would act and do harm. size: of data parallelism."""
    if executor == "external_launcher":
        raise ConfigError(
            "SMART's scheduler cannot run with distributed_executor_backend='external_launcher': every rank has a "
            "scheduler of its own there, and they would choose by their own clocks"
        )
    if size > 1:
        raise ConfigError(
            f"SMART's scheduler cannot run with data_parallel_size={size}: ranks that choose different "
            "draft lengths would wait for each other for ever; use tensor parallelism, or several servers"
        )


def find(thing: object, path: str, default: Any = None) -> Any:
    """thing.a.b for the path "a.b"; `default` where there is no such name."""
    for name in path.split("."):
        if not hasattr(thing, name):
            return default
        thing = getattr(thing, name)
    return thing


def missing(scheduler: object) -> list[str]:
    """Names listed above that this scheduler, its configuration or the installed vLLM's classes
    have not."""
    return [
        *missing_attributes(scheduler),
        *missing_members(),
        *missing_parameters(),
        *missing_pickles(),
    ]


def missing_attributes(scheduler: object) -> Iterable[str]:
    speculative = "vllm_config.speculative_config"
    paths = [*ATTRIBUTES]
    if find(scheduler, speculative) is not None:
        paths += [f"{speculative}.{name}" for name in SPECULATIVE]
    nothing = object()
    return (f"scheduler.{path}" for path in paths if find(scheduler, path, nothing) is nothing)


def missing_members() -> Iterable[str]:
    for place, names in CLASSES.items():
        kind = _imported(place)
        init = getattr(inspect.unwrap(kind.__init__), "__code__", None)  # it may be decorated
        stored = (
            {i.argval for i in dis.get_instructions(init) if i.opname == "STORE_ATTR"}
            if init
            else set()
        )
        known = stored | set(getattr(kind, "__dataclass_fields__", ()))
        yield from (
            f"{place}.{name}" for name in names if name not in known and not hasattr(kind, name)
        )


def missing_parameters() -> Iterable[str]:
    for place, names in (REPLACED | CALLED).items():
        method = _imported(place)
        taken = list(inspect.signature(method).parameters)[1:] if callable(method) else None
        if taken is None or (
            taken != list(names) if place in REPLACED else not set(names) <= set(taken)
        ):
            yield f"{place}({', '.join(names)})"


def missing_pickles() -> Iterable[str]:
    ways = ("__slots__", "__getstate__", "__setstate__", "__reduce__", "__reduce_ex__")
    for place in PICKLED:
        bases = getattr(_imported(place), "__mro__", ())[:-1]  # without object
        yield from (
            f"{place} without a {way} of its own"
            for way in ways
            if any(way in vars(base) for base in bases)
        )


def _imported(place: str) -> Any:
    """What "module:Class.method" names, or None."""
    module, _, path = place.partition(":")
    try:
        return find(import_module(module), path)
    except ImportError:
        return None


def reason_for_stock(
    version: str,
    scheduler: object,
    options: Options,
    missing: Callable[[object], list[str]] = missing,
) -> str | None:
    """Why the scheduler should leave everything to vLLM, or None. Raises nothing, whatever that
    vLLM has."""
    if not options.enabled:
        return "it is switched off (additional_config)"
    if not options.allow_untested and ".".join(version.split(".")[:2]) not in TESTED:
        return f"vLLM {version} is not a version that it was tested with ({', '.join(TESTED)}; allow_untested to try)"
    gone = missing(scheduler)
    if gone:
        return f"vLLM {version} has no {', '.join(gone)}"
    speculative = find(scheduler, "vllm_config.speculative_config")
    if speculative is None:
        return "there is no --speculative-config, hence nothing to choose"
    if speculative.method not in (*FREE, *MODEL) or speculative.parallel_drafting:
        return (
            f"the drafting method {speculative.method!r} drafts all tokens at once, or is not known"
        )
    return None
