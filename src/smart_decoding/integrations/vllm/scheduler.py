"""vLLM schedulers that choose draft lengths: K before each step, and then each request's share.

They run in the engine's own process alone and hand their choice to the workers in the step's
SchedulerOutput, so that tensor-parallel ranks cannot disagree. Tokens are verified by vLLM, and are
its own whatever is chosen here.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import vllm
from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

from smart_decoding.integrations.chains import Chains, Step
from smart_decoding.integrations.disabling import DISABLED
from smart_decoding.integrations.vllm.metrics import serve_metrics
from smart_decoding.integrations.vllm.options import (
    FREE,
    read_options,
    reason_for_stock,
    refuse_class,
    refuse_layout,
    refuse_missing,
)
from smart_decoding.integrations.vllm.ranks import (
    Length,
    drafts_nothing,
    marked,
    same_machine,
    shorten_fetching,
)
from smart_decoding.integrations.vllm.seams import (
    SCHEDULER,
    SHORTCUTS,
    find,
    missing,
    missing_attributes,
)
from smart_decoding.integrations.vllm.shortcuts import drafter_seen
from smart_decoding.integrations.vllm.shortcuts import install as install_shortcuts

logger = init_logger("vllm.smart_decoding")  # below vLLM's logger: its format and level
SHORT_GAP = 0.002  # seconds between two steps that still belong to the work of a step
FORGET_EVERY = 256  # steps
WITHOUT = "leave out --scheduler-cls"


class Lengths:
    """Stands for vLLM's table of K by batch size; the policy is asked instead.

    kind: `Length` where K is to install the shortcuts in the processes of other ranks."""

    def __init__(self, owner: Controller, kind: type[int]) -> None:
        self._owner = owner
        self._kind = kind

    def __getitem__(self, batch: int) -> int:
        return self._kind(self._owner.length(batch))


class Controller:
    """Between one vLLM scheduler and the policy: request ids, counts and the clock."""

    def __init__(
        self, scheduler: Any, lengths: Sequence[int], model: bool, exploration_budget: float
    ) -> None:
        self.scheduler = scheduler
        self.policy = Chains(lengths, model, exploration_budget)
        # By the identity of the step's SchedulerOutput.
        self._under_way: dict[int, tuple[Step, float]] = {}
        # Whether ranks in other processes have said that they understand DISABLED.
        self._ranks_rest = False
        self._done = 0.0  # when the last step's output was processed
        self._steps = 0

    def length(self, batch: int) -> int:
        """K of the step that is being scheduled."""
        start = time.perf_counter()
        self.policy.may_disable = self.policy.model and (self._ranks_rest or drafter_seen())
        running = self.scheduler.running[:batch]
        length = self.policy.length([request.request_id for request in running])
        self.policy.counters.seconds += time.perf_counter() - start
        return length

    def scheduled(self, output: SchedulerOutput, start: float, exploring: bool) -> None:
        """A step was scheduled, from `start` on. exploring: what the policy said before that."""
        drafts = {id_: len(tokens) for id_, tokens in output.scheduled_spec_decode_tokens.items()}
        batch = len(output.num_scheduled_tokens)
        clean = output.total_num_scheduled_tokens == batch + sum(drafts.values())
        requests = self.scheduler.requests
        greedy = frozenset(id_ for id_ in drafts if _greedy(requests[id_]))
        levels = int(output.num_spec_tokens_to_schedule)
        if levels == DISABLED:  # a prompt that the draft model does not read cannot be drafted for
            scheduled = output.num_scheduled_tokens.items()
            self.policy.switch.miss(
                id_ for id_, count in scheduled if count > 1 + drafts.get(id_, 0)
            )
        drafts_nothing(levels <= 0)
        step = Step(batch, levels, drafts, clean=clean, greedy=greedy, exploring=exploring)
        self._under_way[id(output)] = (step, start)

    def trim(self, ids: Sequence[str], drafted: Sequence[int]) -> list[int]:
        """How many drafts of each request to verify."""
        start = time.perf_counter()
        if not any(drafted):
            return [0] * len(ids)
        requests = [self.scheduler.requests[id_] for id_ in ids]
        room = [request.max_tokens - request.num_output_tokens - 1 for request in requests]
        kept = self.policy.trim(ids, drafted, [_greedy(request) for request in requests], room)
        self.policy.counters.seconds += time.perf_counter() - start
        return kept

    def outcome(self, output: SchedulerOutput, ran: ModelRunnerOutput) -> tuple[Step, float] | None:
        """The step behind `output`, with what was accepted in it; None if it is not ours."""
        self._ranks_rest = self._ranks_rest or marked(ran)
        found = self._under_way.pop(id(output), None)
        if found is not None and ran.sampled_token_ids:
            step, _ = found
            sampled = ran.sampled_token_ids
            index = ran.req_id_to_index
            step.accepted = {
                id_: max(len(sampled[index[id_]]) - 1, 0) for id_ in step.verified if id_ in index
            }
        return found

    def finished(self, step: Step, start: float) -> None:
        """The step's output was processed just now."""
        now = time.perf_counter()
        since = self._done if start - self._done < SHORT_GAP else start
        self._done = now
        self.policy.observe(step, now - since if since > 0 else None)
        self._steps += 1
        if self._steps % FORGET_EVERY == 0:
            self.policy.forget(self.scheduler.requests)
        self.policy.counters.seconds += time.perf_counter() - now


