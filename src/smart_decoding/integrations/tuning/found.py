"""What was measured of an engine's settings, and the choice at each load."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from smart_decoding.integrations.tuning import verdicts
from smart_decoding.integrations.tuning.settings import PLAIN

if TYPE_CHECKING:
    from smart_decoding.integrations.tuning.settings import Setting, Trial
    from smart_decoding.integrations.tuning.verdicts import Verdict
    from smart_decoding.measuring.statistics import Ratio

LOST = 0.9  # times as fast as plain: drafts with less are not tried with more requests


class Trials(dict[tuple[int, "Setting"], dict[int, "Trial"]]):
    """Load and setting -> number of a block -> its trial, each of a process of its own."""

    def of(self, load: int, setting: Setting) -> dict[int, Trial]:
        """Return the trials of a setting by block."""
        return self.get((load, setting), {})

    @property
    def end(self) -> int:
        """The number of the first block that nothing answered."""
        return 1 + max((block for of in self.values() for block in of), default=-1)

    def ratios(self, load: int, setting: Setting, base: Setting) -> list[float]:
        """Return how much faster a setting is than another, for each block that both answered."""
        ours, theirs = self.of(load, setting), self.of(load, base)
        return [ours[at].rate / theirs[at].rate for at in sorted(ours.keys() & theirs.keys())]

    def ratio(self, load: int, setting: Setting, base: Setting) -> Ratio:
        """Return their mean with an interval; NaN if no block was answered by both."""
        return verdicts.at_look(self.ratios(load, setting, base))

    def value(self, load: int, setting: Setting, base: Setting) -> float:
        """Return the mean ratio alone; 0 where there is none."""
        return 1.0 if setting == base else mean(self.ratios(load, setting, base))


@dataclass(frozen=True, slots=True)
class LoadResult:
    """The result at one load. plain: the setting without drafts; best: the best one with drafts,
    None if none worked; ratio: best over plain; faster: the verdict on it, False where none worked,
    None without one; lacking: seconds that a verdict takes at most; rates: tokens per second of
    plain and best; drafted: tokens of a round's draft; accepted: share of them; tokens: of a round;
    cost: seconds of a round over plain decoding's."""

    load: int
    plain: Setting
    best: Setting | None
    ratio: Ratio
    faster: bool | None
    rates: tuple[float, float]
    lacking: float = 0.0
    drafted: float = 0.0
    accepted: float = 0.0
    tokens: float = 1.0
    cost: float = 1.0
    context: float = 0.0

    @property
    def pays(self) -> bool:
        """Whether a verdict says that drafts are faster."""
        return self.best is not None and self.faster is True

    @property
    def open(self) -> bool:
        """Whether there was no time for a verdict, or for any drafts."""
        return self.faster is None

    @property
    def chosen(self) -> Setting:
        """The setting to start the engine with."""
        return self.best if self.best is not None and self.pays else self.plain


