"""`smart bench` with contestants tuned by replay, variants of `smart`, and replays at equal costs.

Needed by the README's second table (zen4/2026-11-28-fair-comparison.json) and by docs/results.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from smart_decoding.bench.options import BASELINE, OURS, SLOTS, Arm
from smart_decoding.bench.runner import Bench
from smart_decoding.bench.runner import run as run_bench
from smart_decoding.bench.summary import POOLED
from smart_lab.ablations import VARIANTS
from smart_lab.options import LabOptions, command_of
from smart_lab.resume import KeptMeasurement, Progress, key_of
from smart_lab.tuning import Tuner

if TYPE_CHECKING:
    from smart_decoding.bench.blocks import Prompt
    from smart_decoding.bench.cycles import Measurement
    from smart_decoding.llm import LLM


def run(options: LabOptions) -> dict[str, Any]:
    """What `smart bench` returns; its runs have 'setting' where they were tuned, and 'policy_gain'
    if it was asked for.

    Raises what the user's `run` raises, and ConfigError for a file of --resume that is of another
    run."""
    progress = Progress(options.resume, key_of(options) if options.resume else {})
    return run_bench(options, partial(LabBench, progress=progress))


class LabBench(Bench):
    """A run with the laboratory's contestants."""

    options: LabOptions

    def __init__(
        self,
        options: LabOptions,
        llm: LLM,
        prompts: Mapping[str, Sequence[Prompt]],
        progress: Progress,
    ) -> None:
        super().__init__(options, llm, prompts)
        progress.agree("weights", llm.provenance)
        self.progress = progress
        self.tuner = Tuner(llm, options)

    @property
    def command(self) -> str:
        return command_of(self.options)

    def begun(self, name: str) -> Measurement:
        """From where --resume left it."""
        return KeptMeasurement(self.progress, name)

    def load(self, stop: float | None) -> dict[str, Any]:
        if not self.progress.units("load"):
            self.progress.add("load", super().load(stop))
        found: dict[str, Any] = self.progress.units("load")[0]
        return found

    def measure(self) -> dict[str, Any]:
        result = super().measure()
        if self.options.policy_gain:
            self._add_policy_gains(result["runs"])
        return result

    def _add_policy_gains(self, runs: Sequence[dict[str, Any]]) -> None:
        """To the runs over all tasks: how much faster a policy is than plain decoding by replay,
        and how much faster `smart` is than it."""
        for size in sorted({run["batch_size"] for run in runs}):
            gains = self.tuner.gains(self.contestants(size), size, self.progress)
            for run in runs:
                gain = gains.get(run["policy"])
                if run["batch_size"] != size or run["task"] != POOLED or gain is None:
                    continue
                run["policy_gain"] = gain
                if OURS in gains and run["policy"] not in (OURS, BASELINE):
                    run["smart_policy_over"] = gains[OURS] / gain

    def contestants(self, batch_size: int) -> list[Arm]:
        return [*self.options.arms, *self.tuner.arms(batch_size, self.progress)]

    def served(self) -> list[Arm]:
        """Tuned for load is the best fixed tree alone: one that is far too slow would be served for
        ever."""
        if not self.options.tune_eagle2:
            return self.options.arms
        ours = [arm for arm in self.options.arms if arm.policy in (BASELINE, OURS)]
        tuned = [arm for arm in self.tuner.arms(SLOTS, self.progress) if arm.policy == "eagle2"]
        return ours + tuned[:1]

    def made(self, chosen: Sequence[Arm]) -> dict[str, LLM]:
        arms = super().made(chosen)
        for arm in chosen:
            if "variant" in arm.options:
                engine = arms[arm.label].engine
                engine.policy = VARIANTS[arm.options["variant"]](cast(Any, engine.policy))
        return arms
