"""The figures of rounds: costs, tokens and probabilities, from a small fixed result."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from measured import results, section, text_of

from smart_decoding.cli import main as cli
from smart_lab import plots
from smart_lab.__main__ import LAB
from smart_lab.figures import figures
from smart_lab.page import page
from smart_lab.panels import NEUTRAL
from smart_lab.results import LabResults


def test_every_figure_is_drawn() -> None:
    document = ElementTree.fromstring(page(LabResults.from_dict(results())))
    drawn = {
        key: len([s for s in section(document, key).iter("svg") if s.get("role") == "img"])
        for key in ("speedup", "cost", "tokens", "reliability")
    }
    assert drawn == {"speedup": 1, "cost": 2, "tokens": 1, "reliability": 1}  # cost: one per batch


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


def test_missing_fields_are_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = results()
    keep = ("policy", "batch_size", "task", "speedup")
    bare = {"runs": [{name: run[name] for name in keep} for run in data["runs"]]}
    source, target = tmp_path / "r.json", tmp_path / "r.html"
    source.write_text(json.dumps(bare))
    assert cli.main(["report", str(source), "--html", str(target)], LAB) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in out[1:]] == [
        "not drawn, cost",
        "not drawn, tokens",
        "not drawn, reliability",
    ]
    document = ElementTree.fromstring(target.read_text())
    assert "hold no cost curve" in text_of(section(document, "cost"))
    assert "The noise was not measured" in text_of(section(document, "noise"))
    assert "0.62" in text_of(section(document, "losses"))


def test_plots_are_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = figures(LabResults.from_dict(results()))
    paths = plots.write_plots(found, tmp_path / "plots")
    assert [p.name for p in paths] == ["speedup.png", "cost.png", "tokens.png", "reliability.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in paths)
    assert plots.write_plots(found, tmp_path / "plots") == paths  # again, into the same folder
