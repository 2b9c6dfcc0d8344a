"""What the laboratory's `bench` is asked to do beyond `smart bench`, checked before any model is
loaded."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from smart_decoding.bench.options import (
    EAGLE_2,
    MEAN_PROMPT,
    PRESETS,
    Arm,
    BenchOptions,
    words_of,
)
from smart_decoding.errors import ConfigError
from smart_decoding.files import without_folder
from smart_lab.ablations import VARIANTS
from smart_lab.plots import check_outputs
from smart_lab.suites import LONG_PROMPT

VARIANT_SIZES = (1, 4)  # where variants of smart are measured
SAMPLED_SIZES = (1, 8)  # where a second temperature is

FULL: dict[str, Any] = {
    "policies": ("off", "smart", "eagle2"),
    "policy_options": (EAGLE_2,),
    "tune_eagle2": 3,
    "tune_paper": True,
    "tune_chains": True,
    "policy_gain": True,
    "batch_sizes": (1, 2, 4, 8, 16, 32),
    "limit": 40,
    "max_tokens": 96,
    "least_blocks": 8,
    "sampled": 0.8,
    "variants": ("all_levels", "cheap_kept", "cheap_costs"),
    "load": (0.3, 0.6, 0.9),
    "blocks": True,
    "suites": ("long", "edit"),
    "questions": True,
    "time_limit": 3300.0,
}
LAB_PRESETS = {**PRESETS, "full": FULL}
CHAINS = {"pooled_chain": "length", "throughput_chain": "max_length"}  # and what is tuned


@dataclass(frozen=True, slots=True)
class LabArm(Arm):
    """A contestant that may be a variant of `smart`: one ingredient exchanged."""

    NOT_POLICY: ClassVar[Sequence[str]] = (*Arm.NOT_POLICY, "variant")


@dataclass(frozen=True, slots=True)
class LabOptions(BenchOptions):
    """The options of the laboratory's `bench`: those of `smart bench`, and these.

    tune_eagle2: also run so many of the best `eagle2` settings of each batch size, found by replay
    on other prompts; tune_paper: and the best setting of `paper`; tune_chains: and the best lengths
    of `pooled_chain` and `throughput_chain`.
    policy_gain: also replay every contestant on the run's own recording at its own costs, where
    nothing but the policy differs.
    sampled: measure again at this temperature, at SAMPLED_SIZES.
    suites: tasks such as long and edit, measured at batch 1 in a part of their own, smart with
    n-grams too. variants: of `smart`, measured beside it in a part of their own, at VARIANT_SIZES.
    questions: also answer by replay how far policies are from oracle and what each ingredient
    gives.
    resume: a file that keeps what is measured, so that the same command goes on after a cut.
    html: a file for the report; plots: folder for pictures, made if need be.
    record: instead of measuring, record the drafts of the prompts there.
    random_weights, replay: measure a model of this config with random weights, its acceptance taken
    from this recording."""

    ARM: ClassVar[type[Arm]] = LabArm

    tune_eagle2: int = 0
    tune_paper: bool = False
    tune_chains: bool = False
    policy_gain: bool = False
    sampled: float = 0.0
    suites: Sequence[str] = ()
    variants: Sequence[str] = ()
    questions: bool = False
    resume: Path | None = None
    html: Path | None = None
    plots: Path | None = None
    record: Path | None = None
    random_weights: str | None = None
    replay: Path | None = None

    def __post_init__(self) -> None:
        if self.tune_eagle2 < 0:
            raise ConfigError(f"tune_eagle2 must not be negative, but is {self.tune_eagle2}")
        if self.temperature and self.sampled:
            raise ConfigError(
                "--sampled adds a second temperature to a greedy run: leave out --temperature"
            )
        if (self.random_weights is None) != (self.replay is None):
            raise ConfigError("--random-weights CONFIG and --replay TRACE go together: give both")
        if self.replay is not None and (self.temperature or self.sampled or self.load):
            raise ConfigError(
                "a replayed run is greedy and in blocks: leave out temperatures and --load"
            )
        check_outputs((self.record, self.html, self.resume), self.plots)
        for arm in [*self.arms, *self.variant_arms]:
            check_variant(arm)
        BenchOptions.__post_init__(self)  # super() does not work in a dataclass with slots

    @property
    def variant_arms(self) -> list[Arm]:
        """`smart` with one ingredient exchanged each."""
        return [LabArm("smart", {"variant": name}) for name in self.variants]

    @property
    def all_tasks(self) -> Sequence[str]:
        return (*self.tasks, *self.suites)

    @property
    def mean_prompt(self) -> int:
        return LONG_PROMPT if "long" in self.tasks else MEAN_PROMPT

    @property
    def max_model_len(self) -> int | None:
        return self.max_tokens + LONG_PROMPT if "long" in self.all_tasks else None

    def most_requests(self) -> int:
        sizes = VARIANT_SIZES if self.variants else ()
        sampled = SAMPLED_SIZES if self.sampled else ()
        return max(BenchOptions.most_requests(self), *sizes, *sampled, 1)

    def most_contestants(self) -> int:
        tuned = self.tune_eagle2 + self.tune_paper + len(CHAINS) * self.tune_chains
        suites = 2 * bool(self.suites)  # with a drafter of their own
        return BenchOptions.most_contestants(self) + max(tuned, len(self.variant_arms), suites)

    def speculation(self, arm: Arm) -> dict[str, Any] | bool:
        """The `speculative_config` of an arm; the variant is applied to its policy later."""
        config = BenchOptions.speculation(self, arm)
        return (
            config
            if isinstance(config, bool)
            else {k: v for k, v in config.items() if k != "variant"}
        )


def check_variant(arm: Arm) -> None:
    """Raises ConfigError for a variant that nobody knows, or that is not of `smart`."""
    variant = arm.options.get("variant")
    if variant is not None and (arm.policy != "smart" or variant not in VARIANTS):
        raise ConfigError(f"unknown variant {variant!r}; smart has: {', '.join(VARIANTS)}")


def command_of(options: LabOptions) -> str:
    """The command line that asks for this run."""
    model = [] if options.replay is not None else ["--model", without_folder(options.model)]
    words = words_of(options, ("model",))
    return shlex.join(["python", "-m", "smart_lab", "bench", *model, *words])
