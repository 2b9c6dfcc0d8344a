"""Names in vLLM that the scheduler relies on, beyond its public interface. Imports no vLLM.

These names are compared with the installed vLLM at every start, so that no version is refused by
its number.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

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


@dataclass(frozen=True, slots=True)
class Seams:
    """Places are "module:Class" or "module:Class.method".

    classes: overridden methods, and attributes that are read. replaced: all parameters of methods
    that ours replace. called: the keywords that methods are called with."""

    classes: Mapping[str, tuple[str, ...]]
    replaced: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    called: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


_SCHED = "vllm.v1.core.sched."
SCHEDULER = Seams(
    classes={
        f"{_SCHED}scheduler:Scheduler": (
            "schedule",
            "update_from_output",
            "shutdown",
        ),
        f"{_SCHED}async_scheduler:AsyncScheduler": ("schedule",),
        f"{_SCHED}output:SchedulerOutput": (
            "num_scheduled_tokens",
            "total_num_scheduled_tokens",
            "scheduled_spec_decode_tokens",
            "num_spec_tokens_to_schedule",
        ),
        "vllm.v1.outputs:ModelRunnerOutput": ("req_id_to_index", "sampled_token_ids"),
    },
    replaced={
        f"{_SCHED}scheduler:Scheduler.update_from_output": (
            "scheduler_output",
            "model_runner_output",
        ),
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
    """Return names of `seams` that the installed vLLM has not."""
    return [*_members(seams), *_parameters(seams)]


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


def _imported(place: str) -> Any:
    """Return what "module:Class.method" names, or None."""
    module, _, path = place.partition(":")
    try:
        return find(import_module(module), path)
    except ImportError:
        return None
