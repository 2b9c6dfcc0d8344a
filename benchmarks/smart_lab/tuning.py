"""The strongest settings of other policies for each batch size: ranked by replay on prompts that
the benchmark does not use, so that what is measured live is the best that tuning by hand could have
found.

Needed by `bench --tune-eagle2` and the like, and by `ablate "eagle2 tuned"`: the rivals of the
README's second table.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np

from smart_decoding.bench.options import BASELINE, Arm
from smart_decoding.errors import ConfigError
from smart_decoding.measuring.tasks import load_task
from smart_lab.ablations import VARIANTS
from smart_lab.options import CHAINS
from smart_lab.replay import HostCosts, replay
from smart_lab.simulate import enough
from smart_lab.sweep import Setting, Sweep
from smart_lab.trace import Trace

if TYPE_CHECKING:
    from smart_decoding.core.batch import Round
    from smart_decoding.core.costs import CostModel
    from smart_decoding.core.policies.base import Policy
    from smart_decoding.llm import LLM
    from smart_decoding.measuring.resume import Progress
    from smart_lab.options import LabOptions

RECORDING = 0.4  # of the time for tuning, or for gains
PER_TASK = 8  # prompts, or more where large batches need them
PAPER_ROUNDS, PAPER_LEAST = 240, 24  # of requests; of the batch
PAPER_BUDGETS = (1, 2, 4, 8, 16, 32)  # nodes per request
LENGTHS = range(1, 9)
PAPER_FORMS = (
    ("published", "published"),
    ("offset", "node_sum"),
)  # as in the paper; with its two mistakes mended


Late: TypeAlias = Callable[[], bool]  # whether the time is over


def never() -> bool:
    """The time is never over."""
    return False


def prompts_needed(options: LabOptions) -> int:
    """Tuning prompts per task: enough to keep the largest batch full for a while."""
    return max(PER_TASK, -(-2 * max(options.batch_sizes) // len(options.tasks)))


def best_likelihood(
    sweep: Sweep,
    cost: CostModel,
    batch_size: int,
    count: int,
    host: HostCosts | None = None,
    late: Late = never,
) -> list[Arm]:
    """Return the `count` settings of `eagle2` that are fastest in the replay at `batch_size`, each
    with another number of nodes: where costs are wrong, that is what is chosen wrongly. Chains are
    among them."""
    of_size: dict[int, Setting] = {}
    for setting, _ in sweep.rank(cost, batch_size, host, late):
        of_size.setdefault(setting["total_tokens"], setting)
    finalists = list(of_size.values())[:count]
    return [Arm("eagle2", setting, f"eagle2 tuned {i + 1}") for i, setting in enumerate(finalists)]


def paper_settings(batch_size: int) -> list[dict[str, Any]]:
    """Return what `paper` is tuned over: its budget above all, with two families of costs."""
    return [
        {"alpha": alpha, "budget": each * batch_size, "family": family, "l_tree": l_tree}
        for family, l_tree in PAPER_FORMS
        for alpha in (1.0, 0.8, 0.5)
        for each in PAPER_BUDGETS
    ]


def best_paper(trace: Trace, batch_size: int, late: Late = never) -> Arm:
    """Return the setting of `paper` that is fastest in the replay."""
    rounds = max(PAPER_LEAST, PAPER_ROUNDS // batch_size)
    settings = paper_settings(batch_size)
    return Arm("paper", _best(trace, "paper", settings, batch_size, late, rounds), "paper tuned")


def best_chain(trace: Trace, policy: str, batch_size: int, late: Late = never) -> Arm:
    """Return the length of `pooled_chain` or `throughput_chain` that is fastest in the replay."""
    settings = [{CHAINS[policy]: length} for length in LENGTHS]
    return Arm(policy, _best(trace, policy, settings, batch_size, late), f"{policy} tuned")


def _best(
    trace: Trace,
    policy: str,
    settings: Sequence[dict[str, Any]],
    batch_size: int,
    late: Late,
    rounds: int | None = None,
) -> dict[str, Any]:
    """Return the setting of a policy that is fastest in the replay, of all tried in time."""
    assert trace.cost is not None
    recording, cost = enough(trace.recording, batch_size), trace.cost
    rates: list[float] = []
    for setting in settings:
        if rates and late():
            break
        made = trace.policy(policy, cost, **setting)
        found = replay(made, recording, cost, batch_size, trace.host, rounds=rounds)
        rates.append(found.tokens_per_s)
    return settings[int(np.argmax(rates))]


def gains(
    trace: Trace, arms: Sequence[Arm], batch_size: int, late: Late = never
) -> dict[str, float]:
    """Label -> tokens per second over plain decoding's, by replay at the trace's costs, of those
    that there was time for."""
    assert trace.cost is not None
    recording = enough(trace.recording, batch_size)
    rates: dict[str, float] = {}
    for arm in (Arm(BASELINE), *arms):
        if "method" in arm.options:
            continue
        if rates and late():
            break
        policy = trace.policy(arm.policy, trace.cost, **arm.policy_options)
        if "variant" in arm.options:
            policy = VARIANTS[arm.options["variant"]](cast("Any", policy))
        found = replay(policy, recording, trace.cost, batch_size, trace.host)
        rates[arm.label] = found.tokens_per_s
    return {label: rate / rates[BASELINE] for label, rate in rates.items() if len(rates) > 1}


def best_fixed(trace: Trace, sweep: Sweep, batch_size: int) -> Arm:
    """Return the best of all fixed trees and chains."""
    assert trace.cost is not None
    trees = sweep.repeated(enough(trace.recording, batch_size))
    return best_likelihood(trees, trace.cost, batch_size, 1, trace.host)[0]


# What a rival's best setting at a trace's costs and a batch size is; a sweep has the fixed trees.
RIVALS: Mapping[str, Callable[[Trace, Sweep, int], Arm]] = {
    "eagle2 tuned": best_fixed,
    "paper tuned": lambda trace, _, size: best_paper(trace, size),
    "pooled_chain tuned": lambda trace, _, size: best_chain(trace, "pooled_chain", size),
    "throughput_chain tuned": lambda trace, _, size: best_chain(trace, "throughput_chain", size),
}


class Traced:
    """A policy, and what it makes of rounds: the shapes and tokens of what is kept, and the levels
    that are drafted."""

    def __init__(self, policy: Policy) -> None:
        self.name = policy.name
        self.cost = policy.cost
        self.plan = policy.plan
        self.stats = policy.stats
        self._policy = policy
        self._digest = hashlib.sha256()

    def observe(self, round: Round) -> None:
        """Learns, and keeps account."""
        trees = round.trees.take(round.kept)
        widths = np.array([-1, *round.level_widths, -1])
        for column in (widths, trees.owner, trees.parent, trees.token):
            self._digest.update(np.asarray(column, np.int64).tobytes())
        self._policy.observe(round)

    @property
    def digest(self) -> str:
        """The same of two policies that have drafted and verified the same in every round."""
        return self._digest.hexdigest()


def distinct(arms: Sequence[Arm], trace: Trace, batch_size: int, rounds: int = 200) -> list[Arm]:
    """Return the arms whose trees differ, by replay, from those of all earlier arms.

    Each arm left out is printed with its double."""
    first: dict[str, Arm] = {}
    for arm in arms:
        found = Traced(trace.policy(arm.policy, trace.cost, **arm.policy_options))
        recording = enough(trace.recording, batch_size)
        assert trace.cost is not None
        replay(found, recording, trace.cost, batch_size, trace.host, rounds=rounds)
        same = first.setdefault(found.digest, arm)
        if same is not arm:
            message = f"smart_lab: {arm.label} verifies the trees of {same.label}: left out"
            print(message, file=sys.stderr)
    return list(first.values())


def cost_of(arms: Sequence[LLM]) -> CostModel:
    """Return the profile that the arms' policies use. Raises ConfigError if none has one."""
    found = next((arm.policy.cost for arm in arms if arm.policy.cost is not None), None)
    if found is None:
        raise ConfigError("tuning needs a policy with a cost model: add smart to the policies")
    return found


