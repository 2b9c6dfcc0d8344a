"""What `smart bench` is asked to do, checked before any model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from smart_decoding.bench.data import DEFAULT_TASKS, TASKS
from smart_decoding.core.policies import make_policy
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.errors import ConfigError
from smart_decoding.models import DEFAULT_MODEL

BASELINE = "off"


@dataclass(frozen=True, slots=True)
class Arm:
    """One contestant: a policy with its options. The baseline has no drafter."""

    policy: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """As tables print it: likelihood(depth=2,top_k=3)."""
        given = ",".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.policy}({given})" if given else self.policy


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """The options of `smart bench`.

    policies: names; policy_options: 'policy:name=value,...', once for each setting of a policy that is to run.
    method: drafter, or None for the model's default. limit: prompts per task. time_limit: seconds over the whole run;
    what is measured by then is reported, marked as partial. json, html: files for the results and for the report;
    plots: folder for pictures, made if need be. tune_likelihood: also run so
    many of the best `likelihood` settings of each batch size, found by replay on other prompts.
    Raises ConfigError for anything that cannot be run."""

    policies: Sequence[str] = (BASELINE, "smart")
    batch_sizes: Sequence[int] = (1, 4)
    tasks: Sequence[str] = DEFAULT_TASKS
    dtype: str = "bf16"
    temperature: float = 0.0
    limit: int = 40
    max_tokens: int = 256
    model: str = DEFAULT_MODEL
    method: str | None = None
    policy_options: Sequence[str] = ()
    time_limit: float | None = None
    seed: int = 0
    json: Path | None = None
    device: str = "auto"
    tune_likelihood: int = 0
    html: Path | None = None
    plots: Path | None = None

    def __post_init__(self) -> None:
        _at_least_one("batch_sizes", self.batch_sizes)
        _at_least_one("limit, max_tokens", (self.limit, self.max_tokens))
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown or not self.tasks:
            raise ConfigError(f"unknown task {''.join(unknown[:1])!r}; known: {', '.join(TASKS)}")
        if self.tune_likelihood < 0:
            raise ConfigError(f"tune_likelihood must not be negative, but is {self.tune_likelihood}")
        if self.time_limit is not None and self.time_limit <= 0:
            raise ConfigError(f"time_limit must be positive, not {self.time_limit}")
        check_outputs((self.json, self.html), self.plots)
        self.sampling(0)
        for arm in self.arms:
            make_policy(arm.policy, **arm.options)

    @property
    def arms(self) -> list[Arm]:
        """All contestants, the baseline first: it runs whether it is named or not."""
        settings = [parse_setting(text) for text in self.policy_options]
        idle = [arm.policy for arm in settings if arm.policy not in self.policies]
        if idle:
            raise ConfigError(f"options are given for policy {idle[0]!r}, which is not among the policies: add it")
        arms = [Arm(BASELINE)]
        for policy in self.policies:
            arms += [arm for arm in settings if arm.policy == policy] or [Arm(policy)]
        unique = {arm.label: arm for arm in arms}
        return list(unique.values())

    def sampling(self, index: int) -> SamplingParams:
        """Parameters of prompt `index`: its seed is the same under every policy and batch size."""
        return SamplingParams(temperature=self.temperature, max_tokens=self.max_tokens, seed=self.seed + index)


def check_outputs(files: Sequence[Path | None], plots: Path | None) -> None:
    """Raises ConfigError if a file, or the folder `plots`, cannot be written, or if matplotlib is missing for it."""
    for file in files:
        if file is not None and (not file.parent.is_dir() or file.is_dir()):
            raise ConfigError(f"{file} cannot be written: it must be a file in an existing folder")
    if plots is None:
        return
    if not plots.parent.is_dir() or (plots.exists() and not plots.is_dir()):
        raise ConfigError(f"{plots} cannot be made: it must be a folder in an existing folder")
    if find_spec("matplotlib") is None:
        raise ConfigError("plots need matplotlib: pip install 'smart-decoding[bench]'")


def parse_setting(text: str) -> Arm:
    """'likelihood:depth=2,top_k=3' as an arm. Raises ConfigError for another form."""
    policy, _, rest = text.partition(":")
    options = {}
    for item in filter(None, rest.split(",")):
        name, equals, value = item.partition("=")
        if not equals or not name.strip() or not value.strip():
            raise ConfigError(f"policy option {item!r} in {text!r} is not of the form name=value")
        options[name.strip()] = _value(value.strip())
    return Arm(policy.strip(), options)


def _value(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _at_least_one(name: str, values: Sequence[int]) -> None:
    if not values or min(values) < 1:
        raise ConfigError(f"{name} must be at least 1")
