"""Successive halving, by a factor of three: all settings of an engine answer a block of prompts in
turn, the fastest third answers one more, until one is left or the answer is clear.

Blocks are paired: the setting to compare with answers the same prompts in the same minutes. An
engine's processes are kept while memory allows, and stopped ones do not disturb.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from smart_decoding.errors import ModelError
from smart_decoding.integrations.tuning.found import MARGIN, NEAR, Found
from smart_decoding.integrations.tuning.settings import Setting, Trial

if TYPE_CHECKING:
    from smart_decoding.bench.resume import Progress
    from smart_decoding.integrations.tuning.engines import Launched, Tunable

KEPT = 3  # of so many settings one is left after a block
ALIKE = 1.01  # settings that differ by less are one
NARROW = 0.02  # half of an interval's width, over the ratio, that is clear enough

Tell = Callable[[str, float], object]  # a line on what is done, and the share of all that is done


class Prompts:
    """Prompts in blocks: block after block, from the first again behind the last."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = list(texts)

    def block(self, number: int, size: int) -> list[str]:
        """Return the prompts of a block."""
        count = len(self.texts)
        return [self.texts[(number * size + i) % count] for i in range(size)]


class Pool:
    """Running engines of one group of loads. The one that answered longest ago makes room."""

    def __init__(self, engine: Tunable, loads: Sequence[int]) -> None:
        self._engine, self._loads = engine, loads
        self.room = max(1, engine.room(loads))
        self._running: OrderedDict[Setting, Launched] = OrderedDict()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        while self._running:
            self._end(next(iter(self._running)))

    def answer(self, setting: Setting, prompts: Sequence[str], load: int) -> Trial:
        """Answer a block. Raises ModelError if it fails; it is ended then."""
        running = self._started(setting)
        self._running.move_to_end(setting)
        try:
            return running.answer(prompts, load)
        except BaseException:
            self._end(setting)
            raise

    def _started(self, setting: Setting) -> Launched:
        if setting in self._running:
            return self._running[setting]
        while len(self._running) >= self.room:
            self._end(next(iter(self._running)))
        try:
            self._start(setting)
        except ModelError:
            if not self._running:
                raise
            while self._running:  # there may be no room beside others after all
                self._end(next(iter(self._running)))
            self._start(setting)
        return self._running[setting]

    def _start(self, setting: Setting) -> None:
        self._running[setting] = self._engine.launch(setting, self._loads).__enter__()

    def _end(self, setting: Setting) -> None:
        running = self._running.pop(setting, None)
        if running is not None:
            running.__exit__(None, None, None)


