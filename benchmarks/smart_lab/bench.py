"""`smart bench` with contestants tuned by replay, variants of `smart`, and replays at equal costs.

Needed by the README's second table (zen4/2026-11-28-fair-comparison.json) and by docs/results.md.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from tqdm import tqdm

from smart_decoding.bench.cycles import Prompts, cycles_of
from smart_decoding.bench.options import BASELINE, OURS, Arm
from smart_decoding.bench.runner import encode, until
from smart_decoding.errors import CapacityError
from smart_decoding.measuring.resume import Progress
from smart_decoding.measuring.tasks import load_task
from smart_lab.ablations import VARIANTS
from smart_lab.cycles import AGAIN, Measurement, measure, rows_of
from smart_lab.options import LabOptions, command_of, loaded
from smart_lab.provenance import provenance
from smart_lab.resume import KeptMeasurement, key_of
from smart_lab.summary import POOLED
from smart_lab.tuning import Tuner

if TYPE_CHECKING:
    from smart_decoding.core.costs import CostModel
    from smart_decoding.llm import LLM

TUNING = 0.4  # of a batch size's time, at most
GAINS = 0.2  # of the comparison's time, for replays at equal costs


def run(options: LabOptions) -> dict[str, Any]:
    """Measure all contestants; return the content of the JSON file: 'provenance', 'runs' and 'cost'
    (the measured profile that policies started from, None if none needs one). Runs have 'setting'
    where they were tuned, and 'policy_gain' if the option requests it.

    Raises CapacityError if the time limit was too short for a single cycle, LLM's errors, and
    ConfigError for another run's file of --resume."""
    started = time.perf_counter()
    progress = Progress(options.resume, key_of(options) if options.resume else {})
    texts = {task: load_task(task, options.limit) for task in options.tasks}
    llm = loaded(options)
    bench = Bench(options, llm, encode(llm, texts, options), progress)
    limit = options.time_limit  # loading counts, too
    runs = bench.runs(None if limit is None else started + limit)
    if not runs:
        raise CapacityError(
            "the time limit was too short for one block of every policy: raise --time-limit"
        )
    origin = (llm.provenance, bench.head, llm.target.plain_torch)
    return {
        "provenance": provenance(command_of(options), options.seed, *origin),
        "runs": runs,
        "cost": bench.cost.to_dict() if bench.cost else None,
    }


class Bench:
    """One run: the model, the prompts, and what its batch sizes share."""

    def __init__(self, options: LabOptions, llm: LLM, prompts: Prompts, progress: Progress) -> None:
        self.options = options
        self.llm = llm
        self.prompts = prompts
        self.head: str | None = None
        self.cost: CostModel | None = None
        self._stop: float | None = None  # of the comparison
        self._left = len(options.batch_sizes)  # to be tuned for
        self._compared: dict[int, list[Arm]] = {}  # by batch size
        progress.agree("weights", llm.provenance)
        self.progress = progress
        self.tuner = Tuner(llm, options)

    def runs(self, stop: float | None) -> list[dict[str, Any]]:
        """Return the runs of all contestants, and the policies' gains by replay, if the option
        requests them; a batch size for which time was too short is left out."""
        options = self.options
        self._stop = until(stop, 1.0 - GAINS if options.policy_gain else 1.0)
        runs: list[dict[str, Any]] = []
        for i, batch_size in enumerate(options.batch_sizes):
            contestants = self.contestants(batch_size)
            share = until(self._stop, 1 / (len(options.batch_sizes) - i))
            found = self._batch(contestants, batch_size, share)
            if not found.cycles:
                reason = "no time was left for one block of every policy: raise --time-limit"
                print(f"smart: batch {batch_size} is left out: {reason}", file=sys.stderr)
                continue
            settings = {arm.label: _setting(arm) for arm in contestants if arm.name}
            of_size = rows_of(found, batch_size, options.seed)
            runs += [run | settings.get(run["policy"], {}) for run in of_size]
        if options.policy_gain:
            self._add_policy_gains(runs, stop)
        return runs

    def contestants(self, batch_size: int) -> list[Arm]:
        """Return the contestants of the options and tuned ones; tuning takes a part of the batch
        size's time."""
        stop = until(self._stop, TUNING / max(self._left, 1))
        self._left -= 1
        tuned = self.tuner.arms(batch_size, self.progress, stop)
        self._compared[batch_size] = [*self.options.arms, *tuned]
        return self._compared[batch_size]

    def _batch(
        self, contestants: Sequence[Arm], batch_size: int, deadline: float | None
    ) -> Measurement:
        """Measure one batch size, as far as memory allows, and free its engines. A slow machine
        may take the whole run's time for the first cycle."""
        name = f"T {self.options.temperature:g}, batch {batch_size}"
        found = KeptMeasurement(self.progress, name)
        found.first_deadline = self._stop
        made = self.made(contestants)
        made[AGAIN] = self.llm.sharing_weights(False)
        engines = {label: arm.engine for label, arm in made.items()}
        total, done = sum(1 for _ in cycles_of(self.prompts, batch_size)), len(found.cycles)
        try:
            with tqdm(total=total, initial=done, desc=name, unit="cycle", leave=False) as bar:
                measure(engines, self.prompts, batch_size, deadline, bar.update, into=found)
        except CapacityError as error:
            print(f"smart: batch {batch_size}: {error}", file=sys.stderr)
            found.partial = True
        del made, engines
        gc.collect()  # drafters hold memory of their own
        return found

    def made(self, chosen: Sequence[Arm]) -> dict[str, LLM]:
        """Return the chosen contestants, by label; their drafter and cost model are noted."""
        arms = {
            arm.label: self.llm.sharing_weights(self.options.speculation(arm)) for arm in chosen
        }
        found = [arm.speculation for arm in arms.values() if arm.engine.drafts]
        self.head = (
            self.head or ", ".join(dict.fromkeys(each.description for each in found)) or None
        )
        self.cost = self.cost or next((each.cost for each in found if each.cost), None)
        for arm in chosen:
            if "variant" in arm.options:
                engine = arms[arm.label].engine
                engine.policy = VARIANTS[arm.options["variant"]](cast("Any", engine.policy))
        return arms

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


def _setting(arm: Arm) -> dict[str, str]:
    return {"setting": ",".join(f"{name}={value}" for name, value in arm.options.items())}
