"""The search of `smart tune` over an engine that is a rule: no process, no clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from smart_decoding.bench.resume import Progress
from smart_decoding.bench.statistics import Ratio
from smart_decoding.errors import ModelError
from smart_decoding.integrations.tuning import report
from smart_decoding.integrations.tuning.found import Found, Verdict
from smart_decoding.integrations.tuning.search import Pool, Prompts, Search
from smart_decoding.integrations.tuning.settings import PLAIN, Patience, Setting, Trial

TEXTS = [f"prompt {number}" for number in range(12)]


def drafts(mode: str, *numbers: int) -> Setting:
    return Setting(mode, drafts=("--spec-type", mode, *map(str, numbers)))


class RuleEngine:
    """Its plain rate is 100 tokens a second; `speeds` has what other settings make of it."""

    name = "rule"
    shares: tuple[int, ...] = (1, 1)
    patience = Patience()

    def __init__(
        self,
        speeds: dict[Setting, Callable[[int], float]],
        room: int = 8,
        noise: Callable[[int], float] = lambda answered: 1.0,
    ) -> None:
        self.warnings: list[str] = []
        self.speeds, self._room, self._noise = speeds, room, noise
        self.answered: list[tuple[int, Setting]] = []
        self.running: list[Setting] = []
        self.most = 0
        self.broken: set[Setting] = set()
        self.interrupted_at: int | None = None

    def groups(self, loads: Sequence[int]) -> list[tuple[int, ...]]:
        return [(load,) for load in loads]

    def prompts(self, load: int) -> int:
        return load

    def room(self, loads: Sequence[int]) -> int:
        return self._room

    def settings(self, loads: Sequence[int], found: Found) -> Iterator[list[Setting]]:
        yield [Setting(), *self.speeds]

    def launch(self, setting: Setting, loads: Sequence[int]) -> Any:
        return Running(self, setting)

    def about(self) -> dict[str, Any]:
        return {"version": "1"}

    def write(self, found: Found, choices: Sequence[Verdict], output: Path) -> list[str]:
        return []


class Running:
    def __init__(self, engine: RuleEngine, setting: Setting) -> None:
        self._engine, self._setting = engine, setting

    def __enter__(self) -> Running:
        engine = self._engine
        if self._setting in engine.broken:
            raise ModelError("no such layer")
        engine.running.append(self._setting)
        engine.most = max(engine.most, len(engine.running))
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.running.remove(self._setting)

    def answer(self, prompts: Sequence[str], load: int) -> Trial:
        engine = self._engine
        engine.answered.append((load, self._setting))
        if len(engine.answered) == engine.interrupted_at:
            raise KeyboardInterrupt
        speed = engine.speeds.get(self._setting, lambda load: 1.0)(load)
        speed *= engine._noise(len(engine.answered))
        draft = 40 if self._setting.mode != PLAIN else 0
        return Trial(100 * load, load / speed, draft, draft // 2)


def search(engine: RuleEngine, progress: Progress | None = None, stop: float = 1e18) -> Search:
    return Search(engine, Prompts(TEXTS), progress or Progress(None, {}), stop)


MANY = {
    drafts("ngram", size): (lambda load, size=size: (1.0 + 0.08 * size) / load**0.5)
    for size in range(1, 9)
}


def test_the_best_of_many_is_found_with_few_blocks() -> None:
    engine = RuleEngine(dict(MANY))
    found = search(engine).run([1, 4])
    one, four = (found.choice(load) for load in (1, 4))
    assert one is not None
    assert four is not None
    assert one.best == drafts("ngram", 8)
    assert one.ratio.value == pytest.approx(1.64)
    assert one.pays
    assert one.chosen == one.best
    assert not four.pays
    assert four.chosen == Setting()
    everything = len(MANY) * (Patience().most + Patience().last)
    assert sum(load == 1 for load, _ in engine.answered) < everything / 4
    assert engine.running == []


def test_drafts_that_lost_clearly_are_not_tried_with_more_requests() -> None:
    slow, fair = drafts("ngram", 1), drafts("ngram", 2)
    engine = RuleEngine({slow: lambda load: 0.7, fair: lambda load: 0.95})
    search(engine).run([1, 4])
    assert {setting for load, setting in engine.answered if load == 4} == {Setting(), fair}


def test_a_machine_that_slows_down_in_between_changes_nothing() -> None:
    """Blocks are pairs, in turn: it is 40 % slower in the end, and the ratio is 2 % off."""
    engine = RuleEngine(dict(MANY), noise=lambda answered: 0.98**answered)
    choice = search(engine).run([1]).choice(1)
    assert choice is not None
    assert choice.best == drafts("ngram", 8)
    assert choice.ratio.value == pytest.approx(1.64, rel=0.1)


def test_what_does_not_work_is_left_out_with_its_reason() -> None:
    """Once a way of drafting has failed, its other settings are not tried."""
    engine = RuleEngine({**{drafts("mtp", n): lambda load: 9.0 for n in (1, 2)}, **MANY})
    engine.broken = {drafts("mtp", 1), drafts("mtp", 2)}
    found = search(engine).run([1, 2])
    assert found.errors == {(1, drafts("mtp", 1)): "no such layer"}
    choice = found.choice(1)
    assert choice is not None
    assert choice.best == drafts("ngram", 8)
    assert "Did not work: mtp: no such layer" in report.text(found, [choice])


def test_plain_decoding_must_work(tmp_path: Path) -> None:
    """Its failure is not kept: a port, or memory, may be free the next time."""
    engine = RuleEngine(dict(MANY))
    engine.broken = {Setting()}
    kept = tmp_path / "kept"
    with pytest.raises(ModelError, match="no such layer"):
        search(engine, Progress(kept, {})).run([1])
    engine.broken = set()
    assert search(engine, Progress(kept, {})).run([1]).choice(1) is not None


def test_drafters_that_draft_nothing_are_no_drafters() -> None:
    """Some need another file, and say nothing: they run plainly."""

    class Silent(Running):
        def answer(self, prompts: Sequence[str], load: int) -> Trial:
            trial = super().answer(prompts, load)
            return Trial(trial.tokens, trial.seconds)

    engine = RuleEngine({drafts("eagle3", 3): lambda load: 1.5})
    engine.launch = lambda setting, loads: Silent(engine, setting)  # type: ignore[method-assign]
    choice = search(engine).run([1]).choice(1)
    assert choice is not None
    assert choice.best is None
    assert not choice.pays


def test_without_time_each_way_is_tried_once() -> None:
    engine = RuleEngine({**MANY, drafts("mod", 1): lambda load: 1.2})
    found = search(engine, stop=0.0).run([1])
    assert {mode for _, mode in ((load, s.mode) for load, s in engine.answered)} == {
        PLAIN,
        "ngram",
        "mod",
    }
    assert len({setting for _, setting in found.left_out}) == len(MANY) - 1
    choice = found.choice(1)
    assert choice is not None
    assert "7 settings; --time-limit gives more" in report.text(found, [choice])


def test_a_run_goes_on_from_what_was_kept(tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    cut = RuleEngine(dict(MANY))
    cut.interrupted_at = 9
    broken_off = search(cut, Progress(kept, {}))
    with pytest.raises(KeyboardInterrupt):
        broken_off.run([1])
    assert cut.running == []
    assert broken_off.found.choice(1) is not None  # what is known can be told
    again = RuleEngine(dict(MANY))
    found = search(again, Progress(kept, {})).run([1])
    whole = RuleEngine(dict(MANY))
    assert search(whole).run([1]).trials == found.trials
    assert len(again.answered) == len(whole.answered) - 8
    silent = RuleEngine(dict(MANY))
    search(silent, Progress(kept, {})).run([1])
    assert silent.answered == []


def test_no_more_engines_run_at_once_than_there_is_room() -> None:
    engine = RuleEngine(dict(MANY), room=1)
    choice = search(engine).run([1]).choice(1)
    assert choice is not None
    assert choice.best == drafts("ngram", 8)
    assert engine.most == 1


def test_an_engine_that_does_not_start_beside_others_is_started_alone() -> None:
    engine = RuleEngine(dict(MANY))

    class Large(Running):
        def __enter__(self) -> Running:
            if engine.running:
                raise ModelError("out of memory")
            return super().__enter__()

    engine.launch = lambda setting, loads: Large(engine, setting)  # type: ignore[method-assign]
    with Pool(engine, [1]) as pool:
        for setting in (Setting(), drafts("ngram", 1)):
            pool.answer(setting, ["a"], 1)
            assert engine.running == [setting]
    assert engine.running == []


def verdict(load: int, value: float, low: float, high: float, mode: str = "ngram") -> Verdict:
    ratio, none = Ratio(value, low, high, 5), Ratio(1.0, 1.0, 1.0, 0)
    return Verdict(
        load, Setting(), drafts(mode, 4, 8), ratio, none, (50.0, 50.0 * value), 4.0, 0.25, 2.0, 1.6
    )


def test_the_sentence_can_be_acted_on() -> None:
    one, four, eight = (
        verdict(1, 1.42, 1.35, 1.49),
        verdict(4, 0.97, 0.93, 1.01),
        verdict(8, 0.8, 0.7, 0.9),
    )
    assert report.sentence([one, four, eight]) == (
        "With one request at once ngram 4 8 is 1.42 times as fast as plain; "
        "from four requests on leave speculation off."
    )
    assert report.sentence([one]) == (
        "With one request at once ngram 4 8 is 1.42 times as fast as plain."
    )
    assert report.sentence([four, eight]) == (
        "Leave speculation off: nothing was clearly faster than plain with four and eight requests."
    )
    assert report.table([one, four])[1].split("  ")[0] == "1"
    assert "1.42 (1.35–1.49)" in report.table([one, four])[1]


def test_where_nothing_pays_it_says_why() -> None:
    (reason,) = report.reasons([verdict(4, 1.25, 0.9, 1.5), verdict(1, 1.5, 1.4, 1.6)])
    assert reason == (
        "With four requests at once, ngram 4 8 drafts 4.0 tokens a round, of which 25 % are "
        "accepted: 2.00 tokens for the time of 1.60 plain ones. To draft and verify a token costs "
        "0.15 of a plain round. More blocks (--time-limit) may tell."
    )
