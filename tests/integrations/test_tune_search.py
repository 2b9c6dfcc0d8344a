"""The search of `smart tune` over an engine that is a rule: no process, and its own clock."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from smart_decoding.errors import ModelError
from smart_decoding.integrations.tuning import busy, report, sglang, verdicts, vllm
from smart_decoding.integrations.tuning.found import Found, LoadResult
from smart_decoding.integrations.tuning.search import JUDGED, RACES, Prompts, Search, Tell
from smart_decoding.integrations.tuning.settings import PLAIN, Setting, Trial
from smart_decoding.measuring.resume import Progress
from smart_decoding.measuring.statistics import Ratio

TEXTS = [f"prompt {number}" for number in range(120)]
TOKENS = 192  # of a block
LOADING = 5.0  # seconds


def drafts(mode: str, *numbers: int) -> Setting:
    return Setting(mode, drafts=("--spec-type", mode, *map(str, numbers)))


class RuleEngine:
    """Its plain rate is ten tokens a second. gains: a word of the options -> what it makes of that,
    by load; processes, blocks: standard deviations of logarithms."""

    name = "rule"

    def __init__(
        self,
        gains: Mapping[str, float | Sequence[float]],
        settings: Sequence[Setting],
        options: Sequence[str] = (),
        processes: float = 0.0,
        blocks: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.warnings: list[str] = []
        self.gains, self.settings, self.options = gains, settings, options
        self.processes, self.blocks = processes, blocks
        self.random = random.Random(seed)
        self.now = 0.0
        self.started: list[tuple[tuple[int, ...], Setting]] = []
        self.answered: list[tuple[int, Setting, tuple[str, ...]]] = []
        self.running = 0
        self.broken: set[Setting] = set()
        self.interrupted_at: int | None = None

    def groups(self, loads: Sequence[int]) -> list[tuple[int, ...]]:
        return [(load,) for load in loads]

    def prompts(self, load: int) -> int:
        return max(3, 2 * load)

    def stages(self, loads: Sequence[int], found: Found) -> Iterator[list[Setting]]:
        (load,) = loads
        if self.options:
            yield [Setting(base=(self.options[0],))]
            base = found.base[load].base
            yield [Setting(base=(*base, option)) for option in self.options[1:]]
        base = found.base[load].base
        yield [Setting(each.mode, base, each.drafts) for each in self.settings]

    def launch(self, setting: Setting, loads: Sequence[int]) -> Any:
        self.started.append((tuple(loads), setting))
        return Running(self, setting)

    def about(self) -> dict[str, Any]:
        return {"version": "1"}

    def write(self, found: Found, choices: Sequence[LoadResult], output: Path) -> list[str]:
        return []


class Running:
    """One process, which is as fast as its luck is."""

    notes: Sequence[str] = ("Not on the GPU: 13 of 33 layers",)

    def __init__(self, engine: RuleEngine, setting: Setting) -> None:
        self._engine, self._setting = engine, setting
        self._luck = math.exp(engine.random.gauss(0.0, engine.processes))

    def __enter__(self) -> Running:
        engine = self._engine
        engine.now += LOADING
        if self._setting in engine.broken:
            raise ModelError("no such layer")
        assert engine.running == 0, "two engines at once"
        engine.running += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.running -= 1

    def answer(self, prompts: Sequence[str], load: int) -> Trial:
        engine = self._engine
        engine.answered.append((load, self._setting, tuple(prompts)))
        if len(engine.answered) == engine.interrupted_at:
            raise KeyboardInterrupt
        rate = 10.0 * self._luck * math.exp(engine.random.gauss(0.0, engine.blocks))
        for word in self._setting.words:
            gain = engine.gains.get(word, 1.0)
            rate *= gain if isinstance(gain, float) else gain[load != 1]
        seconds = TOKENS / rate
        engine.now += seconds
        drafted = 80 if self._setting.mode != PLAIN else 0
        return Trial(TOKENS, seconds, drafted, drafted // 2)


def search(
    engine: RuleEngine,
    progress: Progress | None = None,
    stop: float = 1e18,
    tell: Tell = lambda line, done: None,
) -> Search:
    progress = progress or Progress(None, {})
    return Search(engine, Prompts(TEXTS), progress, stop, tell, lambda: engine.now)


# Twelve ways of drafting and nine options of plain decoding, as llama.cpp has.
MANY = [drafts(f"way{number % 4}", number) for number in range(12)]
OPTIONS = [f"--option-{number}" for number in range(9)]


@pytest.mark.parametrize("processes", [0.05, 0.03])
def test_where_nothing_is_faster_nothing_is_said_to_be(processes: float) -> None:
    """The null test: all settings are equal, processes and blocks differ. In at most 5 % of runs
    drafts pay, or an option of plain decoding is in the command."""
    wrong = 0
    for seed in range(200):
        engine = RuleEngine({}, MANY, OPTIONS, processes, 0.03, seed)
        choice = search(engine).run([1]).choice(1)
        assert choice is not None
        assert not choice.open
        wrong += choice.pays or choice.plain != Setting()
    assert wrong <= 10


@pytest.mark.parametrize("processes", [0.05, 0.03])
def test_a_true_gain_is_found(processes: float) -> None:
    """One of twelve ways of drafting is 1.15 times as fast as all others and plain decoding."""
    right = 0
    for seed in range(200):
        engine = RuleEngine({"7": 1.15}, MANY, (), processes, 0.03, seed)
        choice = search(engine).run([1]).choice(1)
        assert choice is not None
        right += choice.pays and choice.best == MANY[7]
    assert right >= 180


def test_a_true_option_of_plain_decoding_is_found_and_drafts_are_compared_with_it() -> None:
    for seed in range(10):
        engine = RuleEngine({OPTIONS[0]: 1.3, "7": 1.5}, MANY, OPTIONS, 0.02, 0.03, seed)
        found = search(engine).run([1])
        choice = found.choice(1)
        assert choice is not None
        assert OPTIONS[0] in choice.plain.base
        assert choice.best is not None
        assert choice.best.base == choice.plain.base
        assert choice.ratio.value == pytest.approx(1.5, rel=0.1)
        (line, *_) = report.plain_options(found.verdicts[1])
        assert line.startswith("With one request at once plain decoding is 1.")
        assert line.endswith("times as fast with --option-0 as with defaults.")


def test_a_verdict_has_new_processes_of_each_side_and_prompts_that_chose_nothing() -> None:
    engine = RuleEngine({"7": 1.3}, MANY, (), 0.02, 0.02)
    found = search(engine).run([1])
    chosen = {p for _, s, prompts in engine.answered[:20] for p in prompts if s != MANY[7]}
    (plain, best) = (found.judged.of(1, setting) for setting in (Setting(), MANY[7]))
    assert plain.keys() == best.keys()
    assert len(best) >= verdicts.LEAST
    assert len(engine.started) == len(engine.answered)  # each process answers one block
    last = engine.answered[-2 * len(best) :]
    assert not chosen & {prompt for _, _, prompts in last for prompt in prompts}
    assert [setting for _, setting, _ in last[:4]] == [Setting(), MANY[7], MANY[7], Setting()]


def test_halves_of_the_prompts_choose_and_judge() -> None:
    prompts = Prompts([str(number) for number in range(12)])
    assert prompts.block(RACES, 0, 3) == ["0", "2", "4"]
    assert prompts.block(JUDGED, 1, 4) == ["9", "11", "1", "3"]
    assert prompts.block(JUDGED, 0, 99) == ["1", "3", "5", "7", "9", "11"]  # none twice


def test_blocks_of_one_process_are_one_observation() -> None:
    """The interval is Student's t over pairs of processes: with two it is wide, and no verdict."""
    assert verdicts.decided([1.3, 1.31]) is None
    assert verdicts.at_look([1.3, 1.31]).high > 1.6
    assert verdicts.decided([1.3, 1.31, 1.29]) is None
    assert verdicts.decided([1.3, 1.31, 1.29, 1.3]) is True
    assert verdicts.decided([0.9, 1.01, 0.95]) is False
    noisy = [1.5, 0.9, 1.4, 0.95, 1.3, 0.9, 1.4]
    assert verdicts.decided(noisy) is None
    assert verdicts.decided([*noisy, 0.9, 1.5, 0.9]) is False  # the last look
    between = verdicts.decided([1.5, 0.9, 1.4, 0.95, 1.2, 1.2])
    assert between is None  # no look at five or six


