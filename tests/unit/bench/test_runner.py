"""Whole measurements on rule-following engines with a set clock: speedups are exact."""

import argparse

import pytest
import worlds

from smart_decoding.bench import report, runner
from smart_decoding.bench.cycles import cycles_of, measure
from smart_decoding.bench.options import BenchOptions
from smart_decoding.bench.results import Results, Row, rows_of
from smart_decoding.cli import bench as cli
from smart_decoding.errors import CapacityError, ConfigError
from smart_decoding.measuring.statistics import Ratio


@pytest.fixture
def world():
    clock = worlds.Clock()
    engines = {
        "off": worlds.engine(clock),
        "chain": worlds.engine(clock, "chain", worlds.RuleDrafter(clock, seconds=0.25), length=2),
        "chain(length=1)": worlds.engine(
            clock, "chain", worlds.RuleDrafter(clock, good=False, seconds=0.25), length=1
        ),
    }
    tasks = {"code": worlds.prompts("code", 6, 0, 60), "maths": worlds.prompts("maths", 3, 6, 60)}
    return clock, engines, tasks


def rows(world, batch=2):
    clock, engines, tasks = world
    cycles = list(measure(engines, tasks, batch, clock=clock))
    return {row.policy: row for row in rows_of(cycles, batch, partial=False)}


def terminal(found):
    return report.everything(Results(list(found)))


def test_speedups_tokens_and_identity(world):
    by = rows(world)
    assert list(by) == ["off", "chain", "chain(length=1)"]
    assert by["off"].speedup.value == 1.0
    good, bad = by["chain"], by["chain(length=1)"]
    assert good.speedup.value == pytest.approx(
        3 / 1.5, rel=0.02
    )  # an answer's last round may have no room for 3 tokens
    assert good.tokens_per_round == pytest.approx(3.0, rel=0.02)
    assert good.tokens_per_s == pytest.approx(2 * by["off"].tokens_per_s, rel=0.02)
    assert bad.speedup.value == pytest.approx(1 / 1.25, rel=0.02)
    assert bad.tokens_per_round == 1.0
    assert {row.differing for row in by.values()} == {0.0}
    assert all(r.speedup.low <= r.speedup.value <= r.speedup.high for r in by.values())
    assert {row.blocks for row in by.values()} == {5}


def test_smart_is_compared_with_each_other_policy_block_by_block(world):
    clock, engines, tasks = world
    assert "smart / it" not in terminal(rows(world).values())
    smart = {"off": engines["off"], "smart": engines["chain"]}
    rival = {"chain(length=1)": engines["chain(length=1)"]}
    found = rows((clock, smart | rival, tasks))
    assert found["off"].smart_over is found["smart"].smart_over is None
    over = found["chain(length=1)"].smart_over
    assert over.value == pytest.approx(2 * 1.25, rel=0.03)
    assert over.low <= over.value <= over.high
    expected = f"{over.value:.2f} ({over.low:.2f}-{over.high:.2f})"
    (line,) = (line for line in terminal(found.values()).splitlines() if line.endswith(expected))
    assert line.startswith("chain(length=1)  2")


def test_another_token_is_reported():
    clock = worlds.Clock()
    other = worlds.RuleTarget(clock, rule=lambda t: worlds.successor(t) + (t == 30))
    engines = {"off": worlds.engine(clock), "chain": worlds.engine(clock, target=other)}
    found = rows((clock, engines, {"code": worlds.prompts()}), batch=1)
    assert found["off"].differing == 0 < found["chain"].differing < 1
    text = terminal(found.values())
    assert f"chain, batch 1: {100 * found['chain'].differing:.1f} % of answers differ" in text
    assert "NO" in text


def test_a_cycle_that_gets_too_late_is_dropped(world):
    clock, engines, tasks = world
    kept = list(measure(engines, tasks, 2, lambda: clock() > 400.0, clock))
    assert 1 <= len(kept) < 5
    assert all({*cycle} == {*engines} for cycle in kept)
    assert not list(measure(engines, tasks, 2, lambda: True, clock))


