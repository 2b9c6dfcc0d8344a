"""`report` draws what a small fixed result says, and says what is missing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from measured import ODD, changed, results

from smart_decoding.cli import main as cli
from smart_decoding.errors import ConfigError
from smart_lab import plots
from smart_lab.__main__ import LAB
from smart_lab.figures import figures
from smart_lab.plots import NEUTRAL
from smart_lab.results import LabResults


def test_speedups_have_bands_and_the_line_at_one() -> None:
    figure = figures(LabResults.from_dict(results()))[0]
    (axes,) = plots.drawn(figure).axes
    policies = [line for line in axes.lines if line.get_linestyle() == "-"]
    (level,) = [line for line in axes.lines if line not in policies]
    assert len(policies) == 2
    assert list(level.get_ydata()) == [1.0, 1.0]
    bands = [
        each for each in axes.collections if type(each).__name__ == "FillBetweenPolyCollection"
    ]
    marks = [each for each in axes.collections if type(each).__name__ == "PathCollection"]
    assert len(bands) == 2
    assert sum(len(each.get_offsets()) for each in marks) == 4
    (below,) = axes.patches
    assert below.get_y() + below.get_height() == pytest.approx(1.0)
    ends = {
        (p.x, p.y, p.y_range)
        for series in figure.panels[0].series
        for p in series.points
        if p.x == 4
    }
    assert ends == {(4, 0.62, (0.58, 0.66)), (4, 0.99, (0.9, 1.07))}


def test_operating_points_lie_where_they_were_measured() -> None:
    figure = figures(LabResults.from_dict(results()))[1]
    first = figure.panels[0]
    profile, plain, smart, _ = first.series
    assert [p.y for p in profile.points if p.x in (1, 4, 16)] == pytest.approx(
        [10.0, 12.0]
    )  # 16 is far off
    assert (plain.colour, smart.colour, smart.name) == (NEUTRAL, 0, "smart")
    (point,) = smart.points
    assert (point.x, point.y) == (4.0, 13.0)
    assert point.x_range == (1.0, 9.0)  # of 15 rounds, 2 had one row and 3 had nine
    data = results()
    for run in data["runs"]:
        del run["verify_ms"]
    assert figures(LabResults.from_dict(data))[1].panels[0].series[2].points[0].y == pytest.approx(
        12.0
    )  # by the profile


def test_reliability_before_and_after() -> None:
    (panel,) = figures(LabResults.from_dict(results()))[3].panels
    before, after = panel.series
    assert panel.title == "smart"
    assert panel.diagonal
    assert "off by 5.5 %" in before.name
    assert "off by 0.0 %" in after.name
    assert [(p.x, p.y) for p in after.points] == [
        (pytest.approx(0.05),) * 2,
        (pytest.approx(0.55),) * 2,
    ]


def test_plots_are_pictures_and_missing_fields_are_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    source, folder = tmp_path / "r.json", tmp_path / "plots"
    source.write_text(json.dumps(results()))
    names = ["speedup.png", "cost.png", "tokens.png", "reliability.png"]
    for _ in range(2):  # again, into the same folder
        assert cli.main(["report", str(source), "--plots", str(folder)], LAB) == 0
        told = capsys.readouterr().out.splitlines()
        assert told == [f"wrote {folder / name}" for name in names]
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in names)
    keep = ("policy", "batch_size", "task", "speedup")
    bare = {"runs": [{name: run[name] for name in keep} for run in results()["runs"]]}
    source.write_text(json.dumps(bare))
    assert cli.main(["report", str(source), "--plots", str(folder)], LAB) == 0
    out = capsys.readouterr().out.splitlines()
    missing = ["not drawn, cost", "not drawn, tokens", "not drawn, reliability"]
    assert [line.split(":")[0] for line in out[1:]] == missing


@pytest.mark.parametrize("change", ODD)
def test_odd_values_are_unknown_not_errors(change: dict[str, Any]) -> None:
    for figure in figures(LabResults.from_dict(changed(change))):
        if figure.panels:
            plots.drawn(figure)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "has no 'runs'"),
        ('{"runs": []}', "has no 'runs'"),
        ('{"runs": [3]}', "must be an object"),
        ('{"runs": [{"policy": "off"}]}', "no usable 'task'"),
        ('{"runs": [{"policy": "off", "task": "all", "batch_size": 1}]}', "no 'speedup'"),
        (
            '{"runs": [{"policy": "off", "task": "code", "batch_size": 1, "speedup": 1}]}',
            "no runs of the task 'all'",
        ),
    ],
)
def test_what_is_no_result_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        LabResults.read(tmp_path / "r.json")


def test_the_command_refuses_what_it_cannot_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "r.json"
    for words in (
        [str(source), "--plots", str(tmp_path / "plots")],  # no such results
        [str(source), "--plots", str(tmp_path / "none" / "plots")],
    ):
        assert cli.main(["report", *words], LAB) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("smart_lab: error: ")
        assert err.count("\n") == 1
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    assert cli.main(["report", str(source), "--plots", str(tmp_path / "plots")], LAB) == 2
    assert "-e '.[bench]'" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"-e '\.\[bench\]'"):
        plots.write_plots(figures(LabResults.from_dict(results())), tmp_path / "plots")
    assert list(tmp_path.iterdir()) == []
