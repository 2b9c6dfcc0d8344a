"""The example's commands, as far as they need no weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from pictures_model import commands
from pictures_model.__main__ import COMMANDS, main
from smart_decoding.cli import main as smart
from smart_decoding.measuring import tasks
from smart_decoding.training.seeds import read_questions


def test_the_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"    {name} " in said for name in COMMANDS)
    assert main(["what"]) == 2


def test_bench_knows_one_task_more(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(smart, "main", lambda argv: asked.append(argv) or 0)
    monkeypatch.setattr(commands, "model_folder", lambda: Path("whole"))
    monkeypatch.setattr(tasks, "TASKS", dict(tasks.TASKS))
    assert main(["bench", "--batch-sizes", "1"]) == 0
    (argv,) = asked
    assert argv[:3] == ["bench", "--model", "whole"]
    assert argv[-2:] == ["--batch-sizes", "1"]
    assert argv[argv.index("--tasks") + 1] == "pictures"
    assert len(tasks.load_task("pictures", 3)) == 3


def test_questions_are_what_smart_train_reads(tmp_path: Path) -> None:
    assert main(["questions", str(tmp_path / "made"), "--count", "12"]) == 0
    asked = read_questions(tmp_path / "made" / "questions.jsonl")
    assert len({image for image, _ in asked}) == 12
    assert len({question for _, question in asked}) > 6
    for image, _ in asked:
        with Image.open(image) as shown:
            assert shown.size == (96, 96)