def test_drafts_that_lost_clearly_are_not_tried_with_more_requests() -> None:
    slow, fair = drafts("slow", 1), drafts("fair", 2)
    engine = RuleEngine({"slow": 0.7, "fair": 0.95}, [slow, fair])
    found = search(engine).run([1, 4])
    assert {setting for load, setting, _ in engine.answered if load == 4} == {Setting(), fair}
    choice = found.choice(1)
    assert choice is not None
    assert not choice.pays


def test_what_pays_with_one_request_may_not_with_four() -> None:
    engine = RuleEngine({"7": (1.5, 0.8)}, MANY)
    found = search(engine).run([1, 4])
    one, four = (found.choice(load) for load in (1, 4))
    assert one is not None
    assert four is not None
    assert (one.pays, one.best, one.chosen) == (True, MANY[7], MANY[7])
    assert (four.pays, four.chosen) == (False, Setting())


def test_a_machine_that_slows_down_in_between_changes_nothing() -> None:
    """Pairs are measured one after the other, and change who begins."""

    engine = RuleEngine({"7": 1.3}, MANY)

    class Slow(Running):
        def answer(self, prompts: Sequence[str], load: int) -> Trial:
            self._luck = 0.98 ** len(engine.answered)
            return super().answer(prompts, load)

    engine.launch = lambda setting, loads: Slow(engine, setting)  # type: ignore[method-assign]
    choice = search(engine).run([1]).choice(1)
    assert choice is not None
    assert choice.best == MANY[7]
    assert choice.ratio.value == pytest.approx(1.3, rel=0.03)


