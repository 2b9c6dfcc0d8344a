"""What the scheduler relies on in vLLM beyond its public interface. Imports no vLLM.

`missing` compares these names with the installed vLLM: at every start, and in
tests/integrations/test_vllm_engine.py.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterable
from importlib import import_module
from typing import Any

# Of a live scheduler: attributes, and what is read of its configuration.
ATTRIBUTES = {
    "dynamic_sd_lookup": "K by batch size, looked up once a step: replaced by ours",
    "num_spec_tokens": "the longest K",
    "requests": "request id -> Request",
    "running": "the running Requests, those of the step that is being scheduled included",
    "vllm_config.additional_config": "our options",
    "vllm_config.parallel_config.data_parallel_size": "refused above 1",
    "vllm_config.parallel_config.distributed_executor_backend": "mp: ranks in processes (ranks.py)",
    "vllm_config.parallel_config.nnodes": "machines that they are on",
    "vllm_config.scheduler_config.async_scheduling": "which of our classes is the right one",
    "vllm_config.speculative_config": "None: nothing is drafted",
}
# Of the last, where there is one.
SPECULATIVE = ("method", "parallel_drafting", "num_speculative_tokens_per_batch_size")

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
    # Of each request, as a list.
    "vllm.v1.spec_decode.metadata:SpecDecodeMetadata": ("num_draft_tokens",),
    "vllm.v1.sample.rejection_sampler:RejectionSampler": ("forward", "sampler"),  # shortcuts.py
    "vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer": (  # shortcuts.py
        "propose",
        "_last_draft_probs",
    ),
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


def find(thing: object, path: str, default: Any = None) -> Any:
    """thing.a.b for the path "a.b"; `default` where there is no such name."""
    for name in path.split("."):
        if not hasattr(thing, name):
            return default
        thing = getattr(thing, name)
    return thing


def missing(scheduler: object) -> list[str]:
    """Names listed above that this scheduler, its configuration or vLLM's classes have not."""
    return [
        *missing_attributes(scheduler),
        *missing_members(),
        *missing_parameters(),
        *missing_pickles(),
    ]


def missing_attributes(scheduler: object) -> Iterable[str]:
    """Of ATTRIBUTES and SPECULATIVE."""
    speculative = "vllm_config.speculative_config"
    paths = [*ATTRIBUTES]
    if find(scheduler, speculative) is not None:
        paths += [f"{speculative}.{name}" for name in SPECULATIVE]
    nothing = object()
    return (f"scheduler.{path}" for path in paths if find(scheduler, path, nothing) is nothing)


def missing_members() -> Iterable[str]:
    """Of CLASSES."""
    for place, names in CLASSES.items():
        kind = _imported(place)
        init = getattr(inspect.unwrap(kind.__init__), "__code__", None)  # it may be decorated
        known = set(getattr(kind, "__dataclass_fields__", ()))
        if init:
            known |= {i.argval for i in dis.get_instructions(init) if i.opname == "STORE_ATTR"}
        yield from (
            f"{place}.{name}" for name in names if name not in known and not hasattr(kind, name)
        )


def missing_parameters() -> Iterable[str]:
    """Of REPLACED and CALLED."""
    for place, names in (REPLACED | CALLED).items():
        method = _imported(place)
        if callable(method):
            taken = list(inspect.signature(method).parameters)[1:]
            fits = taken == list(names) if place in REPLACED else set(names) <= set(taken)
        else:
            fits = False
        if not fits:
            yield f"{place}({', '.join(names)})"


def missing_pickles() -> Iterable[str]:
    """Of PICKLED: what pickles its objects otherwise than by their attributes."""
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
