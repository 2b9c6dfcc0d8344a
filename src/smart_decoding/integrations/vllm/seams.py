"""What is relied on in vLLM beyond its public interface, by what relies on it. Imports no vLLM.

`missing` compares these names with the installed vLLM at every start, so that no version is refused
by its number: SCHEDULER for the scheduler, SHORTCUTS for the shortcuts, VERIFICATION for the costs
of adaptive verification.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
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
    "vllm_config.use_v2_model_runner": "it has nothing to shorten",
}
# Of the speculative config, where there is one.
SPECULATIVE = (
    "method",
    "parallel_drafting",
    "num_speculative_tokens_per_batch_size",
    "enable_adaptive_verification",
)


@dataclass(frozen=True, slots=True)
class Seams:
    """Places are "module:Class" or "module:Class.method".

    classes: methods that are overridden or replaced, attributes that are read. replaced: all
    parameters of methods that ours take the place of. called: the keywords that are given to
    methods. pickled: classes whose objects are pickled by their attributes, to which one is added.
    """

    classes: Mapping[str, tuple[str, ...]]
    replaced: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    called: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    pickled: tuple[str, ...] = ()


_SCHED = "vllm.v1.core.sched."
SCHEDULER = Seams(
    classes={
        f"{_SCHED}scheduler:Scheduler": (
            "schedule",
            "update_from_output",
            "update_draft_token_ids",
            "_update_after_schedule",
            "shutdown",
        ),
        f"{_SCHED}async_scheduler:AsyncScheduler": ("_update_after_schedule",),
        f"{_SCHED}output:SchedulerOutput": (
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
    },
    replaced={
        f"{_SCHED}scheduler:Scheduler.update_from_output": (
            "scheduler_output",
            "model_runner_output",
        ),
        f"{_SCHED}scheduler:Scheduler.update_draft_token_ids": ("draft_token_ids",),
        f"{_SCHED}async_scheduler:AsyncScheduler._update_after_schedule": ("scheduler_output",),
    },
)

_RUNNER = "vllm.v1.worker.gpu_model_runner:"
SHORTCUTS = Seams(
    classes={
        # Of each request, as a list.
        "vllm.v1.spec_decode.metadata:SpecDecodeMetadata": ("num_draft_tokens",),
        "vllm.v1.sample.rejection_sampler:RejectionSampler": ("forward", "sampler"),
        "vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer": (
            "propose",
            "_last_draft_probs",
        ),
        "vllm.v1.executor.multiproc_executor:MultiprocExecutor": ("take_draft_token_ids",),
        f"{_RUNNER}GPUModelRunner": (
            "execute_model",
            "sample_tokens",
            "execute_model_state",
            "speculative_config",
            "use_async_scheduling",
            "model_config",
            "input_batch",
        ),
        "vllm.v1.worker.gpu_input_batch:InputBatch": ("thinking_budget_state_holder",),
        f"{_RUNNER}ExecuteModelState": ("scheduler_output",),
    },
    replaced={
        "vllm.v1.sample.rejection_sampler:RejectionSampler.forward": (
            "metadata",
            "draft_probs",
            "logits",
            "sampling_metadata",
        ),
        "vllm.v1.executor.multiproc_executor:MultiprocExecutor.take_draft_token_ids": (),
    },
    called={
        "vllm.v1.sample.sampler:Sampler.forward": (
            "logits",
            "sampling_metadata",
            "predict_bonus_token",
        ),
        "vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer.propose": (
            "num_speculative_tokens",
            "next_token_ids",
        ),
        f"{_RUNNER}GPUModelRunner.execute_model": ("scheduler_output",),
    },
    pickled=("vllm.v1.outputs:ModelRunnerOutput",),
)

_GPU = "vllm.v1.worker.gpu."
MANAGER = f"{_GPU}spec_decode.adaptive_verification:AdaptiveVerificationManager"
VERIFICATION = Seams(
    classes={
        MANAGER: ("cost_tables", "req_states"),
        f"{_GPU}states:RequestState": (
            "req_id_to_index",
            "num_computed_tokens_np",
            "max_num_reqs",
            "max_model_len",
        ),
        f"{_GPU}async_utils:StepTimingSample": (
            "forward_ms",
            "drafter_ms",
            "num_target_tokens",
            "num_reqs",
            "full_cudagraph",
        ),
    },
    replaced={
        f"{MANAGER}.batches_to_profile": ("capture_sizes",),
        f"{MANAGER}.set_initial_cost_curves": ("samples",),
        f"{MANAGER}.get_num_tokens": ("num_tokens_per_req", "draft_tokens"),
        f"{MANAGER}.reallocate_drafts": ("req_ids", "idx_mapping"),
        f"{MANAGER}.record_confidences": ("confidence_probs", "input_batch"),
    },
)


def find(thing: object, path: str, default: Any = None) -> Any:
    """thing.a.b for the path "a.b"; `default` where there is no such name."""
    for name in path.split("."):
        if not hasattr(thing, name):
            return default
        thing = getattr(thing, name)
    return thing


def missing(seams: Seams) -> list[str]:
    """Names of `seams` that the installed vLLM has not."""
    return [*_members(seams), *_parameters(seams), *_pickles(seams)]


def missing_attributes(scheduler: object) -> list[str]:
    """Of ATTRIBUTES and SPECULATIVE: what this scheduler has not."""
    speculative = "vllm_config.speculative_config"
    paths = [*ATTRIBUTES]
    if find(scheduler, speculative) is not None:
        paths += [f"{speculative}.{name}" for name in SPECULATIVE]
    nothing = object()
    return [f"scheduler.{path}" for path in paths if find(scheduler, path, nothing) is nothing]


def reads(place: str, parameter: str) -> bool:
    """Whether the method "module:Class.method" reads a parameter; also where there is none."""
    code = getattr(inspect.unwrap(_imported(place)), "__code__", None)
    return code is None or any(i.argval == parameter for i in dis.get_instructions(code))


def _members(seams: Seams) -> Iterator[str]:
    for place, names in seams.classes.items():
        kind = _imported(place)
        known = set(getattr(kind, "__dataclass_fields__", ()))
        for base in getattr(kind, "__mro__", ()):  # ours may already be in the place of vLLM's
            init = getattr(inspect.unwrap(base.__init__), "__code__", None)  # it may be decorated
            if init:
                known |= {i.argval for i in dis.get_instructions(init) if i.opname == "STORE_ATTR"}
        yield from (
            f"{place}.{name}" for name in names if name not in known and not hasattr(kind, name)
        )


def _parameters(seams: Seams) -> Iterator[str]:
    for place, names in (*seams.replaced.items(), *seams.called.items()):
        method = _imported(place)
        if callable(method):
            taken = list(inspect.signature(method).parameters)[1:]
            # vLLM may give a method that ours takes the place of no more than ours takes.
            fits = taken == list(names) if place in seams.replaced else set(names) <= set(taken)
        else:
            fits = False
        if not fits:
            yield f"{place}({', '.join(names)})"


def _pickles(seams: Seams) -> Iterator[str]:
    """What pickles its objects otherwise than by their attributes."""
    ways = ("__slots__", "__getstate__", "__setstate__", "__reduce__", "__reduce_ex__")
    for place in seams.pickled:
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