def test_a_run_says_what_it_left_out(world, monkeypatch, capsys):
    """The first cycle of a batch size may take the whole run's time; without one it is left out."""
    clock, engines, tasks = world

    class Lender:
        target = type("Target", (), {"plain_torch": None})

        def sharing_weights(self, config):
            kind = "off" if config is False else "chain"
            return type("Arm", (), {"engine": engines[kind]})

    monkeypatch.setattr(runner, "load", lambda options, contestants: Lender())
    monkeypatch.setattr(runner, "encode", lambda llm, texts, options: tasks)
    monkeypatch.setattr(runner, "load_task", lambda task, limit: [])
    monkeypatch.setattr(runner.time, "perf_counter", clock)
    options = BenchOptions(policies=("off", "chain"), batch_sizes=(2, 1), time_limit=150.0)
    found = runner.run(options)
    assert [(row.batch_size, row.blocks, row.partial) for row in found.rows] == [(2, 1, True)] * 2
    assert terminal(found.rows).startswith("Partial: the time limit")
    assert "batch 1 is left out: no time was left" in capsys.readouterr().err
    with pytest.raises(CapacityError, match="too short"):
        runner.run(BenchOptions(policies=("off", "chain"), time_limit=1e-9))


def test_every_prompt_is_measured_once_and_never_its_own_filler():
    tasks = {"code": worlds.prompts("code", 5), "maths": worlds.prompts("maths", 3, 5)}
    blocks = list(cycles_of(tasks, 2))
    assert sorted(p.index for chunk, _ in blocks for p in chunk) == list(range(8))
    assert [chunk[0].task for chunk, _ in blocks] == ["code", "maths", "code", "maths", "code"]
    for chunk, fillers in blocks:
        assert not {p.index for p in chunk} & {p.index for p in fillers}
        assert {p.task for p in fillers} == {chunk[0].task}


def row(size: int, value: float, low: float, high: float, policy: str = "smart") -> Row:
    pairs = 1 if high == float("inf") else 9
    ratio = Ratio(value, low, high, pairs)
    return Row(policy, size, 9.0, ratio, None, 0.0, 1.5, pairs, partial=False)


def test_the_end_says_what_follows(world):
    """In words: how much faster, whether that is certain, and what to do about a loss."""
    end = terminal(rows(world).values()).split("\n\n")[-1]
    assert end == "chain against plain decoding: with 2 at once 1.99 times as fast (1.98-2.00)."

    found = [row(1, 1.71, 1.57, 1.87), row(4, 1.04, 0.84, 1.14), row(8, 1.2, 0.0, float("inf"))]
    end = " ".join(terminal(found).split("\n\n")[-1].split())
    assert end == (
        "smart against plain decoding: with one request 1.71 times as fast (1.57-1.87); with 4 at "
        "once no certain difference (0.84-1.14); with 8 at once 1.20 times as fast (one block). "
        "smart run, chat and serve use it by default."
    )
    end = " ".join(terminal([*found, row(16, 0.9, 0.85, 0.96)]).split("\n\n")[-1].split())
    assert "with 16 at once 0.90 times as fast (0.85-0.96)." in end
    assert end.endswith("Where it is slower, --policy off decodes plainly.")
    end = " ".join(terminal([row(1, 0.5, 0.0, float("inf"))]).split("\n\n")[-1].split())
    assert end.endswith("Where it is slower, --policy off decodes plainly.")
    unknown = Ratio(float("nan"), float("nan"), float("nan"), 0)
    assert "with one request unknown" in terminal(
        [Row("smart", 1, float("nan"), unknown, None, 0.0, 1.0, 1, partial=False)]
    )
    assert "against" not in terminal([row(1, 1.0, 1.0, 1.0, policy="off")])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"policies": ("nonsense",)}, "unknown policy"),
        ({"policies": ("chain",), "policy_options": ("chain:depth=2",)}, "no option 'depth'"),
        ({"policies": ("chain",), "policy_options": ("chain:length",)}, "name=value"),
        ({"policy_options": ("chain:length=2",)}, "not among the policies"),
        ({"tasks": ("cooking",)}, "unknown task"),
        ({"batch_sizes": (0,)}, "at least 1"),
        ({"limit": 0}, "at least 1"),
        ({"temperature": -1.0}, "temperature"),
        ({"time_limit": 0.0}, "time_limit"),
    ],
)
def test_bad_options_are_refused_before_a_model_is_loaded(given, message):
    with pytest.raises(ConfigError, match=message):
        BenchOptions(**given)