def test_what_does_not_work_is_left_out_with_its_reason() -> None:
    """Once a way of drafting has failed, its other settings are not tried."""
    mtp = [drafts("mtp", 1), drafts("mtp", 2)]
    engine = RuleEngine({"7": 1.5}, [*mtp, *MANY])
    engine.broken = set(mtp)
    found = search(engine).run([1, 2])
    assert found.errors == {(1, mtp[0]): "no such layer"}
    choice = found.choice(1)
    assert choice is not None
    assert choice.best == MANY[7]
    text = report.text(found, [choice])
    assert "Did not work: mtp: no such layer" in text
    assert text.count("Not on the GPU: 13 of 33 layers") == 1


def test_what_cannot_work_is_not_reported_as_lack_of_time() -> None:
    """With four requests only settings of a way of drafting that had failed were left."""
    mtp, slow = [drafts("mtp", 1), drafts("mtp", 2), drafts("mtp", 3)], drafts("slow", 4)
    engine = RuleEngine({"slow": 0.7}, [*mtp, slow])
    engine.broken = set(mtp)
    found = search(engine).run([1, 4])
    assert not found.left_out
    one = found.choice(1)
    assert one is not None
    text = report.text(found, [one], [1, 4])
    assert "time for" not in text
    assert "lack of time" not in text
    assert "all drafts failed or lost before, for four requests at once." in text


def test_what_there_was_no_time_for_is_listed_once() -> None:
    engine = RuleEngine({}, [drafts("draft", 1), drafts("draft", 2)])
    found = search(engine, stop=30.0).run([1])
    left_out = report.plain(found, [])["left_out"]
    assert [each["options"][-1] for each in left_out] == ["1", "2"]


@pytest.mark.parametrize("at", [2, 13])
def test_where_no_drafts_were_tried_nothing_is_recommended(at: int) -> None:
    """Ctrl-C came during options of plain decoding, or while the first drafts load."""
    engine = RuleEngine({}, [drafts("draft", 1)], OPTIONS[:3])
    engine.interrupted_at = at
    cut = search(engine)
    with pytest.raises(KeyboardInterrupt):
        cut.run([1])
    assert not any(setting.drafts for _, setting in cut.found.trials)
    choice = cut.found.choice(1)
    assert choice is not None
    assert choice.open
    assert report.sentence([choice]) == "Nothing is decided yet."
    assert "not tried" in report.table([choice])[1]
    assert "No verdict with one request at once: no drafts were tried" in report.text(
        cut.found, [choice]
    )
    for write in (vllm.Vllm.write, sglang.Sglang.write):
        engine_of_them = Mock(_context=None, _resolved={"no_adaptive": "none"}, _speculative={})
        assert (
            "Nothing is written: nothing is known to be faster"
            in write(engine_of_them, cut.found, [choice], Path("none"))[-1]
        )


