"""Whole measurements on rule-following engines with a set clock: speedups are exact."""

import json

import pytest
import worlds

from smart_decoding.bench import cli, report
from smart_decoding.bench.options import BenchOptions, parse_setting
from smart_decoding.bench.provenance import provenance, write_json
from smart_decoding.bench.runner import command_of, cycles_of, measure, rows_of
from smart_decoding.errors import CapacityError, ConfigError

FIELDS = {
    "policy", "batch_size", "task", "dtype", "temperature", "tokens_per_s", "speedup", "speedup_low", "speedup_high",
    "tokens_per_round", "rows_per_round", "wasted_rows", "controller_share", "ttft_ms", "tpot_ms", "identical",
}  # fmt: skip


@pytest.fixture
def world():
    clock = worlds.Clock()
    engines = {
        "off": worlds.engine(clock),
        "chain": worlds.engine(clock, "chain", worlds.RuleDrafter(clock, seconds=0.25), length=2),
        "chain(length=1)": worlds.engine(clock, "chain", worlds.RuleDrafter(clock, good=False, seconds=0.25), length=1),
    }
    tasks = {"code": worlds.prompts("code", 6, 0, 60), "maths": worlds.prompts("maths", 3, 6, 60)}
    return clock, engines, tasks


def runs_of(world, batch=2, **limits):
    clock, engines, tasks = world
    return rows_of(measure(engines, tasks, batch, clock=clock, **limits), batch, worlds.options())


def test_speedups_tokens_and_identity(world):
    runs = runs_of(world)
    assert {(r["policy"], r["task"]) for r in runs} == {
        (p, t) for p in ("off", "chain", "chain(length=1)") for t in ("code", "maths", "all")
    }
    by = {(r["policy"], r["task"]): r for r in runs}
    assert by["off", "all"]["speedup"] == 1.0 and by["off", "all"]["noise"] == pytest.approx(1.0)
    good, bad = by["chain", "all"], by["chain(length=1)", "all"]
    assert good["speedup"] == pytest.approx(3 / 1.5, rel=0.02)  # an answer's last round may have no room for 3 tokens
    assert good["tokens_per_round"] == pytest.approx(3.0, rel=0.02) and good["wasted_rows"] == 0
    assert bad["speedup"] == pytest.approx(1 / 1.25, rel=0.02)
    assert bad["tokens_per_round"] == 1.0 and bad["wasted_rows"] == pytest.approx(2.0, rel=0.05)
    assert all(r["identical"] and r["differing_tokens"] == 0 for r in runs)
    assert all(r["speedup_low"] <= r["speedup"] <= r["speedup_high"] for r in runs)
    assert good["blocks"] == 5 and good["prompts"] == 9


def test_another_token_is_reported():
    clock = worlds.Clock()
    other = worlds.RuleTarget(clock, rule=lambda t: worlds.successor(t) + (t == 30))
    engines = {"off": worlds.engine(clock), "chain": worlds.engine(clock, target=other)}
    runs = rows_of(measure(engines, {"code": worlds.prompts()}, 1, clock=clock), 1, worlds.options())
    found = next(r for r in runs if r["policy"] == "chain" and r["task"] == "all")
    assert not found["identical"] and 0 < found["differing_prompts"] < 1 and found["differing_tokens"] > 0
    assert "differ" in report.terminal(runs) and "NO" in report.terminal(runs)


def test_a_deadline_keeps_complete_cycles_and_says_so(world):
    runs = runs_of(world, deadline=400.0)
    assert all(r["partial"] for r in runs)
    assert 1 <= runs[0]["blocks"] < 5
    assert "PARTIAL" in report.terminal(runs)
    with pytest.raises(CapacityError, match="too short"):
        runs_of(world, deadline=0.0)


def test_every_prompt_is_measured_once_and_never_its_own_filler():
    tasks = {"code": worlds.prompts("code", 5), "maths": worlds.prompts("maths", 3, 5)}
    blocks = list(cycles_of(tasks, 2))
    assert sorted(p.index for chunk, _ in blocks for p in chunk) == list(range(8))
    assert [chunk[0].task for chunk, _ in blocks] == ["code", "maths", "code", "maths", "code"]
    for chunk, fillers in blocks:
        assert not {p.index for p in chunk} & {p.index for p in fillers}
        assert {p.task for p in fillers} == {chunk[0].task}


def test_json_has_the_documented_form(world, tmp_path):
    runs = runs_of(world)
    assert all(set(r) >= FIELDS for r in runs)
    origin = provenance("smart bench", 0, {"model": "rule"}, "rule")
    file = tmp_path / "results.json"
    write_json(file, {"provenance": origin, "runs": runs})
    read = json.loads(file.read_text())
    assert set(read) == {"provenance", "runs"}
    assert set(read["provenance"]) == {"command", "commit", "time", "versions", "hardware", "weights", "head", "seed"}
    assert {"cpu", "cores", "flags"} <= set(read["provenance"]["hardware"])
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


def test_tables_fit_their_place(world):
    runs = runs_of(world)
    renamed = [{**r, "policy": r["policy"].replace("(length=1)", "(length=1,and_more=1234567890)")} for r in runs]
    text = report.terminal(renamed)
    assert max(map(len, text.splitlines())) <= 100
    assert "chain 1/1234567890 = chain(length=1,and_more=1234567890)" in text
    table = report.markdown(runs).splitlines()
    assert len(table) == 2 + 3 and len({line.count("|") for line in table}) == 1
    assert "maths" in report.by_task(runs).splitlines()[0]


def test_settings_of_a_policy_run_side_by_side():
    options = BenchOptions(policies=("off", "likelihood"), policy_options=("likelihood:depth=2,top_k=3", "likelihood:"))
    assert [arm.label for arm in options.arms] == ["off", "likelihood(depth=2,top_k=3)", "likelihood"]
    assert parse_setting("smart_paper:alpha=0.5,family=offset").options == {"alpha": 0.5, "family": "offset"}
    assert "--policy-options likelihood:depth=2,top_k=3" in command_of(options)


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

    runs, asked = runs_of(world), []
    monkeypatch.setattr(
        "smart_decoding.bench.runner.run", lambda o: asked.append(o) or {"provenance": {}, "runs": runs}
    )
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    words = (
        "--policies off,chain --batch-sizes 1,4 --dtype fp32 --temperature 0.8 --tasks code --limit 3 --max-tokens 9"
    )
    args = parser.parse_args([*words.split(), "--json", str(tmp_path / "r.json")])
    assert cli.main(args) == 0
    (options,) = asked
    assert (options.policies, options.batch_sizes, options.dtype) == (("off", "chain"), (1, 4), "fp32")
    assert (options.temperature, options.tasks, options.limit, options.max_tokens) == (0.8, ("code",), 3, 9)
    assert json.loads((tmp_path / "r.json").read_text())["runs"][0]["policy"] == "off"
    assert "speedup (95 %)" in capsys.readouterr().out
