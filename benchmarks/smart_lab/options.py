"""Options of the laboratory's `bench` beyond those of `smart bench`, checked before any model is
loaded.

Needed by `bench`, whose files of results have the command, and by tests/lab/test_bench.py.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from smart_decoding.bench.options import MEAN_PROMPT, Arm, BenchOptions, check_outputs, words_of
from smart_decoding.errors import ConfigError
from smart_decoding.files import without_folder
from smart_lab.ablations import VARIANTS
from smart_lab.suites import LONG_PROMPT

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
    resume: a file that keeps what is measured, so that the same command goes on after a cut.
    record: instead of measuring, record the drafts of the prompts there, but for the first `skip`
    of each task."""

    ARM: ClassVar[type[Arm]] = LabArm

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
        check_outputs((self.record, self.resume))
        for arm in self.arms:
            check_variant(arm)
        BenchOptions.__post_init__(self)  # super() does not work in a dataclass with slots

    @property
    def mean_prompt(self) -> int:
        return LONG_PROMPT if "long" in self.tasks else MEAN_PROMPT

    @property
    def max_model_len(self) -> int | None:
        return self.max_tokens + LONG_PROMPT if "long" in self.tasks else None

    def most_contestants(self) -> int:
        tuned = self.tune_eagle2 + self.tune_paper + len(CHAINS) * self.tune_chains
        return BenchOptions.most_contestants(self) + tuned

    def speculation(self, arm: Arm) -> dict[str, Any] | bool:
        """Return the `speculative_config` of an arm; the variant is applied to its policy later."""
        config = BenchOptions.speculation(self, arm)
        return (
            config
            if isinstance(config, bool)
            else {k: v for k, v in config.items() if k != "variant"}
        )


def check_variant(arm: Arm) -> None:
    """Raise ConfigError for an unknown variant, or one of another policy than `smart`."""
    variant = arm.options.get("variant")
    if variant is not None and (arm.policy != "smart" or variant not in VARIANTS):
        raise ConfigError(f"unknown variant {variant!r}; smart has: {', '.join(VARIANTS)}")


def command_of(options: LabOptions) -> str:
    """Return the command line that asks for this run."""
    words = ["--model", without_folder(options.model), *words_of(options, ("model",))]
    return shlex.join(["python", "-m", "smart_lab", "bench", *words])