def test_an_arm_may_have_a_drafter_of_its_own():
    options = BenchOptions(
        policies=("off", "smart"),
        method="ngram",
        method_options={"longest": 4},
        policy_options=("smart:method=draft_model,model=folder/small", "smart:"),
    )
    off, own, common = options.arms
    assert own.label == "smart(method=draft_model,model=small)"
    assert options.speculation(off) is False
    assert options.speculation(own) == {
        "policy": "smart",
        "method": "draft_model",
        "model": "folder/small",
    }
    assert options.speculation(common) == {"method": "ngram", "longest": 4, "policy": "smart"}
    draft = BenchOptions(method="draft_model", draft="small")
    assert draft.speculation(draft.arms[1]) == {
        "method": "draft_model",
        "model": "small",
        "policy": "smart",
    }
    for given, message in (
        ({"method": "draft_model"}, "give --draft"),
        ({"method": "none"}, "leaves nothing to compare"),
        ({"method": "magic"}, "unknown method"),
        ({"policy_options": ("smart:method=magic",)}, "unknown method"),
        ({"draft": "a", "method_options": {"model": "b"}}, "give it once"),
    ):
        with pytest.raises(ConfigError, match=message):
            BenchOptions(**given)


def asked_by(words):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.options_of(parser.parse_args(words.split()))


def test_what_is_no_list_of_numbers_is_said(capsys):
    with pytest.raises(SystemExit):
        asked_by("--batch-sizes 1,x")
    message = "'1,x' is not a list of positive whole numbers such as 1,4"
    assert message in capsys.readouterr().err


def test_quick_fills_in_what_is_not_given():
    quick = asked_by("--quick")
    assert quick.time_limit <= 150
    assert 1 in quick.batch_sizes
    assert asked_by("--limit 3 --quick --batch-sizes 1,4").batch_sizes == (1, 4)
    assert [arm.label for arm in asked_by("--quick --policies off,smart").arms] == ["off", "smart"]
    assert asked_by("") == BenchOptions()
    assert asked_by("--method ngram --method-option longest=4").method_options == {"longest": 4}


def test_what_slows_the_machine_for_a_while_slows_all_contestants(world):
    """Blocks one after the other would have an arm to itself in a slow minute."""
    clock, engines, _ = world

    class Unsteady(worlds.RuleTarget):
        def forward(self, rows, aux_layers):
            found = super().forward(rows, aux_layers)
            self.clock.now += self.clock.now // 100 % 2  # every other 100 s takes twice as long
            return found

    engines["twin"] = worlds.engine(clock)
    for engine in engines.values():
        engine.target = Unsteady(clock)
    prompts = {"code": worlds.prompts(count=1, tokens=300)}
    (cycle,) = measure(engines, prompts, 1, clock=clock)
    plain, twin = cycle["off"], cycle["twin"]
    assert twin.tokens_per_s == pytest.approx(plain.tokens_per_s, rel=0.02)
    # a round of it drafts for 0.5 s and verifies for 1 s or 2 s where a plain one takes 1 s or 2 s
    assert cycle["chain"].tokens_per_s / plain.tokens_per_s == pytest.approx(9 / 4, rel=0.03)
    waited = [block.answers[0].tpot for block in (plain, twin)]
    assert waited == pytest.approx([1 / plain.tokens_per_s] * 2, rel=0.02)


def test_a_run_without_memory_says_so():
    clock = worlds.Clock()
    engines = {"off": worlds.engine(clock), "chain": worlds.engine(clock)}
    engines["chain"].share_pages(engines["off"])
    engines["off"].pool.take(engines["off"].pool.available - 1)
    with pytest.raises(CapacityError, match="KV memory of this run is too small"):
        list(measure(engines, {"code": worlds.prompts()}, 2, clock=clock))
