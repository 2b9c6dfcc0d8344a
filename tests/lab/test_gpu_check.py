"""The check of a GPU, without its steps: they may fail, hang or be cut, and the last line still
comes."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from smart_decoding.models.torch import head_levels
from smart_lab import gpu_check
from smart_lab.gpu_check import Step, main, run_steps, stand_in, verdict, ways
from smart_lab.gpu_steps import Task, knee_of, replay_options, that_fit, trace_of
from smart_lab.hardware import card, dimensions, roofline

ENDED = {step.name: {"status": "ok"} for step in gpu_check.STEPS}
POINT = {"ms": 6.0, "floor_ms": 5.5, "near_floor": True}


def run_of(policy: str, size: int, **more: Any) -> dict[str, Any]:
    floor = {"plain_ms": 6.6, "floor_ms": 5.5, "near_floor": True}
    over = {} if policy in ("off", "smart") else {"smart_over": 1.25}
    return {"policy": policy, "batch_size": size, "speedup": 1.6, **floor, **over, **more}


def good() -> dict[str, Any]:
    """What a GPU without faults would give."""
    names = ("off", "smart", "eagle2(depth=5)", "paper(children=10)", "pooled_chain")
    runs = [run_of(name, size) for size in (1, 16, 64) for name in names]
    return {
        "tiny": False,
        "device": "cuda",
        "steps": ENDED,
        "parity": {"checks": [{"name": "noise", "ok": True}]},
        "decode": {"points": [POINT, POINT]},
        "curve": {"knee": 231.4},
        "replay-eagle3": {"runs": runs},
        "replay-msd": {"runs": [*runs, run_of("pooled_chain", 16, smart_over=0.98)]},
    }


def test_a_pass_has_all_ratios_the_worst_of_both_levels() -> None:
    why, line = verdict(good())
    assert not why
    assert line == (
        "GPU_CHECK PASS plain/floor=1.20 smart/eagle2@1,16,64=1.25,1.25,1.25 "
        "smart/pooled_chain@1,16,64=1.25,0.98,1.25 knee=231"
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"steps": {**ENDED, "curve": {"status": "failed: exit code 1"}}}, "steps"),
        ({"steps": {**ENDED, "parity": {"status": "failed: exit code 1"}}}, "steps,parity"),
        ({"steps": {}}, "steps,parity"),
        ({"parity": {"checks": [{"ok": True}, {"ok": False}]}}, "parity"),
        ({"parity": {}}, "parity"),
        ({"decode": {"points": [POINT, {**POINT, "near_floor": False}]}}, "plain"),
        ({"decode": {}}, "plain"),
        ({"curve": {"knee": None}}, "knee"),
        ({"device": "cpu"}, "gpu"),
        ({"tiny": True}, "gpu"),
        ({"interrupted": True}, "steps"),
    ],
)
def test_a_fail_says_why(change: dict[str, Any], reason: str) -> None:
    why, line = verdict(good() | change)
    assert why == reason.split(",")
    assert line.startswith("GPU_CHECK FAIL plain/floor=")
    assert line.endswith(f" why={reason}")


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (run_of("off", 1, near_floor=False), "plain"),
        (run_of("smart", 1, speedup=0.9), "smart"),
        (run_of("paper(children=10)", 64, smart_over=0.96), "smart"),
        (run_of("eagle2(depth=5)", 16, smart_over=None), "smart"),
    ],
)
def test_one_bad_run_of_either_replay_is_enough(run: dict[str, Any], reason: str) -> None:
    found = good()
    found["replay-msd"]["runs"].append(run)
    assert verdict(found)[0] == [reason]


def way(size: int, speedup: float) -> dict[str, Any]:
    ends = {"speedup_low": speedup - 0.02, "speedup_high": speedup + 0.02}
    return {"batch_size": size, "speedup": speedup, **ends}


@pytest.mark.parametrize(
    ("speedups", "line"),
    [
        ((1.2, 1.01), "winner=device set DEVICE_CHOOSES = True device/host=1.10"),
        ((0.8, 0.9), "winner=host set DEVICE_CHOOSES = False device/host=0.85"),
    ],
)
def test_the_faster_way_to_draft_is_named_with_its_setting(
    speedups: tuple[float, float], line: str
) -> None:
    assert head_levels.DEVICE_CHOOSES in (True, False)
    found = good()
    assert ways(found) == "DRAFTING not measured"
    for level, speedup in zip(("eagle3", "msd"), speedups, strict=True):
        found[f"replay-{level}"]["ways"] = [way(16, speedup)]
    sure = sum(abs(speedup - 1) > 0.02 for speedup in speedups)
    each = ",".join(f"16:{speedup:.2f}" for speedup in speedups)
    assert ways(found) == f"DRAFTING {line} by batch {each} beyond noise: {sure} of 2"


def test_nothing_found_is_said_too() -> None:
    assert verdict({"tiny": False, "steps": {}})[1] == (
        "GPU_CHECK FAIL plain/floor=- smart/eagle2@=- smart/pooled_chain@=- knee=- "
        "why=steps,parity,plain,smart,knee,gpu"
    )


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What steps run in place of their own work, by name; {into} is where results go."""
    found: dict[str, str] = {}

    def command(name: str, seconds: float, known: Path, into: Path) -> list[str]:
        return [sys.executable, "-c", found[name].replace("{into}", str(into))]

    monkeypatch.setattr(gpu_check, "command", command)
    return found


