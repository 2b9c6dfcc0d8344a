"""Whole measurements on rule-following engines with a set clock: speedups are exact."""

import json
from pathlib import Path
from typing import Any

import pytest
import worlds

from smart_decoding.bench import report, runner
from smart_decoding.bench.cycles import AGAIN, Measurement, cycles_of, measure, rows_of
from smart_decoding.bench.options import BenchOptions, parse_setting
from smart_decoding.bench.provenance import provenance, write_json
from smart_decoding.bench.runner import command_of
from smart_decoding.cli import bench as cli
from smart_decoding.errors import CapacityError, ConfigError

FIELDS = {
    "policy",
    "batch_size",
    "task",
    "tokens_per_s",
    "speedup",
    "speedup_low",
    "speedup_high",
    "tokens_per_round",
    "rows_per_round",
    "controller_share",
    "tpot_ms",
    "identical",
}


@pytest.fixture
def world():
    clock = worlds.Clock()
    engines = {
        "off": worlds.engine(clock),
        AGAIN: worlds.engine(clock),
        "chain": worlds.engine(clock, "chain", worlds.RuleDrafter(clock, seconds=0.25), length=2),
        "chain(length=1)": worlds.engine(
            clock, "chain", worlds.RuleDrafter(clock, good=False, seconds=0.25), length=1
        ),
    }
    tasks = {"code": worlds.prompts("code", 6, 0, 60), "maths": worlds.prompts("maths", 3, 6, 60)}
    return clock, engines, tasks


def runs_of(world, batch=2, **limits):
    clock, engines, tasks = world
    return rows_of(measure(engines, tasks, batch, clock=clock, **limits), batch)


def terminal(runs):
    return report.everything({"runs": runs})


def test_speedups_tokens_and_identity(world):
    runs = runs_of(world)
    assert {(r["policy"], r["task"]) for r in runs} == {
        (p, t) for p in ("off", "chain", "chain(length=1)") for t in ("code", "maths", "all")
    }
    by = {(r["policy"], r["task"]): r for r in runs}
    assert by["off", "all"]["speedup"] == 1.0
    assert by["off", "all"]["noise"] == pytest.approx(1.0)
    good, bad = by["chain", "all"], by["chain(length=1)", "all"]
    assert good["speedup"] == pytest.approx(
        3 / 1.5, rel=0.02
    )  # an answer's last round may have no room for 3 tokens
    assert good["tokens_per_round"] == pytest.approx(3.0, rel=0.02)
    assert bad["speedup"] == pytest.approx(1 / 1.25, rel=0.02)
    assert bad["tokens_per_round"] == 1.0
    assert all(r["identical"] and r["differing_prompts"] == 0 for r in runs)
    assert all(r["speedup_low"] <= r["speedup"] <= r["speedup_high"] for r in runs)
    assert good["blocks"] == 5
    assert good["prompts"] == 9


def test_smart_is_compared_with_each_other_policy_block_by_block(world):
    clock, engines, tasks = world
    smart = {"off": engines["off"], "smart": engines["chain"]}
    rival = {"chain(length=1)": engines["chain(length=1)"]}
    runs = runs_of((clock, smart | rival, tasks))
    found = {r["task"]: r for r in runs if r["policy"] == "chain(length=1)"}
    assert set(found) == {"code", "maths", "all"}
    run = found["all"]
    assert run["smart_over"] == pytest.approx(2 * 1.25, rel=0.03)
    assert run["smart_over_low"] <= run["smart_over"] <= run["smart_over_high"]
    assert not any("smart_over" in r for r in runs if r["policy"] in ("off", "smart"))
    expected = f"{run['smart_over']:.2f} ({run['smart_over_low']:.2f}-{run['smart_over_high']:.2f})"
    (line,) = (line for line in terminal(runs).splitlines() if expected in line)
    assert line.startswith("chain(length=1)  2")


def test_another_token_is_reported():
    clock = worlds.Clock()
    other = worlds.RuleTarget(clock, rule=lambda t: worlds.successor(t) + (t == 30))
    engines = {"off": worlds.engine(clock), "chain": worlds.engine(clock, target=other)}
    runs = rows_of(measure(engines, {"code": worlds.prompts()}, 1, clock=clock), 1)
    found = next(r for r in runs if r["policy"] == "chain" and r["task"] == "all")
    assert not found["identical"]
    assert 0 < found["differing_prompts"] < 1
    assert "differ" in terminal(runs)
    assert "NO" in terminal(runs)