def test_plain_decoding_must_work(tmp_path: Path) -> None:
    """Its failure is not kept: a port, or memory, may be free the next time."""
    engine = RuleEngine({}, MANY)
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

    engine = RuleEngine({"eagle3": 1.5}, [drafts("eagle3", 3), drafts("eagle3", 4)])
    engine.launch = lambda setting, loads: Silent(engine, setting)  # type: ignore[method-assign]
    choice = search(engine).run([1]).choice(1)
    assert choice is not None
    assert choice.best is None
    assert not choice.open
    assert not choice.pays
    assert "none worked" in report.table([choice])[1]
    assert report.sentence([choice]).startswith("Leave speculation off")


@pytest.mark.parametrize("limit", [20.0, 60.0, 150.0, 400.0, 900.0])
def test_the_time_limit_holds_and_what_lacks_time_has_no_verdict(limit: float) -> None:
    """A block is not begun unless it can end in time; the first one's time is not known yet."""
    engine = RuleEngine({"7": 1.5}, MANY, OPTIONS, 0.02, 0.02)
    found = search(engine, stop=limit).run([1])
    assert engine.now <= limit + 10.0
    choice = found.choice(1)
    assert choice is not None
    if choice.open:
        text = report.text(found, [choice])
        assert "No verdict with one request at once: way" in text
        assert "more minutes (--time-limit; --resume FILE keeps what is measured)" in text
        assert "faster than plain" not in text
        assert choice.chosen == choice.plain
    assert choice.open == (limit < 400.0)