def keeping(found: str) -> str:
    return f"import pathlib, sys, time; pathlib.Path('{{into}}').write_text('{found}'); "


def test_steps_that_fail_or_hang_keep_what_they_found_and_end_nothing_else(
    scripts: dict[str, str], tmp_path: Path
) -> None:
    scripts["limits"] = keeping('{"device": "cpu", "limits": {"gb_per_s": 9.0}}')
    scripts["parity"] = keeping('{"checks": [{"ok": true}]}') + "sys.exit('no such kernel')"
    child = "import subprocess; subprocess.run(['sleep', '60'])"
    scripts["decode"] = keeping('{"points": [1]}') + child
    scripts["curve"] = "import os; os.abort()"
    scripts["replay-msd"] = keeping('{"runs": [], "missing": ["no time for batch 64"]}')
    steps = [Step(name, 0.5 if name == "decode" else 20.0) for name in scripts]
    found: dict[str, Any] = {"tiny": False, "steps": {}}
    path = tmp_path / "r.json"
    started = time.monotonic()
    run_steps(steps, found, path, seconds=80.0)
    assert time.monotonic() - started < 30  # nobody waited for the child
    status = {name: step["status"] for name, step in found["steps"].items()}
    assert status == {
        "limits": "ok",
        "parity": "failed: exit code 1",
        "decode": "failed: not done within 1 s",
        "curve": "failed: exit code -6",
        "replay-msd": "failed: no time for batch 64",
    }
    assert found["steps"]["parity"]["said"] == "no such kernel\n"
    assert found["limits"] == {"gb_per_s": 9.0}
    assert found["decode"] == {"points": [1]}
    assert found["tiny"]  # there was no GPU
    assert json.loads(path.read_text()) == found
    assert [each.name for each in tmp_path.iterdir()] == ["r.json"]


def test_what_there_is_no_time_for_is_left_out(scripts: dict[str, str], tmp_path: Path) -> None:
    scripts["limits"] = keeping("{}")
    found: dict[str, Any] = {"tiny": False, "steps": {}}
    run_steps([Step("limits", 40.0)], found, tmp_path / "r.json", seconds=5.0)
    assert found["steps"]["limits"] == {"status": "left out: no time was left"}