class Tuner:
    """Tuned contestants, if the options request them; records other prompts once, at first use.

    clock: in seconds, of the callers' `stop`; a setting or a prompt that was begun is finished."""

    def __init__(
        self, llm: LLM, options: LabOptions, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._llm, self._options, self._clock = llm, options, clock
        self._traces: dict[str, Trace] = {}
        self._drawn: Sweep | None = None

    def arms(self, batch_size: int, progress: Progress, stop: float | None = None) -> list[Arm]:
        """Return the best settings for a batch size; the same again when a run goes on."""
        options = self._options
        if not (options.tune_eagle2 or options.tune_paper or options.tune_chains):
            return []
        name = f"tuned for batch {batch_size}"
        if not progress.units(name):
            print(f"smart_lab: tuning rivals by replay, batch {batch_size}", file=sys.stderr)
            found = self._found(batch_size, stop)
            progress.add(name, [[arm.policy, dict(arm.options), arm.name] for arm in found])
            if self._late(stop)():
                reason = "the time limit came before all settings were tried"
                print(f"smart_lab: batch {batch_size}: {reason}", file=sys.stderr)
        return [Arm(*kept) for kept in progress.units(name)[0]]

    def _found(self, batch_size: int, stop: float | None) -> list[Arm]:
        """Return the tuned contestants, without those whose trees equal another contestant's."""
        options = self._options
        trace = self._trace("others", self._other_texts, self._within(stop, RECORDING))
        assert trace.cost is not None
        arms: list[Arm] = []
        if options.tune_chains:
            late = self._late(self._within(stop, 0.2))
            arms += [best_chain(trace, policy, batch_size, late) for policy in CHAINS]
        if options.tune_paper:
            arms.append(best_paper(trace, batch_size, self._late(self._within(stop, 0.3))))
        if options.tune_eagle2:
            sweep, late = self._sweep(trace), self._late(stop)
            count = options.tune_eagle2
            arms += best_likelihood(sweep, trace.cost, batch_size, count, trace.host, late)
        fixed = [arm for arm in options.arms if "method" not in arm.options]
        return [arm for arm in distinct([*fixed, *arms], trace, batch_size) if arm in arms]

    def _sweep(self, trace: Trace) -> Sweep:
        """Return all settings of `eagle2` on the other prompts, repeated where a large batch would
        soon run dry; their trees are drawn once."""
        if self._drawn is None:
            sweep = Sweep(trace.recording, eos=trace.eos_token_ids)
            self._drawn = sweep.repeated(enough(trace.recording, max(self._options.batch_sizes)))
        return self._drawn

    def gains(
        self,
        arms: Sequence[Arm],
        batch_size: int,
        progress: Progress,
        stop: float | None = None,
    ) -> dict[str, float]:
        """Label -> tokens per second over plain decoding's where only policies differ: on this
        run's recording, at its costs. Of those with a drafter of their own nothing is known."""
        name = f"policy gains, batch {batch_size}"
        if not progress.units(name):
            own = self._trace("own", self._own_texts, self._within(stop, RECORDING))
            found = gains(own, arms, batch_size, self._late(stop))
            if self._late(stop)():
                return found  # the rest when the run goes on
            progress.add(name, found)
        kept: dict[str, float] = progress.units(name)[0]
        return kept

    def _late(self, stop: float | None) -> Late:
        return never if stop is None else lambda: self._clock() > stop

    def _within(self, stop: float | None, share: float) -> float | None:
        """Return the second in which a part ends that may take a share of the time left."""
        now = self._clock()
        return None if stop is None else now + share * max(0.0, stop - now)

    def _trace(
        self, name: str, texts: Callable[[], Mapping[str, Sequence[Any]]], stop: float | None
    ) -> Trace:
        """Texts recorded once, with this machine's costs."""
        if name not in self._traces:
            self._traces[name] = self._recorded(texts(), self._late(stop))
        return self._traces[name]

    def _recorded(self, texts: Mapping[str, Sequence[Any]], late: Late) -> Trace:
        """These texts' drafts, what the machine's rounds take, and what `smart` starts from."""
        from smart_decoding.bench.runner import encode
        from smart_lab.recorder import measure_host, prior_of, record_wide  # which need the runner

        options, llm = self._options, self._llm
        candidates = [llm.sharing_weights(options.speculation(arm)) for arm in options.arms]
        cost = cost_of(candidates)
        drafting = next(arm for arm in candidates if arm.engine.drafts)
        prompts = encode(llm, texts, options)
        recording = record_wide(drafting, prompts, late)
        plain = llm.sharing_weights(False)
        mixed = [prompt for of_task in prompts.values() for prompt in of_task]
        host = measure_host(plain.engine, drafting.engine, mixed[:8], late)
        prior = next((found for arm in candidates if (found := prior_of(arm.policy))), None)
        about = {"temperature": options.temperature}
        ends = tuple(llm.target.eos_token_ids)
        return Trace(recording, about, ends, cost, host, prior)

    def _own_texts(self) -> dict[str, list[Any]]:
        """Return the first of the prompts that are measured."""
        options = self._options
        count = min(options.limit, prompts_needed(options))
        return {task: load_task(task, count) for task in options.tasks}

    def _other_texts(self) -> dict[str, list[Any]]:
        """Return the prompts after the measured ones. Raises ConfigError if a task has no more."""
        options = self._options
        count, used = prompts_needed(options), options.limit
        texts = {task: load_task(task, used + count)[used:] for task in options.tasks}
        for task, others in texts.items():
            if not others:
                raise ConfigError(
                    f"tuning finds no {task} prompts beyond the first {used}: lower --limit"
                )
        return texts
