"""A cut run goes on: what was measured is kept, read back as it was, and refused to another run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import worlds

from smart_decoding.bench import cycles
from smart_decoding.errors import ConfigError
from smart_decoding.measuring.resume import Progress
from smart_lab import resume
from smart_lab.cycles import AGAIN, measure, rows_of
from smart_lab.options import LabOptions
from smart_lab.resume import (
    KeptMeasurement,
    key_of,
    source_digest,
)


def engines(clock: worlds.Clock) -> dict[str, Any]:
    drafter = worlds.RuleDrafter(clock, seconds=0.25)
    return {
        "off": worlds.engine(clock),
        AGAIN: worlds.engine(clock),
        "chain": worlds.engine(clock, "chain", drafter, length=2),
    }


class CutError(Exception):
    pass


def test_a_cut_run_measures_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = {"code": worlds.prompts(count=5, tokens=40)}
    clock = worlds.Clock()
    whole = rows_of(measure(engines(clock), tasks, 1, clock=clock), 1)
    file, measured = tmp_path / "run.part", []
    rounds_of = cycles.rounds_of

    def counted(engine: Any, prompts: Any, *rest: Any) -> Any:
        measured.append(prompts[0].index)
        if len(measured) == 7:  # a cycle with the second baseline, a cycle, and half of the next
            raise CutError
        return rounds_of(engine, prompts, *rest)

    monkeypatch.setattr(cycles, "rounds_of", counted)

    def go_on() -> Any:
        progress, clock = Progress(file, {"option": 1}), worlds.Clock()
        return measure(
            engines(clock),
            tasks,
            1,
            clock=clock,
            into=KeptMeasurement(progress, "b"),
        )

    with pytest.raises(CutError):
        go_on()
    assert [len(of) for of in json.loads(file.read_text())["units"].values()] == [2]
    measured.clear()
    monkeypatch.setattr(
        cycles, "rounds_of", lambda *a: measured.append(a[1][0].index) or rounds_of(*a)
    )
    rows = rows_of(go_on(), 1)
    assert sorted(measured) == [2, 2, 3, 3, 3, 4, 4]  # the fourth cycle has a second baseline
    for mine, theirs in zip(rows, whole, strict=True):
        for name in (
            "speedup",
            "tokens_per_round",
            "rows_per_round",
            "noise",
            "blocks",
            "identical",
        ):
            assert mine.get(name) == pytest.approx(theirs.get(name)), name
    measured.clear()
    assert rows_of(go_on(), 1) == rows
    assert not measured


def test_the_key_knows_options_machine_and_source(tmp_path: Path) -> None:
    key = key_of(LabOptions(limit=3, json=tmp_path / "a.json", time_limit=9.0))
    assert key["option"]["limit"] == 3
    assert not {"json", "time_limit", "resume"} & set(key["option"])
    assert set(key["machine"]) >= {"cpu", "cores", "threads"}
    assert key["source"] == source_digest()
    assert key == key_of(LabOptions(limit=3, json=tmp_path / "b.json"))
    assert key != key_of(LabOptions(limit=4))


@pytest.mark.parametrize("changed", ["a/b.py", "csrc/a.h"])
def test_a_run_does_not_go_on_with_other_code(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [root.name for root in resume.SOURCES] == ["smart_decoding", "smart_lab"]
    monkeypatch.setattr(resume, "SOURCES", [tmp_path])
    (tmp_path / changed).parent.mkdir()
    (tmp_path / changed).write_text("a = 1")
    file = tmp_path / "run.part"
    Progress(file, key_of(LabOptions())).add("x", 1)
    assert Progress(file, key_of(LabOptions())).units("x") == [1]
    (tmp_path / changed).write_text("a = 2")
    with pytest.raises(ConfigError, match="source"):
        Progress(file, key_of(LabOptions()))