class Search:
    """One run over all loads. `found` holds what is known at any time."""

    def __init__(
        self,
        engine: Tunable,
        prompts: Prompts,
        progress: Progress,
        stop: float = float("inf"),
        tell: Tell = lambda line, share: None,
    ) -> None:
        """progress: where trials are kept; stop: time.monotonic() at which it ends."""
        self.found = Found()
        self._engine, self._prompts, self._progress, self._tell = engine, prompts, progress, tell
        self._stop = self._until = stop
        self._block = 0  # the next one of the group
        self._done = 0.0  # share of all work
        self._kept: dict[tuple[int, Setting, int], Mapping[str, Any]] = {}
        for unit in progress.units("trials"):
            self._kept[unit["load"], _setting_of(unit["setting"]), unit["block"]] = unit

    def run(self, loads: Sequence[int]) -> Found:
        """Measure at all loads. Raises ModelError if the engine's defaults do not work."""
        groups = self._engine.groups(loads)
        for at, group in enumerate(groups):
            now = time.monotonic()
            stop = now + (self._stop - now) / (len(groups) - at)
            self._block = 0
            shares = self._engine.shares
            for number, settings in enumerate(self._engine.settings(group, self.found)):
                self._until = _part(stop, shares[number] / sum(shares[number:]))
                with Pool(self._engine, group) as pool:
                    self._race(pool, group, settings)
                self._report((at + sum(shares[: number + 1]) / sum(shares)) / len(groups))
            self._until = stop
            with Pool(self._engine, group) as pool:
                for load in group:
                    self._settle(pool, load)
            self._report((at + 1) / len(groups))
        return self.found

    def _race(self, pool: Pool, loads: Sequence[int], settings: Sequence[Setting]) -> None:
        base, *others = settings
        self.found.bases |= dict.fromkeys(loads, base)
        if not others and all(self.found.of(load, base) for load in loads):
            return
        patience = self._engine.patience
        alive = {load: [s for s in others if not self.found.hopeless(load, s)] for load in loads}
        self.found.left |= alive
        done, count = 0, patience.first
        while not done or (any(alive.values()) and done < patience.most):
            self._turns(pool, base, alive, count)
            done, count = done + count, 1
            alive = {load: self._survivors(load, base, of) for load, of in alive.items()}
            self.found.left |= alive
            clear = done > 1 and all(len(of) <= 1 for of in alive.values())
            if clear or self._late():
                return

    def _turns(
        self, pool: Pool, base: Setting, alive: Mapping[int, Sequence[Setting]], count: int
    ) -> None:
        """Measure so many blocks of all that are left: in turn where all can run at once."""
        blocks = range(self._block, self._block + count)
        self._block += count
        settings = list(dict.fromkeys((base, *(s for of in alive.values() for s in of))))
        if len(settings) <= pool.room:
            order = [
                (block, s)
                for block in blocks
                for s in (*settings[block % len(settings) :], *settings[: block % len(settings)])
            ]
        else:
            order = [(block, setting) for setting in settings for block in blocks]
        for number, (block, setting) in enumerate(order):
            self._tell(f"{_requests(alive)}, {number + 1} of {len(order)}: {setting}", 0.0)
            for load, of in alive.items():
                if setting in of or (setting == base and (of or not self.found.of(load, base))):
                    self._measure(pool, load, setting, block)

    def _measure(self, pool: Pool, load: int, setting: Setting, block: int) -> None:
        """Add a trial, unless the time is over and its way of drafting is known. Raises ModelError
        if the base fails, which nothing can be compared without."""
        found, base = self.found, self.found.bases[load]
        if (load, setting) in found.errors or found.broken(load, setting.mode):
            return
        if self._late() and setting.mode in found.modes(load):
            if not found.of(load, setting):
                found.left_out.append((load, setting))
            return
        if setting != base and self._late() and block not in found.of(load, base):
            self._add(pool, load, base, block)
        try:
            self._add(pool, load, setting, block)
        except ModelError as error:
            if setting == base:
                raise
            found.errors[load, setting] = str(error)

    def _add(self, pool: Pool, load: int, setting: Setting, block: int) -> None:
        kept = self._kept.get((load, setting, block))
        if kept is not None and "error" in kept:
            raise ModelError(kept["error"])
        if kept is not None:
            trial = Trial(**kept["trial"])
        else:
            trial = self._tried(pool, load, setting, block)
        self.found.trials.setdefault((load, setting), {})[block] = trial

    def _tried(self, pool: Pool, load: int, setting: Setting, block: int) -> Trial:
        unit = {"load": load, "setting": asdict(setting), "block": block}
        prompts = self._prompts.block(block, self._engine.prompts(load))
        try:
            trial = pool.answer(setting, prompts, load)
        except ModelError as error:
            if setting != self.found.bases[load]:  # that one is tried again
                self._progress.add("trials", {**unit, "error": str(error)})
            raise
        self._progress.add("trials", {**unit, "trial": asdict(trial)})
        return trial

    def _survivors(self, load: int, base: Setting, alive: Sequence[Setting]) -> list[Setting]:
        """Return the fastest third, without those that are slower than the base: a little slower
        is not enough after one block."""
        found = self.found
        working = [s for s in alive if (load, s) not in found.errors and found.differs(load, s)]
        ranked = sorted(working, key=lambda s: found.value(load, s, base), reverse=True)
        left = []
        for setting in ranked[: -(-len(ranked) // KEPT)]:
            ratio = found.ratio(load, setting, base)
            if ratio.value >= (NEAR if ratio.pairs == 1 else 1.0):
                left.append(setting)
        values = [found.value(load, setting, base) for setting in left]
        alike = len(values) > 1 and values[0] < ALIKE * values[-1]
        return left[:1] if alike and len(found.of(load, left[0])) > 1 else left

    def _settle(self, pool: Pool, load: int) -> None:
        """Measure plain decoding and the best drafts in turn until it is clear which is faster."""
        choice = self.found.choice(load)
        if choice is None or choice.best is None or choice.best not in self.found.left[load]:
            return
        base, best = choice.plain, choice.best
        self.found.left[load] = [best]
        for _ in range(self._engine.patience.last):
            ratio = self.found.ratio(load, best, base)
            narrow = ratio.high - ratio.low < 2 * NARROW * ratio.value
            if narrow or ratio.low > MARGIN or ratio.high < 1.0 or self._late():
                return
            self._turns(pool, base, {load: [best]}, 1)

    def _late(self) -> bool:
        return time.monotonic() > self._until

    def _report(self, done: float) -> None:
        self._tell("", done - self._done)
        self._done = done


def _part(stop: float, share: float) -> float:
    """Return the end of a share of the time that is left."""
    now = time.monotonic()
    return now + max(0.0, stop - now) * share


def _setting_of(kept: Mapping[str, Any]) -> Setting:
    return Setting(kept["mode"], tuple(kept["base"]), tuple(kept["drafts"]))


def _requests(loads: Mapping[int, object]) -> str:
    counts = ", ".join(map(str, loads))
    return f"{counts} request{'' if list(loads) == [1] else 's'} at once"