def test_the_time_that_a_verdict_lacks_is_enough(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    settings = {"gains": {"0": 1.3}, "settings": MANY, "processes": 0.02, "blocks": 0.02}
    first = RuleEngine(**settings)  # type: ignore[arg-type]
    choice = search(first, Progress(kept, {}), stop=300.0).run([1]).choice(1)
    assert choice is not None
    assert choice.open
    again = RuleEngine(**settings)  # type: ignore[arg-type]
    found = search(again, Progress(kept, {}), stop=choice.lacking + 60.0).run([1])
    decided = found.choice(1)
    assert decided is not None
    assert decided.best == choice.best
    assert not decided.open


def test_a_run_goes_on_from_what_was_kept(tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    rule = {OPTIONS[0]: 1.3, "7": 1.5}
    cut = RuleEngine(rule, MANY, OPTIONS)
    cut.interrupted_at = 50
    broken_off = search(cut, Progress(kept, {}))
    with pytest.raises(KeyboardInterrupt):
        broken_off.run([1])
    assert cut.running == 0
    choice = broken_off.found.choice(1)  # what is known can be told
    assert choice is not None
    assert choice.open
    again = RuleEngine(rule, MANY, OPTIONS)
    found = search(again, Progress(kept, {})).run([1])
    whole = RuleEngine(rule, MANY, OPTIONS)
    assert search(whole).run([1]).judged == found.judged
    assert len(again.answered) == len(whole.answered) - 49
    for stop in (1e18, 1.0):  # what is kept needs no time
        silent = RuleEngine(rule, MANY, OPTIONS)
        same = search(silent, Progress(kept, {}), stop).run([1]).choice(1)
        assert same == found.choice(1)
        assert same is not None
        assert (same.pays, same.plain.base) == (True, (OPTIONS[0],))
        assert silent.answered == []


def test_with_more_time_drafts_are_compared_with_the_better_base(tmp_path: Path) -> None:
    """The first part had no time for options of plain decoding, and chose drafts without them."""
    kept = tmp_path / "kept.json"
    rule = {OPTIONS[3]: 1.3, "0": 1.2}
    short = search(RuleEngine(rule, MANY, OPTIONS), Progress(kept, {}), stop=900.0).run([1])
    (first,) = (each for each in short.verdicts[1] if each.setting.drafts)
    assert first.base == Setting()
    found = search(RuleEngine(rule, MANY, OPTIONS), Progress(kept, {})).run([1])
    choice = found.choice(1)
    assert choice is not None
    assert choice.plain.base == (OPTIONS[3],)
    assert choice.best is not None
    assert choice.best.base == (OPTIONS[3],)
    assert choice.ratio.value == pytest.approx(1.2)


class Slots:
    """A server of 250 tokens a second, which requests that run at once share."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.active = 0
        self.most = 0

    def ask(self, tokens: int) -> busy.Answered:
        with self.lock:
            self.active += 1
            self.most = max(self.most, self.active)
        for _ in range(tokens):
            time.sleep(0.004 * self.active)
        with self.lock:
            self.active -= 1
        return busy.Answered(9, tokens, tokens, tokens // 2)


@pytest.mark.parametrize("lengths", [[10] * 9, [4, 16, 8, 12, 10, 10, 6, 14, 10, 30]])
def test_the_clock_runs_only_while_all_slots_are_busy(lengths: list[int]) -> None:
    """Of nine prompts on eight slots the ninth would run alone with the clock on, and the rate be
    half of the load's; so would the rest of one that is three times as long."""
    server = Slots()
    trial = busy.trial(lengths, 8, server.ask)
    assert server.most == 8
    assert trial.rate == pytest.approx(1 / 0.004, rel=0.25)
    assert trial.tokens < sum(lengths)


def test_tokens_behind_the_stop_do_not_count() -> None:
    one = busy.trial(["a"], 1, lambda _: busy.Answered(5, 8, 4, 2, decoding=2.0))
    assert (one.tokens, one.drafted, one.accepted, one.context) == (8, 4, 2, 9)
    late = busy._Timed(busy.Answered(5, 8, decoding=2.0), 0.0, 10.0)
    assert late.share(9.0) == 0.5
    assert late.share(7.0) == 0.0
    assert late.share(10.0) == 1.0


def test_an_error_of_a_slot_is_told_at_once() -> None:
    told = threading.Event()

    def fail(prompt: str) -> busy.Answered:
        if prompt == "long":
            assert told.wait(60)
        raise ModelError(prompt)

    try:
        with pytest.raises(ModelError, match="gone"):
            busy.trial(["long", "gone", "c"], 2, fail)
    finally:
        told.set()


def choice(load: int, value: float, low: float, high: float, faster: bool | None) -> LoadResult:
    ratio = Ratio(value, low, high, 5)
    rates = (50.0, 50.0 * value)
    return LoadResult(
        load, Setting(), drafts("ngram", 4, 8), ratio, faster, rates, 90.0, 4.0, 0.25, 2.0, 1.6
    )


def test_the_sentence_can_be_acted_on() -> None:
    one, four, eight = (
        choice(1, 1.42, 1.35, 1.49, True),
        choice(4, 0.97, 0.93, 1.01, False),
        choice(8, 0.8, 0.7, 0.9, False),
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
    assert "1.42 (1.35–1.49)  faster" in report.table([one, four])[1]
    assert "0.97 (0.93–1.01)  not faster" in report.table([one, four])[2]


def test_without_a_verdict_nothing_is_recommended() -> None:
    one, four = choice(1, 1.42, 0.9, 1.9, None), choice(4, 0.97, 0.93, 1.01, False)
    assert report.sentence([one]) == "Nothing is decided yet."
    assert report.sentence([one, four]).startswith("Leave speculation off: nothing was clearly")
    assert "with four requests" in report.sentence([one, four])
    text = report.text(Found(), [one], [1, 8])
    assert (
        "No verdict with one request at once: ngram 4 8 needs up to 2 more minutes (--time-limit;"
        in text
    )
    assert "No time for eight requests at once." in text
    assert "none yet" in report.table([one])[1]


def test_where_nothing_pays_it_says_why() -> None:
    four, one = choice(4, 1.25, 0.9, 1.5, False), choice(1, 1.5, 1.4, 1.6, True)
    (reason,) = report.reasons([four, one])
    assert reason == (
        "With four requests at once, ngram 4 8 drafts 4.0 tokens a round, of which 25 % are "
        "accepted: 2.00 tokens for the time of 1.60 plain ones. To draft and verify a token costs "
        "0.15 of a plain round."
    )


def test_the_share_that_is_done_grows_within_the_only_group() -> None:
    engine = RuleEngine({"7": 1.3}, MANY)
    done: list[float] = []
    searching = search(engine, stop=2000.0, tell=lambda line, share: done.append(share))
    searching.run([1])
    assert done == sorted(done)
    assert done[0] == 0.0
    assert 0.1 < done[-2] < 1.0
    assert done[-1] == 1.0
