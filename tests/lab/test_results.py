"""The pages of benchmarks/results are those of their JSON files, and every file can be read and
drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from smart_decoding.cli.main import main
from smart_lab.__main__ import LAB
from smart_lab.plots import drawn
from smart_lab.results import Results
from smart_lab.results_command import KINDS, RESULTS, kind_of

FILES = sorted(RESULTS.glob("*/*.json"))
MEASURED = {path: json.loads(path.read_text()) for path in FILES}
DRAWN = [path for path, data in MEASURED.items() if data.get("runs") and "llama_cpp" not in data]


def test_every_page_is_up_to_date() -> None:
    assert FILES
    assert main(["results", "--check"], LAB) == 0


def test_a_machine_has_one_run_of_each_kind() -> None:
    kinds = [(path.parent.name, kind_of(path)) for path in FILES]
    assert len(kinds) == len(set(kinds))
    assert {kind for _, kind in kinds} <= set(KINDS)


@pytest.mark.parametrize("path", DRAWN, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_committed_results_can_be_drawn(path: Path) -> None:
    pytest.importorskip("matplotlib")
    (axes,) = drawn(Results.read(path)).axes
    assert len(axes.lines) > 1  # beside the one at 1


def test_a_changed_file_makes_its_page_stale(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "machine"
    folder.mkdir()
    case = {
        "case": "a bad head",
        "batch_size": 1,
        "speedup": 0.97,
        "end_to_end": 0.98,
        "tasks": {"code": {"end_to_end": 1.02}},
        "off_share": 0.9,
    }
    file = folder / "2026-11-26-robustness.json"
    file.write_text(
        json.dumps(
            {"provenance": {"command": "python x.py", "commit": "abc"}, "robustness": [case]}
        )
    )
    assert main(["results", "--folder", str(tmp_path)], LAB) == 0
    text = (folder / "README.md").read_text()
    assert "| a bad head | queue | 1 | **0.97** | **0.98** | 1.02 | – | 90 % |" in text
    assert main(["results", "--folder", str(tmp_path), "--check"], LAB) == 0
    file.write_text(json.dumps({"robustness": [{**case, "speedup": 1.5}]}))
    assert main(["results", "--folder", str(tmp_path), "--check"], LAB) == 2
    assert "not up to date" in capsys.readouterr().err
