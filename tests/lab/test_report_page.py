"""The report from a small fixed result: it shows what it should, is well formed, needs nothing from
outside."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from measured import FIXED_LONG, ODD, changed, results, run_of, section, text_of

from smart_decoding.bench.sections import FASTER, SLOWER, UNDECIDED
from smart_decoding.cli import main as cli
from smart_decoding.errors import ConfigError
from smart_lab import plots
from smart_lab.__main__ import LAB
from smart_lab.figures import figures
from smart_lab.options import LabOptions, command_of
from smart_lab.page import page, verdict
from smart_lab.results import LabResults


@pytest.fixture(scope="module")
def source() -> str:
    return page(LabResults.from_dict(results()))


@pytest.fixture(scope="module")
def document(source: str) -> ElementTree.Element:
    return ElementTree.fromstring(source)


def test_the_page_is_well_formed_and_needs_nothing_from_outside(
    document: ElementTree.Element, source: str
) -> None:
    assert source.startswith("<!DOCTYPE html>")
    assert not re.search(r"https?:|//[a-z]|url\((?!#)|@import", source)
    assert not {"script", "link", "img", "iframe", "object"} & {e.tag for e in document.iter()}
    assert not [
        e for e in document.iter() for name in e.attrib if name == "src" or name.startswith("on")
    ]
    assert all(e.get("href", "#").startswith("#") for e in document.iter())
    assert "prefers-color-scheme:dark" in source
    assert 'name="viewport"' in source


def test_the_figure_is_drawn(document: ElementTree.Element) -> None:
    svgs = section(document, "speedup").iter("svg")
    assert len([svg for svg in svgs if svg.get("role") == "img"]) == 1


def test_drawings_follow_the_page_and_do_not_share_ids(
    document: ElementTree.Element, source: str
) -> None:
    ids = [e.get("id") for s in document.iter("svg") for e in s.iter() if e.get("id")]
    assert len(ids) == len(set(ids)) > 10
    assert "currentColor" in source
    assert plots.INK not in source
    assert set(re.findall(r"url\(#([^)]*)\)", source)) <= set(ids)


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


def test_a_warning_stands_on_top() -> None:
    slow = {**results(), "provenance": {"plain_torch": "intermediate size 47 is odd"}}
    told = "plain torch, not the CPU kernels: intermediate size 47 is odd"
    assert f'<p class="warn">{told}</p>' in page(LabResults.from_dict(slow))


def test_losses_are_listed_and_who_beats_smart(document: ElementTree.Element) -> None:
    lines = [text_of(item) for item in section(document, "losses").iter("li")]
    assert lines == [
        "eagle2 5/10/60, batch 4: 0.62× (0.58–0.66), slower",
        "smart, batch 4: 0.99× (0.90–1.07), not decided",
        "batch 1: eagle2 5/10/60 has 1.31×, more than smart's 1.25×",
    ]
    slow = [
        text_of(cell)
        for cell in section(document, "tasks").iter("td")
        if cell.get("class") == SLOWER
    ]
    assert slow == ["0.62 (0.58–0.66)"] * 2
    assert f"eagle2 5/10/60 = {FIXED_LONG}" in text_of(section(document, "tasks"))
    assert "Partial: the time limit" in text_of(document)


def test_smart_stands_beside_the_best_of_each_other_policy(document: ElementTree.Element) -> None:
    (row,) = document.findall(".//section[@id='over']//tbody/tr")
    assert "0.95 (0.91–0.99)" in text_of(row)
    assert row.find(f"td[@class='{SLOWER}']") is not None


def test_a_task_that_is_slower_counts_though_the_policy_is_not() -> None:
    data = results()
    one = next(
        r for r in data["runs"] if (r["policy"], r["batch_size"], r["task"]) == ("smart", 1, "code")
    )
    one.update(speedup=0.9, speedup_low=0.85, speedup_high=0.95)
    document = ElementTree.fromstring(page(LabResults.from_dict(data)))
    assert "smart, batch 1, code alone: 0.90× (0.85–0.95), slower" in text_of(
        section(document, "losses")
    )


def test_machine_command_memory_and_noise_are_told(document: ElementTree.Element) -> None:
    origin = text_of(section(document, "origin"))
    assert "smart bench --policies <a&b>" in origin
    assert "cpu Some CPU" in origin
    assert "1.50 GiB resident, of the whole process" in origin
    assert "GPU" not in origin
    assert "batch 4: 1.010× (0.970 to 1.040)" in text_of(section(document, "noise"))


def test_verdicts_need_the_whole_interval() -> None:
    told = [
        verdict(run_of("smart", 1, "all", 1.2, *bounds))
        for bounds in ((1.1, 1.3), (0.9, 1.3), (0.0, None))
    ]
    assert told == [FASTER, UNDECIDED, UNDECIDED]
    assert verdict(run_of("smart", 1, "all", 0.8, 0.7, 0.9)) == SLOWER


@pytest.mark.parametrize("slow", [True, False])
def test_the_page_quotes_the_floor_where_plain_decoding_is_slow(slow: bool) -> None:
    floor = {"headline": "floor_speedup" if slow else "speedup", "plain_ms": 5.0, "floor_ms": 2.0}
    below = {"floor_speedup": 0.72, "floor_speedup_low": 0.68, "floor_speedup_high": 0.76}
    runs = [
        run_of("off", 4, "all", 1.0, 1.0, 1.0, **floor, **below),
        run_of("smart", 4, "all", 1.8, 1.7, 1.9, **floor, **below),
    ]
    assert verdict(runs[1]) == (SLOWER if slow else FASTER)
    html = page(LabResults.from_dict({**results(), "runs": runs}))
    quoted = 0.72 if slow else 1.8
    assert f"{quoted:.2f} – {quoted:.2f}×" in html
    assert ("Batch 4: plain decoding takes 5.0 ms a round" in html) == slow
    assert "over floor" in html


@pytest.mark.parametrize("change", ODD)
def test_odd_values_are_unknown_not_errors(change: dict[str, Any]) -> None:
    ElementTree.fromstring(page(LabResults.from_dict(changed(change))))


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
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "r.json"
    for words in (
        [str(source), "--html", str(tmp_path / "r.html")],  # no such results
        [str(source)],  # nothing to make
        [str(source), "--html", str(tmp_path / "none" / "r.html")],
        [str(source), "--plots", str(tmp_path / "none" / "plots")],
    ):
        assert cli.main(["report", *words], LAB) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("smart_lab: error: ")
        assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"-e '\.\[bench\]'"):
        plots.write_plots(figures(LabResults.from_dict(results())), tmp_path / "plots")
    document = ElementTree.fromstring(page(LabResults.from_dict(results())))
    assert "-e '.[bench]'" in text_of(section(document, "figures"))
    assert not list(document.iter("svg"))
    assert "0.62" in text_of(section(document, "losses"))
    assert "1.25" in text_of(section(document, "tasks"))
    monkeypatch.setattr("smart_lab.plots.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"-e '\.\[bench\]'"):
        LabOptions(plots=tmp_path / "plots")
    assert list(tmp_path.iterdir()) == []


def test_a_benchmark_can_draw_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, asked = results(), []
    for run in data["runs"]:  # what the table needs beside
        run.update(
            dict.fromkeys(
                ("end_to_end_speedup", "wasted_rows", "ttft_ms", "ttft_ratio", "tpot_ms"), 1.0
            )
        )
        run.update(
            dict.fromkeys(
                ("worst_tpot_ratio", "controller_share", "off_share", "rounds", "blocks"), 1.0
            )
        )
        run.update(looping_answers=0.0, looping_tokens=0.0)
    monkeypatch.setattr("smart_lab.bench.run", lambda options: asked.append(options) or data)
    target = tmp_path / "page.html"
    assert cli.main(["bench", "--policies", "smart", "--html", str(target)], LAB) == 0
    assert f"wrote {target}" in capsys.readouterr().out
    assert "0.62" in text_of(section(ElementTree.fromstring(target.read_text()), "losses"))
    assert command_of(asked[0]).endswith("--html page.html")
    assert cli.main(["bench", "--html", str(tmp_path)], LAB) == 2
    assert len(asked) == 1


TIMES = {"p50": 4.0, "p95": 9.0, "p99": 12.0}
LOAD = {
    "slots": 16,
    "capacity_requests_per_s": 11.5,
    "capacity_tokens_per_s": 1000.0,
    "runs": [
        {
            "policy": policy,
            "load": share,
            "requests_per_s": 3.0,
            "tokens_per_s": 300.0,
            "ttft_ms": TIMES,
            "tpot_ms": TIMES,
            "tpot_ratio": ratio,
            "identical": True,
        }
        for share in (0.3, 0.9)
        for policy, ratio in (("off", 1.0), ("smart", 0.8))
    ],
}


def test_the_further_parts_have_their_sections() -> None:
    sampled = [{**run, "temperature": 0.8} for run in results()["runs"]]
    data = {**results(), "load": LOAD, "sampled_runs": sampled, "limits": {"gb_per_s": 25.0}}
    document = ElementTree.fromstring(page(LabResults.from_dict(data)))
    assert len([s for s in section(document, "load").iter("svg") if s.get("role") == "img"]) == 3
    table = text_of(section(document, "load-table"))
    assert "plain decoding 30 %" in table
    assert "smart 90 %" in table
    assert "11.50 requests/s" in table
    assert "At temperature 0.8" in text_of(section(document, "sampled"))
    assert "best of reading memory 25 GB/s" in text_of(section(document, "origin"))
    alone = {"runs": [], "load": LOAD, "provenance": {"command": "smart bench --load 0.3"}}
    only = ElementTree.fromstring(page(LabResults.from_dict(alone)))
    assert {s.get("id") for s in only.iter("section")} == {"load", "load-table", "origin"}
    other = {
        **LOAD,
        "runs": [
            {**run, "policy": "chain" if run["policy"] == "smart" else "off"}
            for run in LOAD["runs"]
        ],
    }
    page(LabResults.from_dict({**results(), "load": other}))  # a policy that runs under load only


def test_parts_of_several_files_make_one_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text(json.dumps(results()))
    other = {"runs": [], "load": LOAD, "provenance": {"command": "smart bench --load 0.3"}}
    (tmp_path / "b.json").write_text(json.dumps(other))
    files = [str(tmp_path / f"{name}.json") for name in "ba"]
    assert cli.main(["report", *files, "--html", str(tmp_path / "r.html")], LAB) == 0
    read = LabResults.read(*map(Path, files))
    assert read.load["slots"] == 16
    assert len(read.runs) == len(results()["runs"])
    document = ElementTree.fromstring((tmp_path / "r.html").read_text())
    told = text_of(section(document, "origin"))
    assert "--load 0.3" in told
    assert "--policies <a&b>" in told
    assert "Some CPU" in told