def test_a_deadline_keeps_complete_cycles_and_says_so(world):
    runs = runs_of(world, deadline=400.0)
    assert all(r["partial"] for r in runs)
    assert 1 <= runs[0]["blocks"] < 5
    assert "Partial: the time limit" in terminal(runs)
    with pytest.raises(CapacityError, match="too short"):
        runs_of(world, deadline=0.0)


def test_a_first_cycle_may_take_the_whole_time(world):
    runs = runs_of(world, deadline=0.0, into=Measurement(first_deadline=1e9))
    assert {r["blocks"] for r in runs if r["task"] == "all"} == {1}
    assert all(r["partial"] for r in runs)
    with pytest.raises(CapacityError, match="too short"):
        runs_of(world, deadline=0.0, into=Measurement(first_deadline=1.0))


def test_every_prompt_is_measured_once_and_never_its_own_filler():
    tasks = {"code": worlds.prompts("code", 5), "maths": worlds.prompts("maths", 3, 5)}
    blocks = list(cycles_of(tasks, 2))
    assert sorted(p.index for chunk, _ in blocks for p in chunk) == list(range(8))
    assert [chunk[0].task for chunk, _ in blocks] == ["code", "maths", "code", "maths", "code"]
    for chunk, fillers in blocks:
        assert not {p.index for p in chunk} & {p.index for p in fillers}
        assert {p.task for p in fillers} == {chunk[0].task}


def test_results_tell_no_folders(tmp_path):
    """They may tell of a user. What is no file is told as it was asked for."""
    file = tmp_path / "m.gguf"
    file.touch()
    for model, expected in ((str(file), "m.gguf"), ("owner/name", "owner/name")):
        assert f"--model {expected} --" in command_of(BenchOptions(model=model))
        assert provenance("", 0, {"model": model}, None)["weights"]["model"] == expected


def test_json_has_the_documented_form(world, tmp_path):
    runs = runs_of(world)
    assert all(set(r) >= FIELDS for r in runs)
    origin = provenance("smart bench", 0, {"model": "rule"}, "rule")
    file = tmp_path / "results.json"
    write_json(file, {"provenance": origin, "runs": runs})
    read = json.loads(file.read_text())
    assert set(read) == {"provenance", "runs"}
    known = {
        "command",
        "commit",
        "time",
        "versions",
        "hardware",
        "weights",
        "head",
        "seed",
        "plain_torch",
    }
    assert set(read["provenance"]) == known
    assert {"cpu", "cores", "flags", "cpu_kernels"} <= set(read["provenance"]["hardware"])
    assert read["runs"][0]["speedup"] == 1.0


def test_unknown_values_become_null_and_a_failed_write_leaves_nothing(tmp_path):
    file = tmp_path / "r.json"
    write_json(file, {"a": [float("nan"), float("inf"), 1.5]})
    assert json.loads(file.read_text()) == {"a": [None, None, 1.5]}
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": [None, None, 1.5]}
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
    with pytest.raises(CapacityError, match="could not be written"):
        write_json(tmp_path / "missing" / "r.json", {})


def test_tables_fit_on_a_terminal(world):
    text = terminal(runs_of(world))
    assert max(map(len, text.splitlines())) <= 100
    titles = ["Policies", "Rounds", "Speedup by task"]
    assert [part.splitlines()[0] for part in text.split("\n\n")[:-1]] == titles
    assert "maths" in text.split("\n\n")[2].splitlines()[1]
    assert "noise (95 %)" in text
    assert "smart / it" not in text  # a column that no run has


def test_the_end_says_what_follows(world):
    """In words: how much faster, whether that is certain, and what to do about a loss."""
    assert terminal(runs_of(world)).endswith("with 2 at once 1.99 times as fast (1.98-2.00).")

    def run(size, value, low, high):
        bounds = {"speedup": value, "speedup_low": low, "speedup_high": high}
        return {"policy": "smart", "batch_size": size, "task": "all", "identical": True, **bounds}

    runs = [run(1, 1.71, 1.57, 1.87), run(4, 1.04, 0.84, 1.14), run(8, 1.2, 1.1, None)]
    end = " ".join(terminal(runs).split("\n\n")[-1].split())
    assert end == (
        "smart against plain decoding: with one request 1.71 times as fast (1.57-1.87); with 4 at "
        "once no certain difference (0.84-1.14); with 8 at once 1.20 times as fast (one block). "
        "smart run, chat and serve use it by default."
    )
    end = " ".join(terminal([*runs, run(16, 0.9, 0.85, 0.96)]).split("\n\n")[-1].split())
    assert "with 16 at once 0.90 times as fast (0.85-0.96)." in end
    assert end.endswith("Where it is slower, --policy off decodes plainly.")
    end = " ".join(terminal([run(1, 0.5, None, None)]).split("\n\n")[-1].split())
    assert end.endswith("Where it is slower, --policy off decodes plainly.")
    assert "against" not in terminal([{**run(1, 1.0, 1.0, 1.0), "policy": "off"}])


