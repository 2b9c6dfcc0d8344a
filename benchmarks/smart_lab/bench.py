"""`smart bench` with contestants tuned by replay, variants of `smart`, and replays at equal costs.

Needed by the README's second table (zen4/2026-11-28-fair-comparison.json) and by docs/results.md.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from smart_decoding.bench.options import BASELINE, OURS, Arm
from smart_decoding.bench.resume import Progress
from smart_decoding.bench.runner import Bench, until
from smart_decoding.bench.runner import run as run_bench
from smart_decoding.bench.summary import POOLED
from smart_lab.ablations import VARIANTS
from smart_lab.options import LabOptions, command_of
from smart_lab.resume import KeptMeasurement, key_of
from smart_lab.tuning import Tuner

if TYPE_CHECKING:
    from smart_decoding.bench.blocks import Prompt
    from smart_decoding.bench.cycles import Measurement
    from smart_decoding.llm import LLM

TUNING = 0.4  # of a batch size's time, at most
GAINS = 0.2  # of the comparison's time, for replays at equal costs


def run(options: LabOptions) -> dict[str, Any]:
    """Return the result of `smart bench`; its runs have 'setting' where they were tuned, and
    'policy_gain' if the option requests it.

    Raises the errors of `smart bench`, and ConfigError for another run's file of --resume."""
    started = time.perf_counter()
    progress = Progress(options.resume, key_of(options) if options.resume else {})
    return run_bench(options, partial(LabBench, progress=progress, started=started))


class LabBench(Bench):
    """A run with the laboratory's contestants."""

    options: LabOptions

    def __init__(
        self,
        options: LabOptions,
        llm: LLM,
        prompts: Mapping[str, Sequence[Prompt]],
        progress: Progress,
        started: float,
    ) -> None:
        super().__init__(options, llm, prompts)
        self.started = started  # loading counts, too
        self._stop: float | None = None  # of the comparison
        self._left = len(options.batch_sizes)  # to be tuned for
        self._compared: dict[int, list[Arm]] = {}  # by batch size
        progress.agree("weights", llm.provenance)
        self.progress = progress
        self.tuner = Tuner(llm, options)

    @property
    def command(self) -> str:
        return command_of(self.options)

    def begun(self, name: str) -> Measurement:
        """Return the measurement that --resume continues."""
        return KeptMeasurement(self.progress, name)

    def runs(self, stop: float | None) -> list[dict[str, Any]]:
        """Return the comparison, and the policies' gains by replay, if the option requests them."""
        options = self.options
        self._stop = until(stop, 1.0 - GAINS if options.policy_gain else 1.0)
        found = super().runs(self._stop)
        if options.policy_gain:
            self._add_policy_gains(found, stop)
        return found

    def _add_policy_gains(self, runs: Sequence[dict[str, Any]], stop: float | None = None) -> None:
        """Add to the runs over all tasks a policy's speedup over plain decoding by replay, and
        `smart`'s speedup over the policy; nothing once the time is over."""
        sizes = sorted({run["batch_size"] for run in runs})
        for i, size in enumerate(sizes):
            share = until(stop, 1 / (len(sizes) - i))
            gains = self.tuner.gains(self._compared[size], size, self.progress, share)
            for run in runs:
                gain = gains.get(run["policy"])
                if run["batch_size"] != size or run["task"] != POOLED or gain is None:
                    continue
                run["policy_gain"] = gain
                if OURS in gains and run["policy"] not in (OURS, BASELINE):
                    run["smart_policy_over"] = gains[OURS] / gain

    def contestants(self, batch_size: int) -> list[Arm]:
        """Return the contestants of the options and tuned ones; tuning takes a part of the batch
        size's time."""
        stop = until(self._stop, TUNING / max(self._left, 1))
        self._left -= 1
        tuned = self.tuner.arms(batch_size, self.progress, stop)
        self._compared[batch_size] = [*self.options.arms, *tuned]
        return self._compared[batch_size]

    def made(self, chosen: Sequence[Arm]) -> dict[str, LLM]:
        arms = super().made(chosen)
        for arm in chosen:
            if "variant" in arm.options:
                engine = arms[arm.label].engine
                engine.policy = VARIANTS[arm.options["variant"]](cast(Any, engine.policy))
        return arms
