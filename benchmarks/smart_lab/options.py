"""Options of the laboratory's `bench` beyond those of `smart bench`, checked before any model is
loaded.

Needed by `bench`, whose files of results have the command, and by tests/lab/test_bench.py.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from smart_decoding.bench.options import MEAN_PROMPT, Arm, BenchOptions
from smart_decoding.errors import ConfigError
from smart_decoding.files import without_folder
from smart_lab.ablations import VARIANTS
from smart_lab.provenance import check_outputs
from smart_lab.suites import LONG_PROMPT

if TYPE_CHECKING:
    from smart_decoding.engine.sampling_params import SamplingParams
    from smart_decoding.llm import LLM

CHAINS = {"pooled_chain": "length", "throughput_chain": "max_length"}  # and what is tuned
FILES = ("draft",)  # text options that may name a folder
REPEATED = {
    "policy_options": "policy-options",
    "method_options": "method-option",
    "policy": "policy",
}


@dataclass(frozen=True, slots=True)
class LabArm(Arm):
    """A contestant that may be a variant of `smart`: one ingredient exchanged."""

    NOT_POLICY: ClassVar[Sequence[str]] = (*Arm.NOT_POLICY, "variant")


@dataclass(frozen=True, slots=True)
class LabOptions(BenchOptions):
    """The options of the laboratory's `bench`: those of `smart bench`, and these.

    seed: of the first prompt's draws.
    json: a file for the results.
    tune_eagle2: also run so many of the best `eagle2` settings of each batch size, found by replay
    on other prompts; tune_paper: and the best setting of `paper`; tune_chains: and the best lengths
    of `pooled_chain` and `throughput_chain`.
    policy_gain: also replay every contestant on the run's own recording at its own costs, where
    nothing but the policy differs.
    resume: a file that keeps what is measured, so that the same command goes on after a cut.
    record: instead of measuring, record the drafts of the prompts there, but for the first `skip`
    of each task."""

    ARM: ClassVar[type[Arm]] = LabArm

    seed: int = 0
    json: Path | None = None
    tune_eagle2: int = 0
    tune_paper: bool = False
    tune_chains: bool = False
    policy_gain: bool = False
    resume: Path | None = None
    record: Path | None = None
    skip: int = 0

    def __post_init__(self) -> None:
        if self.tune_eagle2 < 0:
            raise ConfigError(f"tune_eagle2 must not be negative, but is {self.tune_eagle2}")
        if self.skip < 0:
            raise ConfigError(f"skip must not be negative, but is {self.skip}")
        check_outputs((self.json, self.record, self.resume))
        for arm in self.arms:
            check_variant(arm)
        BenchOptions.__post_init__(self)  # super() does not work in a dataclass with slots

    def most_contestants(self) -> int:
        """Return how many hold requests at once, at most: the arms, tuned ones, and the baseline
        once more."""
        tuned = self.tune_eagle2 + self.tune_paper + len(CHAINS) * self.tune_chains
        return len(self.arms) + 1 + tuned

    def speculation(self, arm: Arm) -> dict[str, Any] | bool:
        """Return the `speculative_config` of an arm; the variant is applied to its policy later."""
        config = BenchOptions.speculation(self, arm)
        return (
            config
            if isinstance(config, bool)
            else {k: v for k, v in config.items() if k != "variant"}
        )

    def sampling(self, index: int) -> SamplingParams:
        """Parameters of prompt `index`, whose seed counts on from the run's."""
        return replace(BenchOptions.sampling(self, index), seed=self.seed + index)


def loaded(options: LabOptions) -> LLM:
    """Return the target, with memory for all contestants and for the task's longest prompts."""
    from smart_decoding.bench.runner import load  # torch is slow to import

    if "long" not in options.tasks:
        return load(options, options.most_contestants(), MEAN_PROMPT)
    longest = options.max_tokens + LONG_PROMPT
    return load(options, options.most_contestants(), LONG_PROMPT, longest)


def check_variant(arm: Arm) -> None:
    """Raise ConfigError for an unknown variant, or one of another policy than `smart`."""
    variant = arm.options.get("variant")
    if variant is not None and (arm.policy != "smart" or variant not in VARIANTS):
        raise ConfigError(f"unknown variant {variant!r}; smart has: {', '.join(VARIANTS)}")


def command_of(options: LabOptions) -> str:
    """Return the command line of this run, with names of files only; options that are empty, false
    or 0 are left out."""
    words = ["--model", without_folder(options.model)]
    for name in (each.name for each in fields(options) if each.name != "model"):
        value = getattr(options, name)
        if name in REPEATED:
            each = [f"{k}={v}" for k, v in value.items()] if isinstance(value, Mapping) else value
            each = [Path(place).name for place in value] if name == "policy" else each
            words += [word for one in each for word in (f"--{REPEATED[name]}", one)]
        elif value:
            words.append(f"--{name.replace('_', '-')}")
            words += [] if value is True else [_as_word(Path(value) if name in FILES else value)]
    return shlex.join(["python", "-m", "smart_lab", "bench", *words])


def _as_word(value: Any) -> str:
    if isinstance(value, Path):
        return value.name
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if isinstance(value, str | int) else ",".join(map(_as_word, value))