def test_the_last_line_comes_though_no_file_can_be_written(
    scripts: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scripts["limits"] = keeping("{}")
    handler = signal.getsignal(signal.SIGTERM)
    try:
        code = main(["--json", str(tmp_path / "none" / "r.json"), "--steps", "limits"])
    finally:
        signal.signal(signal.SIGTERM, handler)
    out, err = capsys.readouterr()
    assert code == 3
    assert out.splitlines()[-1].startswith("GPU_CHECK FAIL ")
    assert "r.json could not be written" in err


def test_the_last_line_comes_when_it_is_ended_from_outside(tmp_path: Path) -> None:
    """As `timeout` does."""
    script = (
        "import sys; from smart_lab import gpu_check\n"
        "gpu_check.command = lambda *given: [sys.executable, '-c', "
        "'import time; time.sleep(60)']\n"
        "sys.exit(gpu_check.main(['--json', sys.argv[1]]))"
    )
    path = tmp_path / "r.json"
    process = subprocess.Popen(
        [sys.executable, "-c", script, path],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    while not path.exists():  # the first step begins
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.3)
    process.terminate()
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 3
    assert out.splitlines()[-1].startswith("GPU_CHECK FAIL ")
    assert json.loads(path.read_text())["steps"]["limits"]["status"] == "interrupted"


def test_absent_packages_have_stand_ins_and_present_ones_do_not() -> None:
    try:
        stand_in(("json", "absent_package", "absent_package.part"))
        assert "absent_package" not in json.__dict__
        absent = importlib.import_module("absent_package.part")
        with absent.bar(range(3)) as bar:
            assert list(bar) == [0, 1, 2]
        assert not hasattr(absent, "__file__")
    finally:
        for name in ("absent_package", "absent_package.part"):
            sys.modules.pop(name, None)


def test_the_knee_is_where_arithmetic_takes_over() -> None:
    rows = [1, 16, 64, 128, 256, 512, 1024]
    assert knee_of(rows, [max(5.0, 0.02 * n) for n in rows]) == pytest.approx(250)
    assert knee_of(rows, [5.0] * 7) is None
    assert knee_of(rows, [5.0, 4.9, 5.0, 5.1, 5.0, 5.0, 5.1]) is None  # it rises by chance
    assert knee_of(rows[:1], [5.0]) is None
    h100 = roofline(card("h100"), dimensions("llama-3.1-8b"))
    ms = [1e3 * float(h100.verify_seconds(1, np.array([n]), 1024.0)[0]) for n in rows]
    assert knee_of(rows, ms) == pytest.approx(150, abs=15)


@pytest.mark.parametrize(
    ("gib", "level", "fitting"),
    [
        (78.0, "msd", (1, 16, 64)),
        (78.0, "eagle3", (1, 16, 64)),
        (44.4, "msd", (1, 16)),
        (15.0, "msd", ()),
    ],
)
def test_batch_sizes_that_do_not_fit_are_left_out(
    gib: float, level: str, fitting: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama-3.1-8B's shape, by count: cards of 80, 48 and 16 GB."""
    whole = int(gib * 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (whole - 600_000_000, whole))
    task = Task({"tiny": False}, torch.device("cuda"), 0.0)
    trace = trace_of(level, replace(task.scale, answers=1))
    sizes, missing = that_fit(task, replay_options(task, level), trace)
    assert sizes == fitting
    assert len(missing) == 3 - len(fitting)
    assert all("no memory for batch" in each for each in missing)


def test_a_step_has_its_share_of_what_is_left(
    scripts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What others did not need too."""
    given: list[float] = []
    monkeypatch.setattr(gpu_check, "_run", lambda name, seconds, found: given.append(seconds))
    found: dict[str, Any] = {"tiny": False, "steps": {name: {"status": "ok"} for name in "abc"}}
    run_steps([Step("a", 20), Step("b", 20), Step("c", 60)], found, tmp_path / "r.json", 200.0)
    assert given == pytest.approx([40, 50, 200], abs=1)
