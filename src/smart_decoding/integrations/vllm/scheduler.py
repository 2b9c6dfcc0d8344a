"""vLLM's schedulers, with a draft length for each step: one for all requests of the step.

They run only in the engine's own process and pass their choice to the workers in the step's
SchedulerOutput, so that tensor-parallel ranks cannot disagree. vLLM drafts and verifies, so its
tokens do not depend on the choice.
"""

from __future__ import annotations

import time
from typing import Any

import vllm
from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput

from smart_decoding.core.lengths import DraftLengths, StepSeconds
from smart_decoding.integrations.vllm.graphs import CapturedLengths, captured_lengths
from smart_decoding.integrations.vllm.metrics import Counters, Step, serve_metrics
from smart_decoding.integrations.vllm.options import (
    read_options,
    reason_for_stock,
    refuse_class,
    refuse_layout,
    refuse_missing,
)
from smart_decoding.integrations.vllm.seams import find, missing, missing_attributes

logger = init_logger("vllm.smart_decoding")  # below vLLM's logger: its format and level
SHORT_GAP = 0.002  # seconds between two steps that still belong to the work of a step


class Controller:
    """The link between one vLLM scheduler and the policy: counts and the clock.

    It replaces vLLM's table of K by batch size."""

    def __init__(self, captured: CapturedLengths, exploration_budget: float) -> None:
        self.captured = captured
        lengths = captured.lengths
        seconds = StepSeconds(lengths[0])
        self.policy = DraftLengths(lengths[-1], seconds, exploration_budget)
        self.counters = Counters()
        self._drafting = (0, False)  # K of the step scheduled last, and whether it explores
        # By the identity of the step's SchedulerOutput.
        self._under_way: dict[int, tuple[Step, float]] = {}
        self._done = 0.0  # when the last step's output was processed

    def __getitem__(self, batch: int) -> int:
        """Return K of the step that is being scheduled."""
        start = time.perf_counter()
        length = self.policy.choose(batch, self.captured.of(batch))
        self.counters.seconds += time.perf_counter() - start
        return length

    def scheduled(self, output: SchedulerOutput, start: float) -> None:
        """Note a step that was scheduled from `start` on."""
        batch = len(output.num_scheduled_tokens)
        if not batch:
            return
        verified = sum(map(len, output.scheduled_spec_decode_tokens.values()))
        length, exploring = self._drafting
        drafts = int(output.num_spec_tokens_to_schedule)
        self._drafting = (drafts, self.policy.exploring)
        clean = output.total_num_scheduled_tokens == batch + verified
        step = Step(batch, length, drafts, verified, clean=clean, exploring=exploring)
        self._under_way[id(output)] = (step, start)

    def outcome(self, output: SchedulerOutput, ran: ModelRunnerOutput) -> tuple[Step, float] | None:
        """Return the step of `output`, with its accepted drafts; None if it is not ours."""
        found = self._under_way.pop(id(output), None)
        if found is not None and ran.sampled_token_ids:
            drafts = output.scheduled_spec_decode_tokens
            found[0].accepted = [
                max(len(ran.sampled_token_ids[ran.req_id_to_index[id_]]) - 1, 0)
                for id_, tokens in output.num_scheduled_tokens.items()
                if tokens == 1 + len(drafts.get(id_, ())) and id_ in ran.req_id_to_index
            ]
        return found

    def finished(self, step: Step, start: float) -> None:
        """Observe a step whose output was processed just now."""
        now = time.perf_counter()
        since = self._done if start - self._done < SHORT_GAP else start
        self._done = now
        self.counters.add(step)
        usable = step.clean and step.length == step.drafts and since > 0
        seconds = now - since if usable else None
        self.policy.observe(step.batch, step.length, step.accepted, seconds, step.exploring)
        self.counters.seconds += time.perf_counter() - now


class _Smart:
    """The part that both schedulers share; vLLM's own class follows in the order of methods."""

    ASYNC = False
    controller: Controller | None
    dynamic_sd_lookup: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.controller = None
        options = read_options(find(self, "vllm_config.additional_config"))
        refuse_class(find(self, "vllm_config.scheduler_config.async_scheduling"), self.ASYNC)
        reason = reason_for_stock(self, options)
        if reason is None:
            gone = [*missing_attributes(self), *missing()]
            refuse_missing(vllm.__version__, type(self).__name__, gone)
            reason = self._take_over(options.exploration_budget)
        if reason is not None:
            logger.warning("SMART leaves draft lengths to vLLM: %s", reason)
        elif self.controller is not None and options.metrics_port:
            _serve(self.controller, options.metrics_port)

    def _take_over(self, exploration_budget: float) -> str | None:
        """Put a controller in place of vLLM's table; return the reason if there is no choice."""
        config = self.vllm_config  # type: ignore[attr-defined]
        parallel = config.parallel_config
        refuse_layout(parallel.data_parallel_size, parallel.distributed_executor_backend)
        longest = self.num_spec_tokens  # type: ignore[attr-defined]
        captured = captured_lengths(config, self.dynamic_sd_lookup, longest)
        if len(captured.lengths) == 1:
            return (
                f"full CUDA graphs are captured only for drafts of {captured.lengths[0]} tokens; "
                "name more lengths, 0 among them, in num_speculative_tokens_per_batch_size and "
                "start with VLLM_USE_V2_MODEL_RUNNER=1"
            )
        self.controller = self.dynamic_sd_lookup = Controller(captured, exploration_budget)
        lengths = ", ".join(map(str, captured.lengths))
        logger.info("SMART chooses the draft length of each step out of %s", lengths)
        return None

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Schedule as vLLM does, a step whose K the policy has chosen."""
        start = time.perf_counter()
        output: SchedulerOutput = super().schedule(*args, **kwargs)  # type: ignore[misc]
        if self.controller is not None:
            self.controller.scheduled(output, start)
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> Any:
        """Update as vLLM does; the policy learns from the accepted drafts."""
        controller = self.controller
        found = controller.outcome(scheduler_output, model_runner_output) if controller else None
        result = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        if controller is not None and found is not None:
            controller.finished(*found)
        return result

    def shutdown(self) -> None:
        """Log a last line of figures, then shut down as vLLM does."""
        if self.controller is not None:
            logger.info("SMART: %s", self.controller.counters)
        super().shutdown()  # type: ignore[misc]


class SmartScheduler(_Smart, Scheduler):  # type: ignore[misc]
    """The scheduler of synchronous scheduling."""


class SmartAsyncScheduler(_Smart, AsyncScheduler):  # type: ignore[misc]
    """The scheduler of asynchronous scheduling: a step is scheduled while its predecessor runs."""

    ASYNC = True


def _serve(controller: Controller, port: int) -> None:
    """Serve metrics, unless another engine on this machine has the port, such as another rank."""
    try:
        serve_metrics(controller.counters, port)
    except OSError as error:
        logger.warning("SMART's metrics are not served on port %d: %s", port, error)
