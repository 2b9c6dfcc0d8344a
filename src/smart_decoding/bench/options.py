"""The options of `smart bench`, checked before any model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from smart_decoding.drafters import METHODS, check_draft
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.errors import ConfigError
from smart_decoding.measuring.tasks import DEFAULT_TASKS, TASKS
from smart_decoding.models.checkpoints.registry import DEFAULT_MODEL
from smart_decoding.models.text import chat_template

BASELINE, OURS = "off", "smart"
# Tokens of a prompt for which KV memory is sized: the mean of a batch, and the longest.
MEAN_PROMPT = 256
LONGEST_PROMPT = 1024
# The options that `--quick` sets, for tables within three minutes.
QUICK: dict[str, Any] = {
    "policies": ("off", "smart", "chain"),
    "batch_sizes": (1, 4, 16),
    "limit": 8,
    "max_tokens": 64,
    "time_limit": 100.0,
}


@dataclass(frozen=True, slots=True)
class Arm:
    """One contestant: a policy with its options, `method` and `model` among them where it has a
    drafter of its own.

    The baseline has no drafter."""

    NOT_POLICY: ClassVar[Sequence[str]] = ("method", "model")  # options that say what drafts

    policy: str
    options: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""  # instead of the options, where they differ from batch size to batch size

    @property
    def label(self) -> str:
        """The arm's name in tables: eagle2(depth=2,top_k=3)."""
        if self.name:
            return self.name
        shown = {
            name: Path(str(value)).name if name == "model" else value
            for name, value in self.options.items()
        }
        settings = ",".join(f"{name}={value}" for name, value in shown.items())
        return f"{self.policy}({settings})" if settings else self.policy

    @property
    def policy_options(self) -> dict[str, Any]:
        """The options of the policy itself."""
        return {name: value for name, value in self.options.items() if name not in self.NOT_POLICY}


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """The options of `smart bench`.

    policies: names; policy_options: 'policy:name=value,...', once for each setting of a policy that
    is to run. method: drafter, or None for the model's default; draft: what it drafts with, a
    head's folder or a smaller model; method_options: its other options.
    policy: a user's own, 'FILE.py:CLASS' each, in addition to those named. prompts: a file of
    prompts, measured as a task of that name.
    limit: prompts per task.
    time_limit: seconds over the whole run; results so far are then reported, marked as partial.
    quantization, activations, chat_template, trust_pickle: as `EngineArgs` takes them.
    allow_slow: run plain torch on a CPU where the CPU kernels cannot run.
    Raises ConfigError for anything that cannot be run."""

    ARM: ClassVar[type[Arm]] = Arm

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
    device: str = "auto"
    draft: str | None = None
    method_options: Mapping[str, Any] = field(default_factory=dict)
    quantization: str | None = None
    activations: str | None = None
    chat_template: str | None = None
    trust_pickle: bool = False
    allow_slow: bool = False
    policy: Sequence[str] = ()
    prompts: Path | None = None

    def __post_init__(self) -> None:
        if self.chat_template is not None:
            chat_template.read(self.chat_template)
        _at_least_one("batch_sizes", self.batch_sizes)
        _at_least_one("limit, max_tokens", (self.limit, self.max_tokens))
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown or not self.tasks:
            raise ConfigError(f"unknown task {''.join(unknown[:1])!r}; known: {', '.join(TASKS)}")
        if self.time_limit is not None and self.time_limit <= 0:
            raise ConfigError(f"time_limit must be positive, not {self.time_limit}")
        self.sampling(0)
        self._check_arms()

    def _check_arms(self) -> None:
        from smart_decoding.core.policies import make_policy  # imported late: numpy is slow

        for arm in self.arms:
            make_policy(arm.policy, **arm.policy_options)
            method = arm.options.get("method", self.method)
            if method is not None and method not in METHODS:
                raise ConfigError(f"unknown method {method!r}; choose one of: {', '.join(METHODS)}")
            if method == "none":
                raise ConfigError(
                    "method 'none' leaves nothing to compare with plain decoding: "
                    "choose one that drafts"
                )
            check_draft(method, self.draft or arm.options.get("model"), "--draft MODEL")
        if "model" in self.method_options and self.draft:
            raise ConfigError(
                "the model to draft with is given by --draft and by --method-option: give it once"
            )

    @property
    def arms(self) -> list[Arm]:
        """All contestants, the baseline first: it runs whether it is named or not."""
        settings = [parse_setting(text, self.ARM) for text in self.policy_options]
        idle = [arm.policy for arm in settings if arm.policy not in self.policies]
        if idle:
            raise ConfigError(
                f"options are given for policy {idle[0]!r}, which is not among the policies: add it"
            )
        arms = [self.ARM(BASELINE)]
        for policy in self.policies:
            arms += [arm for arm in settings if arm.policy == policy] or [self.ARM(policy)]
        unique = {arm.label: arm for arm in arms}
        return list(unique.values())

    def speculation(self, arm: Arm) -> dict[str, Any] | bool:
        """Return the `speculative_config` of an arm."""
        if arm.policy == BASELINE:
            return False
        named = {"method": self.method, "model": self.draft}
        options = dict(arm.options)
        common = {name: value for name, value in named.items() if value is not None}
        if "method" in options:  # a drafter of its own, without the common model and options
            return {"policy": arm.policy, **options}
        return {**common, **self.method_options, "policy": arm.policy, **options}

    def sampling(self, index: int) -> SamplingParams:
        """Parameters of prompt `index`: its seed is the same under every policy and batch size."""
        return SamplingParams(temperature=self.temperature, max_tokens=self.max_tokens, seed=index)


def parse_setting(text: str, kind: type[Arm] = Arm) -> Arm:
    """'eagle2:depth=2,top_k=3' as an arm. Raises ConfigError for another form."""
    policy, _, rest = text.partition(":")
    options = {}
    for item in filter(None, rest.split(",")):
        name, equals, value = item.partition("=")
        if not equals or not name.strip() or not value.strip():
            raise ConfigError(f"policy option {item!r} in {text!r} is not of the form name=value")
        options[name.strip()] = _value(value.strip())
    return kind(policy.strip(), options)


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