class _Smart:
    """What both schedulers share; vLLM's own class follows in the order of methods."""

    ASYNC = False
    controller: Controller | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.controller = None
        options = read_options(find(self, "vllm_config.additional_config"))
        refuse_class(find(self, "vllm_config.scheduler_config.async_scheduling"), self.ASYNC)
        reason = reason_for_stock(self, options)
        if reason is not None:
            logger.warning("SMART leaves draft lengths to vLLM: %s", reason)
            return
        gone = [*missing_attributes(self), *missing(SCHEDULER)]
        refuse_missing(vllm.__version__, type(self).__name__, gone, WITHOUT)
        parallel = self.vllm_config.parallel_config  # type: ignore[attr-defined]
        refuse_layout(parallel.data_parallel_size, parallel.distributed_executor_backend)
        lengths = _lengths(self)
        if not any(lengths):
            logger.warning(
                "SMART leaves draft lengths to vLLM: its schedule drafts nothing at any batch size"
            )
            return
        method = self.vllm_config.speculative_config.method  # type: ignore[attr-defined]
        self.controller = Controller(self, lengths, method not in FREE, options.exploration_budget)
        kind = _shorten(self, parallel) if options.shortcuts else int
        self.dynamic_sd_lookup = Lengths(self.controller, kind)
        if options.metrics_port:
            _serve(self.controller, options.metrics_port)
        longest = self.num_spec_tokens  # type: ignore[attr-defined]
        logger.info("SMART chooses draft lengths: up to %d tokens by %s", longest, method)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """vLLM's, of a step whose K the policy has chosen."""
        start = time.perf_counter()
        exploring = self.controller is not None and self.controller.policy.take_exploring()
        output: SchedulerOutput = super().schedule(*args, **kwargs)  # type: ignore[misc]
        if self.controller is not None:
            self.controller.scheduled(output, start, exploring)
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> Any:
        """vLLM's; what was accepted is learned from."""
        controller = self.controller
        found = controller.outcome(scheduler_output, model_runner_output) if controller else None
        result = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        if controller is not None and found is not None:
            controller.finished(*found)
        return result

    def shutdown(self) -> None:
        """vLLM's, after a last line of figures."""
        if self.controller is not None:
            logger.info("SMART: %s", self.controller.policy.counters)
        super().shutdown()  # type: ignore[misc]


class SmartScheduler(_Smart, Scheduler):  # type: ignore[misc]
    """For synchronous scheduling: the drafts are there when their number is chosen."""

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """vLLM's; then each request keeps the drafts that are worth verifying."""
        super().update_draft_token_ids(draft_token_ids)
        if self.controller is None:
            return
        found = [self.requests.get(id_) for id_ in draft_token_ids.req_ids]
        _trim(self.controller, [r for r in found if r is not None and not r.is_finished()])


class SmartAsyncScheduler(_Smart, AsyncScheduler):  # type: ignore[misc]
    """For asynchronous scheduling: places are kept for the drafts that are worth verifying.

    The drafts of a step are still being made when the next one is scheduled."""

    ASYNC = True

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        super()._update_after_schedule(scheduler_output)
        if self.controller is None:
            return
        scheduled = scheduler_output.num_scheduled_tokens
        _trim(self.controller, [self.requests[id_] for id_ in scheduled])


def _shorten(scheduler: Any, parallel: Any) -> type[int]:
    """Installs the shortcuts where this vLLM can take them; the class of its lengths."""
    if scheduler.vllm_config.use_v2_model_runner:
        return int  # it has neither their places nor the work that they leave out
    gone = missing(SHORTCUTS)
    if gone:
        logger.warning("SMART shortens no steps: this vLLM has no %s", ", ".join(gone))
        return int
    install_shortcuts()
    if not same_machine(parallel.distributed_executor_backend, parallel.nnodes):
        return int
    if not scheduler.ASYNC:
        shorten_fetching()
    return Length


def _lengths(scheduler: Any) -> Sequence[int]:
    """The values of K that may be chosen: those of vLLM's schedule, or all of them."""
    schedule = scheduler.vllm_config.speculative_config.num_speculative_tokens_per_batch_size
    longest = scheduler.num_spec_tokens
    return [min(k, longest) for _, _, k in schedule] if schedule else range(longest + 1)


def _serve(controller: Controller, port: int) -> None:
    """Metrics, unless another engine on this machine has the port, such as another rank."""
    try:
        serve_metrics(controller.policy.counters, port)
    except OSError as error:
        logger.warning("SMART's metrics are not served on port %d: %s", port, error)


def _trim(controller: Controller, requests: Sequence[Any]) -> None:
    """Cuts each request's drafts to what is worth verifying."""
    decoding = [request for request in requests if not request.is_prefill_chunk]
    drafted = [len(request.spec_token_ids) for request in decoding]
    kept = controller.trim([request.request_id for request in decoding], drafted)
    for request, count in zip(decoding, kept, strict=True):
        if count < len(request.spec_token_ids):
            request.spec_token_ids = request.spec_token_ids[:count]


def _greedy(request: Any) -> bool:
    return request.sampling_params is None or request.sampling_params.temperature <= 0
