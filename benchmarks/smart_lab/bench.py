"""`smart bench` with further parts and contestants: tuned by replay, variants, suites."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from tqdm import tqdm

from smart_decoding.bench.options import BASELINE, OURS, SLOTS, Arm
from smart_decoding.bench.runner import Bench, Part
from smart_decoding.bench.runner import run as run_bench
from smart_decoding.bench.summary import POOLED
from smart_lab.ablations import VARIANTS
from smart_lab.options import SAMPLED_SIZES, VARIANT_SIZES, LabArm, LabOptions, command_of
from smart_lab.questions import Asker
from smart_lab.resume import KeptMeasurement, Progress, key_of
from smart_lab.tuning import Tuner

if TYPE_CHECKING:
    from smart_decoding.bench.blocks import Prompt
    from smart_decoding.bench.cycles import Measurement
    from smart_decoding.llm import LLM


def run(options: LabOptions) -> dict[str, Any]:
    """What `smart bench` returns, and of what was asked for 'suite_runs', 'variant_runs'
    and 'replayed'.

    Raises what the user's `run` raises, and ConfigError for a file of --resume that is of another
    run."""
    progress = Progress(options.resume, key_of(options) if options.resume else {})
    return run_bench(options, partial(LabBench, progress=progress))


class LabBench(Bench):
    """A run with the laboratory's parts."""

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

    def parts(self) -> dict[str, Part]:
        """Those of `smart bench` and ours, load and replay last."""
        options = self.options
        found = super().parts()
        load = found.pop("load", None)
        if options.sampled and options.compares_policies:
            measure = partial(self.blocks, options.sampled, SAMPLED_SIZES)
            found["sampled_runs"] = Part(0.11, measure)
        if options.suites:
            found["suite_runs"] = Part(0.06, self.suites)
        if options.variants:
            found["variant_runs"] = Part(0.07, self.variants)
        if load is not None:
            found["load"] = load
        if options.questions:
            found["replayed"] = Part(0.1, self.questions)
        return found

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
        ours = [arm for arm in self.options.arms if arm.policy in (BASELINE, "smart")]
        return ours + self._best_fixed(SLOTS)

    def made(self, chosen: Sequence[Arm]) -> dict[str, LLM]:
        arms = super().made(chosen)
        for arm in chosen:
            if "variant" in arm.options:
                engine = arms[arm.label].engine
                engine.policy = VARIANTS[arm.options["variant"]](cast(Any, engine.policy))
        return arms

    def suites(self, stop: float | None) -> list[dict[str, Any]]:
        """Tasks of their own at batch 1, where n-grams may help the head."""
        arms = [
            Arm(BASELINE),
            Arm("smart"),
            Arm("smart", {"method": "union"}),
            *self._best_fixed(1),
        ]
        return self.blocks(
            self.options.temperature, (1,), stop, arms, "suites, ", self.options.suites
        )

    def variants(self, stop: float | None) -> list[dict[str, Any]]:
        """`smart` with one ingredient exchanged, beside itself."""
        arms = [LabArm(BASELINE), LabArm("smart"), *self.options.variant_arms]
        sizes = [size for size in VARIANT_SIZES if size <= self.llm.engine.config.max_num_seqs]
        return self.blocks(self.options.temperature, sizes, stop, arms, "variants, ")

    def questions(self, stop: float | None) -> dict[str, Any]:
        """What replay answers, batch size by batch size, as far as time allows."""
        asker = Asker(self.tuner.trace)
        found: dict[str, Any] = {}
        for size in tqdm(
            self.options.batch_sizes, desc="replaying", unit="batch size", leave=False
        ):
            name = f"replayed, batch {size}"
            if not self.progress.units(name):
                if found and stop is not None and time.perf_counter() > stop:
                    break
                self.progress.add(name, asker.answers(size))
            found[str(size)] = self.progress.units(name)[0]
        return found

    def _best_fixed(self, batch_size: int) -> list[Arm]:
        """The best tuned tree, if trees are tuned."""
        return [
            arm for arm in self.tuner.arms(batch_size, self.progress) if arm.policy == "eagle2"
        ][:1]
