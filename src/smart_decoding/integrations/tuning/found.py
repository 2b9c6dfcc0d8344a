"""What was measured of an engine's settings, and the choice at each load."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from smart_decoding.bench.statistics import Pair, Ratio, paired_ratio
from smart_decoding.integrations.tuning.settings import PLAIN

if TYPE_CHECKING:
    from smart_decoding.integrations.tuning.settings import Setting, Trial

MARGIN = 1.02  # times as fast as plain: less is not worth an option
NEAR = 0.95  # times as fast as plain: what has less drops out of a race
LOST = 0.9  # times as fast as plain: drafts with less are not tried with more requests


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result at one load. plain: the best setting without drafts; best: the best one with
    drafts, None if none worked; ratio: best over plain; gain: plain over the engine's defaults;
    rates: tokens per second of plain and best; drafted: tokens of a round's draft; accepted: share
    of them; tokens: of a round; cost: seconds of a round over plain decoding's."""

    load: int
    plain: Setting
    best: Setting | None
    ratio: Ratio
    gain: Ratio
    rates: tuple[float, float]
    drafted: float = 0.0
    accepted: float = 0.0
    tokens: float = 1.0
    cost: float = 1.0
    context: float = 0.0

    @property
    def pays(self) -> bool:
        """Whether drafts are faster, beyond doubt and by enough."""
        return self.best is not None and self.ratio.value > MARGIN and self.ratio.low > 1.0

    @property
    def chosen(self) -> Setting:
        """The setting to start the engine with."""
        return self.best if self.best is not None and self.pays else self.plain


@dataclass
class Found:
    """trials: load and setting -> number of a block -> its trial; bases: the plain setting that
    others are compared with now; left: settings that are left of the last race, the fastest first;
    errors: why a setting did not work at a load; left_out: settings not tried for lack of time."""

    trials: dict[tuple[int, Setting], dict[int, Trial]] = field(default_factory=dict)
    bases: dict[int, Setting] = field(default_factory=dict)
    left: dict[int, list[Setting]] = field(default_factory=dict)
    errors: dict[tuple[int, Setting], str] = field(default_factory=dict)
    left_out: list[tuple[int, Setting]] = field(default_factory=list)

    def of(self, load: int, setting: Setting) -> dict[int, Trial]:
        """Return the trials of a setting by block."""
        return self.trials.get((load, setting), {})

    def ratio(self, load: int, setting: Setting, base: Setting) -> Ratio:
        """Return how much faster a setting is than another, over the blocks that both answered,
        with its 95 % interval; NaN if there are none."""
        ours, theirs = self.of(load, setting), self.of(load, base)
        both = sorted(ours.keys() & theirs.keys())
        return paired_ratio(
            [Pair(ours[at].rate, theirs[at].rate, theirs[at].tokens) for at in both]
        )

    def value(self, load: int, setting: Setting, base: Setting) -> float:
        """Return the ratio alone; 0 where there is none."""
        value = 1.0 if setting == base else self.ratio(load, setting, base).value
        return 0.0 if math.isnan(value) else value

    def best(self, load: int, settings: Iterable[Setting], base: Setting) -> Setting:
        """Return the fastest of the settings and of `base`, which all are compared with."""
        return max((base, *settings), key=self._key(load, base))

    def finalists(self, load: int, settings: Iterable[Setting], base: Setting) -> list[Setting]:
        """Return those that were compared with `base` on at least half of the most blocks: few
        blocks flatter."""
        theirs = self.of(load, base).keys()
        shared = {each: len(self.of(load, each).keys() & theirs) for each in settings}
        most = max(shared.values(), default=0)
        return [each for each, count in shared.items() if count and 2 * count >= most]

    def _key(self, load: int, base: Setting) -> Callable[[Setting], float]:
        return lambda setting: self.value(load, setting, base)

    def settings(self, load: int) -> list[Setting]:
        """Return all that worked at a load, in the order of trying."""
        return [setting for at, setting in self.trials if at == load]

    def modes(self, load: int) -> set[str]:
        """Return the ways of drafting that worked at a load."""
        return {setting.mode for setting in self.settings(load)}

    def differs(self, load: int, setting: Setting) -> bool:
        """Return whether a setting was measured, and drafted if it should: some drafters need
        another file, and say nothing."""
        trials = self.of(load, setting).values()
        return bool(trials) and (setting.mode == PLAIN or any(trial.drafted for trial in trials))

    def broken(self, load: int, mode: str) -> bool:
        """Return whether a way of drafting failed up to this load and never worked: its other
        settings will fail, too."""
        failed = any(at <= load and each.mode == mode for at, each in self.errors)
        worked = any(at <= load and each.mode == mode for at, each in self.trials)
        return failed and mode != PLAIN and not worked

    def hopeless(self, load: int, setting: Setting) -> bool:
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
        bases = [each for each in self.settings(load) if each.mode == PLAIN]
        values = [self.value(load, setting, base) for base in bases]
        return any(0.0 < value < LOST for value in values)

    def choice(self, load: int) -> Verdict | None:
        """Return the result at a load; None if nothing was measured there."""
        settings = self.settings(load)
        plain = [setting for setting in settings if setting.mode == PLAIN]
        if not plain:
            return None
        best_plain = self.bases.get(load, plain[0])
        drafts = [each for each in settings if each.mode != PLAIN and self.differs(load, each)]
        drafts = self.finalists(load, drafts, best_plain)
        drafts = [each for each in self.left.get(load, ()) if each in drafts] or drafts
        if not drafts:  # broken off while plain decoding was tried
            best_plain = self.best(load, plain, best_plain)
        gain = self.ratio(load, best_plain, plain[0])
        if not drafts:
            none = Ratio(1.0, 1.0, 1.0, 0)
            rate = _rate(self.of(load, best_plain).values())
            return Verdict(load, best_plain, None, none, gain, (rate, rate))
        best = max(drafts, key=self._key(load, best_plain))
        return self._compared(load, best_plain, best, gain)

    def _compared(self, load: int, plain: Setting, best: Setting, gain: Ratio) -> Verdict:
        ours, theirs = self.of(load, best), self.of(load, plain)
        both = sorted(ours.keys() & theirs.keys())
        fast, slow = [ours[at] for at in both], [theirs[at] for at in both]
        rounds = sum(trial.rounds for trial in fast)
        drafted = sum(trial.drafted for trial in fast)
        tokens = sum(trial.tokens for trial in fast) / rounds
        rates = (_rate(slow), _rate(fast))
        return Verdict(
            load,
            plain,
            best,
            self.ratio(load, best, plain),
            gain,
            rates,
            drafted=drafted / rounds,
            accepted=sum(trial.accepted for trial in fast) / drafted if drafted else 0.0,
            tokens=tokens,
            cost=tokens * rates[0] / rates[1],
            context=sum(trial.context for trial in slow) / len(slow),
        )


def _rate(trials: Iterable[Trial]) -> float:
    found = list(trials)
    seconds = sum(trial.seconds for trial in found)
    return sum(trial.tokens for trial in found) / seconds if seconds else math.nan
