"""The strongest settings of other policies for each batch size: ranked by replay on prompts that
the benchmark does not use, so that what is measured live is the best that tuning by hand could have
found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from smart_decoding.bench.data import load_task
from smart_decoding.bench.options import Arm
from smart_decoding.errors import ConfigError
from smart_lab.replay import HostCosts, replay
from smart_lab.simulate import enough
from smart_lab.sweep import Sweep
from smart_lab.trace import Trace

if TYPE_CHECKING:
    from smart_decoding.bench.resume import Progress
    from smart_decoding.core.cost import CostModel
    from smart_decoding.llm import LLM
    from smart_lab.options import LabOptions

PER_TASK = 8  # prompts, or more where large batches need them
PAPER_ROUNDS, PAPER_LEAST = 240, 24  # of requests; of the batch
PAPER_BUDGETS = (1, 2, 4, 8, 16, 32)  # nodes per request
PAPER_FORMS = (
    ("published", "published"),
    ("offset", "node_sum"),
)  # as in the paper; with its two mistakes mended


def prompts_needed(options: LabOptions) -> int:
    """Tuning prompts per task: enough to keep the largest batch full for a while."""
    return max(PER_TASK, -(-2 * max(options.batch_sizes) // len(options.tasks)))


def best_likelihood(
    sweep: Sweep, cost: CostModel, batch_size: int, count: int, host: HostCosts | None = None
) -> list[Arm]:
    """The `count` settings of `eagle2` that are fastest in the replay at `batch_size`."""
    with tqdm(
        total=len(sweep.settings), desc="replaying settings", unit="setting", leave=False
    ) as bar:
        ranked = sweep.rank(cost, batch_size, host, on_setting=bar.update)
    return [
        Arm("eagle2", setting, f"eagle2 tuned {i + 1}")
        for i, (setting, _) in enumerate(ranked[:count])
    ]


def paper_settings(batch_size: int) -> list[dict[str, Any]]:
    """What `paper` is tuned over: its budget above all, with two families of costs."""
    return [
        {"alpha": alpha, "budget": each * batch_size, "family": family, "l_tree": l_tree}
        for family, l_tree in PAPER_FORMS
        for alpha in (1.0, 0.8, 0.5)
        for each in PAPER_BUDGETS
    ]


def best_paper(trace: Trace, batch_size: int) -> Arm:
    """The setting of `paper` that is fastest in the replay."""
    assert trace.cost is not None
    recording, cost = enough(trace.recording, batch_size), trace.cost
    rounds = max(PAPER_LEAST, PAPER_ROUNDS // batch_size)

    def rate(setting: Mapping[str, Any]) -> float:
        policy = trace.policy("paper", cost, **setting)
        return replay(policy, recording, cost, batch_size, trace.host, rounds=rounds).tokens_per_s

    grid = paper_settings(batch_size)
    settings = tqdm(grid, desc="replaying paper", unit="setting", leave=False)
    return Arm("paper", max(settings, key=rate), "paper tuned")


def cost_of(arms: Sequence[LLM]) -> CostModel:
    """The profile that the arms' policies use. Raises ConfigError if none has one."""
    found = next((arm.policy.cost for arm in arms if arm.policy.cost is not None), None)
    if found is None:
        raise ConfigError("tuning needs a policy with a cost model: add smart to the policies")
    return found


class Tuner:
    """Tuned contestants, if they are asked for; records other prompts once, when first needed."""

    def __init__(self, llm: LLM, options: LabOptions) -> None:
        self._llm, self._options = llm, options

    def arms(self, batch_size: int, progress: Progress) -> list[Arm]:
        """The best settings for a batch size; the same again when a run goes on."""
        if not (self._options.tune_eagle2 or self._options.tune_paper):
            return []
        name = f"tuned for batch {batch_size}"
        if not progress.units(name):
            progress.add(
                name, [[arm.policy, dict(arm.options), arm.name] for arm in self._found(batch_size)]
            )
        return [Arm(*kept) for kept in progress.units(name)[0]]

    def _found(self, batch_size: int) -> list[Arm]:
        options, trace = self._options, self.trace
        assert trace.cost is not None
        arms = [best_paper(trace, batch_size)] if options.tune_paper else []
        if options.tune_eagle2:
            arms += best_likelihood(
                self.sweep, trace.cost, batch_size, options.tune_eagle2, trace.host
            )
        return arms

    @cached_property
    def sweep(self) -> Sweep:
        """All settings of `eagle2` on the other prompts, repeated where a large batch would soon
        run dry."""
        sweep = Sweep(self.trace.recording, eos=self.trace.eos_token_ids)
        return sweep.repeated(enough(self.trace.recording, max(self._options.batch_sizes)))

    @cached_property
    def trace(self) -> Trace:
        """The other prompts, recorded, with this machine's costs."""
        from smart_decoding.bench.runner import encode
        from smart_lab.recorder import measure_host, prior_of, record_wide  # which need the runner

        options, llm = self._options, self._llm
        candidates = [llm.sharing_weights(options.speculation(arm)) for arm in options.arms]
        cost = cost_of(candidates)
        drafting = next(arm for arm in candidates if arm.engine.drafter is not None)
        prompts = encode(llm, self._other_texts(), options)
        recording = record_wide(drafting, prompts)
        plain = llm.sharing_weights(False)
        host = measure_host(
            plain.engine, drafting.engine, [p for of_task in prompts.values() for p in of_task][:8]
        )
        prior = next((found for arm in candidates if (found := prior_of(arm.policy))), None)
        return Trace(
            recording,
            {"temperature": options.temperature},
            tuple(llm.target.eos_token_ids),
            cost,
            host,
            prior,
        )

    def _other_texts(self) -> dict[str, list[Any]]:
        """Prompts after those that are measured. Raises ConfigError if a task has no others."""
        options = self._options
        count, used = prompts_needed(options), options.skip + options.limit
        texts = {task: load_task(task, used + count)[used:] for task in options.tasks}
        for task, others in texts.items():
            if not others:
                raise ConfigError(
                    f"tuning finds no {task} prompts beyond the first {used}: lower --limit"
                )
        return texts