@dataclass
class Found:
    """trials: while settings were chosen; judged: of verdicts; base: plain decoding at a load, its
    options confirmed by verdicts; verdicts: of a load in the order of stages; errors: why a setting
    did not work at a load; left_out: settings not tried for lack of time; ended: loads whose race
    of drafts came to its end; notes: of engines."""

    trials: Trials = field(default_factory=Trials)
    judged: Trials = field(default_factory=Trials)
    base: dict[int, Setting] = field(default_factory=dict)
    verdicts: dict[int, list[Verdict]] = field(default_factory=dict)
    errors: dict[tuple[int, Setting], str] = field(default_factory=dict)
    left_out: dict[tuple[int, Setting], None] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    notes: dict[str, None] = field(default_factory=dict)

    def all_of(self, load: int, setting: Setting) -> list[Trial]:
        """Return all trials of a setting."""
        return [
            *self.trials.of(load, setting).values(),
            *self.judged.of(load, setting).values(),
        ]

    def settings(self, load: int) -> list[Setting]:
        """Return all that worked at a load, in the order of trying."""
        both = (*self.trials, *self.judged)
        return list(dict.fromkeys(setting for at, setting in both if at == load))

    def differs(self, load: int, setting: Setting) -> bool:
        """Return whether a setting was measured, and drafted if it should: some drafters need
        another file, and say nothing."""
        trials = self.all_of(load, setting)
        return bool(trials) and (setting.mode == PLAIN or any(trial.drafted for trial in trials))

    def broken(self, load: int, mode: str) -> bool:
        """Return whether a way of drafting failed up to this load and never worked: its other
        settings will fail, too."""
        failed = any(at <= load and each.mode == mode for at, each in self.errors)
        worked = any(at <= load and each.mode == mode for at, each in self.trials)
        return failed and mode != PLAIN and not worked

    def can_work(self, load: int, setting: Setting) -> bool:
        """Return whether nothing that is known speaks against trying a setting."""
        return not self.broken(load, setting.mode) and not self._hopeless(load, setting)

    def _hopeless(self, load: int, setting: Setting) -> bool:
        """Return whether a setting failed at a lighter load, or its drafts lost clearly there: a
        row costs more where there are more of them."""
        if not setting.drafts:
            return any(at < load and each == setting for at, each in self.errors)
        if any(at < load and each.drafts == setting.drafts for at, each in self.errors):
            return True
        return any(
            at < load and each.drafts == setting.drafts and self._lost(at, each)
            for at, each in self.trials
        )

    def _lost(self, load: int, setting: Setting) -> bool:
        return 0.0 < self.trials.value(load, setting, self.base[load]) < LOST

    def choice(self, load: int) -> LoadResult | None:
        """Return the result at a load; None if nothing was measured there."""
        plain = self.base.get(load)
        if plain is None or not self.all_of(load, plain):
            return None
        of_drafts = [
            each
            for each in self.verdicts.get(load, [])
            if each.setting.drafts and (load, each.setting) not in self.errors
        ]
        verdict = of_drafts[0] if of_drafts else self._so_far(load, plain)
        waiting = [each for at, each in self.left_out if at == load and each.drafts]
        if verdict is None and waiting:
            verdict = verdicts.Verdict(load, plain, waiting[0], verdicts.at_look([]), None)
        if verdict is None:
            rate = _rate(self.all_of(load, plain))
            faster = False if load in self.ended else None
            return LoadResult(load, plain, None, verdicts.at_look([]), faster, (rate, rate))
        beside = bool(self.judged.ratios(load, verdict.setting, plain))
        return _choice(self.judged if beside else self.trials, verdict)

    def _so_far(self, load: int, plain: Setting) -> Verdict | None:
        """Return the best drafts of a race that was broken off, without a verdict."""
        drafts = [each for each in self.settings(load) if each.mode != PLAIN]
        drafts = [s for s in drafts if self.differs(load, s) and (load, s) not in self.errors]
        drafts = [each for each in drafts if self.trials.ratios(load, each, plain)]
        if not drafts:
            return None
        best = max(drafts, key=lambda each: self.trials.value(load, each, plain))
        ratio = self.trials.ratio(load, best, plain)
        return verdicts.Verdict(load, plain, best, ratio, None)


def _choice(trials: Trials, verdict: Verdict) -> LoadResult:
    """Return the choice that a verdict means, with figures of these trials."""
    load, plain, best = verdict.load, verdict.base, verdict.setting
    ours, theirs = trials.of(load, best), trials.of(load, plain)
    both = sorted(ours.keys() & theirs.keys())
    fast, slow = [ours[at] for at in both], [theirs[at] for at in both]
    if not both:
        rates = (_rate(theirs.values()), math.nan)
        return LoadResult(load, plain, best, verdict.ratio, None, rates, lacking=verdict.lacking)
    rounds = sum(trial.rounds for trial in fast)
    drafted = sum(trial.drafted for trial in fast)
    tokens = sum(trial.tokens for trial in fast) / rounds
    rates = (_rate(slow), _rate(fast))
    return LoadResult(
        load,
        plain,
        best,
        verdict.ratio,
        verdict.faster,
        rates,
        lacking=verdict.lacking,
        drafted=drafted / rounds,
        accepted=sum(trial.accepted for trial in fast) / drafted if drafted else 0.0,
        tokens=tokens,
        cost=tokens * rates[0] / rates[1],
        context=sum(trial.context for trial in slow) / len(slow),
    )


def mean(ratios: Sequence[float]) -> float:
    """Return the geometric mean; 0 of none."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else 0.0


def _rate(trials: Iterable[Trial]) -> float:
    found = list(trials)
    seconds = sum(trial.seconds for trial in found)
    return sum(trial.tokens for trial in found) / seconds if seconds else math.nan
