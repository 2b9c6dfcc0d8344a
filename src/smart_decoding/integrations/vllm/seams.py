"""Names in vLLM that the scheduler relies on, beyond its public interface. Imports no vLLM."""

from __future__ import annotations

import dis
import inspect
from importlib import import_module
from typing import Any

from smart_decoding.integrations import seams

# Attributes of a live scheduler and its configuration: the reason to read each.
ATTRIBUTES = {
    "dynamic_sd_lookup": "K by batch size, looked up once a step: replaced by ours",
    "num_spec_tokens": "the longest K",
    "vllm_config.additional_config": "our options",
    "vllm_config.compilation_config.cudagraph_capture_sizes": "tokens of the captured graphs",
    "vllm_config.compilation_config.cudagraph_mode": "whether graphs are for decoding only",
    "vllm_config.compilation_config.max_cudagraph_capture_size": "tokens of the largest one",
    "vllm_config.parallel_config.data_parallel_size": "refused above 1",
    "vllm_config.parallel_config.distributed_executor_backend": "refused: external_launcher",
    "vllm_config.scheduler_config.async_scheduling": "which of our classes is the right one",
    "vllm_config.scheduler_config.max_num_seqs": "requests of the largest graph",
    "vllm_config.speculative_config": "None: nothing is drafted",
    "vllm_config.use_v2_model_runner": "it captures graphs for every K of a schedule",
}
# Of the speculative config, where there is one.
SPECULATIVE = ("method", "parallel_drafting", "enable_adaptive_verification")


_SCHED = "vllm.v1.core.sched."
# Methods that ours override and call, and fields that are read.
USED: dict[str, dict[str, seams.Parameters]] = {
    f"{_SCHED}scheduler": {"Scheduler.schedule": None, "Scheduler.shutdown": None},
    f"{_SCHED}async_scheduler": {"AsyncScheduler.schedule": None},
    f"{_SCHED}output": {
        "SchedulerOutput.num_scheduled_tokens": None,
        "SchedulerOutput.total_num_scheduled_tokens": None,
        "SchedulerOutput.scheduled_spec_decode_tokens": None,
        "SchedulerOutput.num_spec_tokens_to_schedule": None,
    },
    "vllm.v1.outputs": {
        "ModelRunnerOutput.req_id_to_index": None,
        "ModelRunnerOutput.sampled_token_ids": None,
    },
}
REPLACED: dict[str, dict[str, seams.Parameters]] = {
    f"{_SCHED}scheduler": {
        "Scheduler.update_from_output": ("scheduler_output", "model_runner_output")
    }
}


def find(thing: object, path: str, default: Any = None) -> Any:
    """thing.a.b for the path "a.b"; `default` where there is no such name."""
    for name in path.split("."):
        if not hasattr(thing, name):
            return default
        thing = getattr(thing, name)
    return thing


def missing() -> list[str]:
    """Return names that the installed vLLM lacks or changed, as 'module.name'."""
    return [*seams.lacking(USED), *seams.lacking(REPLACED, ())]


def missing_attributes(scheduler: object) -> list[str]:
    """Return the names of ATTRIBUTES and SPECULATIVE that this scheduler lacks."""
    speculative = "vllm_config.speculative_config"
    paths = [*ATTRIBUTES]
    if find(scheduler, speculative) is not None:
        paths += [f"{speculative}.{name}" for name in SPECULATIVE]
    nothing = object()
    return [f"scheduler.{path}" for path in paths if find(scheduler, path, nothing) is nothing]


def reads(place: str, parameter: str) -> bool:
    """Return whether the method "module:Class.method" reads a parameter; also where there is
    none."""
    module, _, path = place.partition(":")
    try:
        method = find(import_module(module), path)
    except ImportError:
        return True
    code = getattr(inspect.unwrap(method), "__code__", None)
    return code is None or any(i.argval == parameter for i in dis.get_instructions(code))