def test_settings_of_a_policy_run_side_by_side():
    options = BenchOptions(
        policies=("off", "eagle2"), policy_options=("eagle2:depth=2,top_k=3", "eagle2:")
    )
    assert [arm.label for arm in options.arms] == ["off", "eagle2(depth=2,top_k=3)", "eagle2"]
    assert parse_setting("paper:alpha=0.5,family=offset").options == {
        "alpha": 0.5,
        "family": "offset",
    }
    assert "--policy-options eagle2:depth=2,top_k=3" in command_of(options)


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


def test_the_command_line_gives_the_same_options(tmp_path, monkeypatch, capsys, world):
    import argparse

    runs, calls = runs_of(world), []
    monkeypatch.setattr(
        "smart_decoding.bench.runner.run",
        lambda o: calls.append(o) or {"provenance": {}, "runs": runs},
    )
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    words = (
        "--policies off,chain --batch-sizes 1,4 --dtype fp32 --temperature 0.8 --tasks code "
        "--limit 3 --max-tokens 9"
    )
    args = parser.parse_args([*words.split(), "--json", str(tmp_path / "r.json")])
    assert cli.main(args) == 0
    (options,) = calls
    assert (options.policies, options.batch_sizes, options.dtype) == (
        ("off", "chain"),
        (1, 4),
        "fp32",
    )
    assert (options.temperature, options.tasks, options.limit, options.max_tokens) == (
        0.8,
        ("code",),
        3,
        9,
    )
    assert json.loads((tmp_path / "r.json").read_text())["runs"][0]["policy"] == "off"
    assert "speedup (95 %)" in capsys.readouterr().out


def test_an_arm_may_have_a_drafter_of_its_own(tmp_path):
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
    assert "--draft small" in command_of(draft)
    assert "--method-option longest=4" in command_of(options)
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
    import argparse

    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.options_of(parser.parse_args(words.split()))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--batch-sizes 1,x", "'1,x' is not a list of positive whole numbers such as 1,4"),
        ("--batch-sizes 0", "'0' is not a list of positive whole numbers"),
        ("--batch-sizes ,", "',' is not a list of positive whole numbers"),
    ],
)
def test_what_is_no_list_of_numbers_is_said(words, message, capsys):
    with pytest.raises(SystemExit):
        asked_by(words)
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

    for engine in engines.values():
        engine.target = Unsteady(clock)
    measured = measure(engines, {"code": worlds.prompts(count=1, tokens=300)}, 1, clock=clock)
    (cycle,) = measured.cycles
    ((again, first),) = measured.again
    assert again.tokens_per_s == pytest.approx(first.tokens_per_s, rel=0.02)
    # a round of it drafts for 0.5 s and verifies for 1 s or 2 s where a plain one takes 1 s or 2 s
    assert cycle["chain"].tokens_per_s / first.tokens_per_s == pytest.approx(9 / 4, rel=0.03)
    waited = [block.answers[0].tpot for block in (first, again)]
    assert waited == pytest.approx([1 / first.tokens_per_s] * 2, rel=0.02)


def test_a_run_without_memory_says_so():
    clock = worlds.Clock()
    engines = {"off": worlds.engine(clock), "chain": worlds.engine(clock)}
    engines["chain"].share_pages(engines["off"])
    engines["off"].pool.take(engines["off"].pool.available - 1)
    with pytest.raises(CapacityError, match="KV memory of this run is too small"):
        measure(engines, {"code": worlds.prompts()}, 2, clock=clock)


def test_a_pickled_model_without_a_template_can_be_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(runner, "LLM", lambda model, **options: options)
    options = BenchOptions(
        model="lmsys/vicuna", quantization="int4", chat_template="vicuna", trust_pickle=True
    )
    given: Any = runner.load(options)
    assert given["quantization"] == "int4"
    assert given["chat_template"] == "vicuna"
    assert given["trust_pickle"] is True
    assert "--chat-template vicuna --trust-pickle" in command_of(options)
    assert "--quantization int4" in command_of(options)
    with pytest.raises(ConfigError, match="No such file"):
        BenchOptions(chat_template=str(tmp_path / "none.jinja"))
