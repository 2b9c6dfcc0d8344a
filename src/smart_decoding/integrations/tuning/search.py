"""The search: in each stage a race chooses one setting, and a verdict compares it with the base.

In a race all settings answer a block of prompts, the faster half another one, until one is left.
A verdict takes new processes and other prompts. One engine runs at a time, started for one block
of each load: another one in memory, even a stopped one, would change what is measured.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from smart_decoding.errors import ModelError
from smart_decoding.integrations.tuning import verdicts
from smart_decoding.integrations.tuning.found import Found, Trials
from smart_decoding.integrations.tuning.settings import PLAIN, Setting, Trial
from smart_decoding.integrations.tuning.verdicts import Verdict

if TYPE_CHECKING:
    from smart_decoding.integrations.tuning.engines import Tunable
    from smart_decoding.measuring.resume import Progress

KEPT = 2  # of so many settings one is left after a block
NEAR = 0.95  # times as fast as the base, in one block: what has less gets no verdict
OF_PLAIN = 1 / 3  # share of a load's time for a stage of plain decoding's options
OF_RACE = 1 / 2  # share of a stage's time for its race

Tell = Callable[[str, float], object]  # a line on what is measured, and the share that is done
RACES, JUDGED, CHOSEN = "races", "judged", "chosen"  # names of units in the file of --resume


class Prompts:
    """Prompts in blocks, every other one for races and the rest for verdicts: block after block,
    from the first again behind the last."""

    def __init__(self, texts: Sequence[str], first: int = 0) -> None:
        """first: of all blocks, the one that counts as number 0."""
        self._first = first
        self._texts = {RACES: list(texts[::2]), JUDGED: list(texts[1::2] or texts)}

    def block(self, use: str, number: int, size: int) -> list[str]:
        """Return the prompts of a block."""
        texts = self._texts[use]
        size = min(size, len(texts))
        number += self._first
        return [texts[(number * size + i) % len(texts)] for i in range(size)]


class Search:
    """One run over all loads. `found` holds what is known at any time."""

    def __init__(
        self,
        engine: Tunable,
        prompts: Prompts,
        progress: Progress,
        stop: float = math.inf,
        tell: Tell = lambda line, done: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """progress: where trials are kept; stop: when it ends, by `clock`."""
        self.found = Found()
        self._engine, self._prompts, self._progress, self._tell = engine, prompts, progress, tell
        self._stop, self._clock = stop, clock
        self._took: dict[tuple[int, Setting], float] = {}  # seconds of a block
        self._loading = 0.0  # seconds to start an engine and to end it
        self._group_time = (0, 1, 0.0, math.inf)  # which group, of how many, from when to when
        self._chosen = {(u["load"], u["stage"]): u["setting"] for u in progress.units(CHOSEN)}
        for use in (RACES, JUDGED):
            for unit in progress.units(use):
                self._read(use, unit)

    def run(self, loads: Sequence[int]) -> Found:
        """Measure at all loads, until the time is up. Raises ModelError if the engine's defaults do
        not work."""
        groups = self._engine.groups(loads)
        for at, group in enumerate(groups):
            now = self._clock()
            stop = now + (self._stop - now) / (len(groups) - at)
            self._group_time = at, len(groups), now, stop
            self._group(group, stop)
        self._tell("", 1.0)
        return self.found

    def _group(self, loads: Sequence[int], stop: float) -> None:
        found = self.found
        found.base |= dict.fromkeys(loads, Setting())
        races = judged = 0  # blocks of earlier stages
        for stage, settings in enumerate(self._engine.stages(loads, found)):
            plain = all(setting.mode == PLAIN for setting in settings)
            until = self._part(stop, OF_PLAIN if plain else 1.0)
            begun = any((load, stage) in self._chosen for load in loads)
            if plain and not begun and not self._worth_starting(loads, settings, until):
                found.left_out |= {(load, each): None for load in loads for each in settings}
                chosen = {}
            else:
                working = {at: [s for s in settings if found.can_work(at, s)] for at in loads}
                chosen = self._race(stage, working, races, until)
                self._judge(chosen, judged, until)
            races, judged = races + len(settings), judged + verdicts.MOST
            for load in chosen:
                verdict = found.verdicts[load][-1]
                if plain and verdict.faster:
                    found.base[load] = verdict.setting
            if not plain:
                found.ended |= {load for load in loads if self._is_chosen(load, stage)}

    def _worth_starting(
        self, loads: Sequence[int], settings: Sequence[Setting], until: float
    ) -> bool:
        """Return whether there is time for a race of all and for the first look of a verdict:
        options that nothing confirms only take the time of drafts."""
        blocks = 2 * min(verdicts.LOOKS) + (len(settings) + 1 if len(settings) > 1 else 0)
        seconds = sum(self._expected(load, self.found.base[load]) for load in loads)
        return self._clock() + blocks * (self._loading + seconds) < until

    def _race(
        self, stage: int, open_: Mapping[int, Sequence[Setting]], first: int, until: float
    ) -> dict[int, Setting]:
        """Return the setting of each load that a verdict is to compare with its base. One that is
        not near it gets its verdict here. first: number of the first block."""
        alive = {load: list(of) for load, of in open_.items() if not self._is_chosen(load, stage)}
        contested = any(len(of) > 1 for of in alive.values())
        until = self._part(until, OF_RACE)
        turn = 0
        while turn == 0 or any(len(of) > 1 for of in alive.values()):
            if not contested or not self._round(alive, first + turn, turn == 0, until):
                break
            alive = {load: self._survivors(load, of) for load, of in alive.items()}
            turn += 1
        for load, of in alive.items():
            if contested and not turn:
                self._not_tried(load, of)
                continue
            self._chosen[load, stage] = asdict(of[0]) if of else None
            unit = {"load": load, "stage": stage, "setting": self._chosen[load, stage]}
            self._progress.add(CHOSEN, unit)
        kept = {at: self._chosen[at, stage] for at in open_ if self._is_chosen(at, stage)}
        for load, each in kept.items():
            if each is None:
                self._give_up(load, open_[load])
        return {load: setting_of(each) for load, each in kept.items() if each is not None}

    def _is_chosen(self, load: int, stage: int) -> bool:
        """Return whether a race has ended, by now or in an earlier part of the run, with the base
        of today: more time may have changed it."""
        if (load, stage) not in self._chosen:
            return False
        kept, base = self._chosen[load, stage], self.found.base[load].base
        return kept is None or tuple(kept["base"][: len(base)]) == base

    def _round(
        self, alive: dict[int, list[Setting]], block: int, first: bool, until: float
    ) -> bool:
        """Measure one more block of all that are alive; return whether there was time for all. In
        the first round what there is no time for is left out, in others the round is."""
        settings = list(dict.fromkeys(s for of in alive.values() for s in of))
        jobs = [(s, [load for load, of in alive.items() if s in of]) for s in settings]
        bases = self._bases(alive) if first else []
        if not self._time_for(bases if first else jobs, RACES, block, until):
            return False
        for setting, loads in bases:
            self._say(alive, f"{setting}")
            self._answered(setting, loads, RACES, block)
        measured = False
        for number, (setting, loads) in enumerate(jobs):
            working = [at for at in loads if not self.found.broken(at, setting.mode)]
            if not working:
                continue
            if not first or self._time_for([(setting, working)], RACES, block, until):
                self._say(alive, f"{number + 1} of {len(jobs)}: {setting}")
                self._answered(setting, working, RACES, block)
                measured = True
            else:
                self.found.left_out |= {(load, setting): None for load in working}
        return measured

    def _bases(self, loads: Iterable[int]) -> list[tuple[Setting, list[int]]]:
        base = self.found.base
        return [
            (setting, [load for load in loads if base[load] == setting])
            for setting in dict.fromkeys(base[load] for load in loads)
        ]

    def _survivors(self, load: int, alive: Sequence[Setting]) -> list[Setting]:
        """Return the faster half, without those that are not near the base."""
        found, base = self.found, self.found.base[load]
        working = [s for s in alive if (load, s) not in found.errors and found.differs(load, s)]
        near = [s for s in working if found.trials.value(load, s, base) >= NEAR]
        ranked = sorted(near, key=lambda s: self._speed(load, s), reverse=True)
        return ranked[: -(-len(alive) // KEPT)]

    def _speed(self, load: int, setting: Setting) -> float:
        """Return the mean logarithm of its rates: all that are compared answered the same
        blocks."""
        rates = [trial.rate for trial in self.found.trials.of(load, setting).values()]
        return sum(map(math.log, rates)) / len(rates)

    def _give_up(self, load: int, settings: Sequence[Setting]) -> None:
        """Note that nothing was near the base, with the best there was."""
        found, base = self.found, self.found.base[load]
        tried = [s for s in settings if found.differs(load, s)]
        tried = [s for s in tried if found.trials.ratios(load, s, base)]
        if tried:
            best = max(tried, key=lambda s: found.trials.value(load, s, base))
            ratio = found.trials.ratio(load, best, base)
            verdict = Verdict(load, base, best, ratio, False)
            found.verdicts.setdefault(load, []).append(verdict)

    def _not_tried(self, load: int, settings: Sequence[Setting]) -> None:
        """Note that the time is up before any of them was tried."""
        self.found.left_out |= {(load, setting): None for setting in settings}
        if not settings:
            return
        blocks = len(settings) + 2 * verdicts.MOST
        seconds = blocks * (self._loading + self._expected(load, settings[0]))
        base, ratio = self.found.base[load], verdicts.at_look([])
        verdict = Verdict(load, base, settings[0], ratio, None, seconds)
        self.found.verdicts.setdefault(load, []).append(verdict)

    def _judge(self, chosen: Mapping[int, Setting], first: int, until: float) -> None:
        """Compare settings with their bases, pair by pair of new processes, until all have their
        verdict or the time is up."""
        open_ = dict(chosen)
        for load, setting in chosen.items():
            self.found.verdicts.setdefault(load, []).append(self._verdict(load, setting))
        for pair in range(verdicts.MOST):
            open_ = {load: s for load, s in open_.items() if self._open(load, s)}
            jobs = [*self._bases(open_), *_by_setting(open_)]
            if not jobs or not self._time_for(jobs, JUDGED, first + pair, until):
                break
            for setting, loads in jobs if pair % 2 == 0 else reversed(jobs):
                if not self._time_for([(setting, loads)], JUDGED, first + pair, until):
                    break  # the first one took longer than was known
                self._say(open_, f"verdict, pair {pair + 1}: {setting}")
                self._answered(setting, loads, JUDGED, first + pair)
            for load, setting in open_.items():
                self.found.verdicts[load][-1] = self._verdict(load, setting)

    def _open(self, load: int, setting: Setting) -> bool:
        undecided = self.found.verdicts[load][-1].faster is None
        return undecided and (load, setting) not in self.found.errors

    def _verdict(self, load: int, setting: Setting) -> Verdict:
        base = self.found.base[load]
        ratios = self.found.judged.ratios(load, setting, base)
        ratio = verdicts.at_look(ratios)
        if (load, setting) in self.found.errors:
            return Verdict(load, base, setting, ratio, False)
        faster = verdicts.decided(ratios)
        pair = self._expected(load, base) + self._expected(load, setting) + 2 * self._loading
        seconds = (verdicts.MOST - len(ratios)) * pair
        return Verdict(load, base, setting, ratio, faster, 0.0 if faster is not None else seconds)

    def _answered(self, setting: Setting, loads: Sequence[int], use: str, block: int) -> None:
        """Have one process answer a block at each load. Raises ModelError if it fails and is a
        base, which nothing can be compared without."""
        trials = self._trials(use)
        missing = [at for at in loads if block not in trials.of(at, setting)]
        missing = [at for at in missing if (at, setting) not in self.found.errors]
        if not missing:
            return
        began = self._clock()
        try:
            with self._engine.launch(setting, loads) as running:
                loading = self._clock() - began
                self.found.notes |= dict.fromkeys(running.notes)
                for load in missing:
                    prompts = self._prompts.block(use, block, self._engine.prompts(load))
                    began = self._clock()
                    trial = running.answer(prompts, load)
                    ended = self._clock()
                    unit = {"load": load, "setting": asdict(setting), "block": block}
                    unit |= {"trial": asdict(trial), "took": ended - began, "loading": loading}
                    self._keep(use, unit)
        except ModelError as error:
            if any(self.found.base[load] == setting for load in missing):
                raise
            for load in missing:
                if block not in trials.of(load, setting):
                    unit = {"load": load, "setting": asdict(setting), "error": str(error)}
                    self._keep(use, unit)
        else:
            self._loading += self._clock() - ended

    def _keep(self, use: str, unit: Mapping[str, Any]) -> None:
        self._progress.add(use, unit)
        self._read(use, unit)

    def _read(self, use: str, unit: Mapping[str, Any]) -> None:
        at = unit["load"], setting_of(unit["setting"])
        if "error" in unit:
            self.found.errors[at] = unit["error"]
        else:
            self._trials(use).setdefault(at, {})[unit["block"]] = Trial(**unit["trial"])
            self._took[at], self._loading = unit["took"], unit["loading"]

    def _trials(self, use: str) -> Trials:
        return self.found.trials if use == RACES else self.found.judged

    def _time_for(
        self, jobs: Sequence[tuple[Setting, Sequence[int]]], use: str, block: int, until: float
    ) -> bool:
        """Return whether these can be measured until then. What is kept takes no time."""
        trials = self._trials(use)
        seconds = 0.0
        new = [
            (setting, missing)
            for setting, loads in jobs
            if (missing := [load for load in loads if block not in trials.of(load, setting)])
        ]
        for setting, missing in new:
            seconds += self._loading + sum(self._expected(load, setting) for load in missing)
        return not new or self._clock() + seconds < until

    def _expected(self, load: int, setting: Setting) -> float:
        """Return the seconds that a block takes: of this setting, else of the others, else of
        lighter loads."""
        own = self._took.get((load, setting))
        alike = [seconds for (at, _), seconds in self._took.items() if at == load]
        known = [own] if own is not None else alike or list(self._took.values())
        return sum(known) / len(known) if known else 0.0

    def _part(self, stop: float, share: float) -> float:
        """Return the end of a share of the time that is left."""
        now = self._clock()
        return now + max(0.0, stop - now) * share if share < 1.0 else stop

    def _say(self, loads: Mapping[int, object], line: str) -> None:
        self._tell(f"{_requests(loads)}, {line}", self._done())

    def _done(self) -> float:
        """Return the share of all groups that is done: of the one under way by its time, as nobody
        knows how many blocks it needs."""
        at, groups, began, stop = self._group_time
        part = (self._clock() - began) / (stop - began) if stop > began else 0.0
        return (at + min(part, 1.0)) / groups


def setting_of(kept: Mapping[str, Any]) -> Setting:
    """Return the setting of its JSON."""
    return Setting(kept["mode"], tuple(kept["base"]), tuple(kept["drafts"]))


def _by_setting(chosen: Mapping[int, Setting]) -> list[tuple[Setting, list[int]]]:
    return [
        (setting, [load for load, each in chosen.items() if each == setting])
        for setting in dict.fromkeys(chosen.values())
    ]


def _requests(loads: Mapping[int, object]) -> str:
    counts = ", ".join(map(str, loads))
    return f"{counts} request{'' if list(loads) == [1] else 's'} at once"
