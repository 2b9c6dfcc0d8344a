"""The laboratory's page: its parts beside those of `smart bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from smart_decoding.bench.sections import SLOWER
from smart_decoding.cli import main as cli
from smart_lab.__main__ import LAB
from smart_lab.page import page
from smart_lab.results import LabResults

RUNS = [
    {"policy": policy, "batch_size": 1, "task": "all", "speedup": speedup, "temperature": 0.0}
    for policy, speedup in (("off", 1.0), ("smart", 1.2))
]


def run_of(
    policy: str, batch: int, task: str, speedup: float, low: float, high: float
) -> dict[str, Any]:
    ratios = {"speedup": speedup, "speedup_low": low, "speedup_high": high, "identical": True}
    return {"policy": policy, "batch_size": batch, "task": task, **ratios}


def text_of(element: ElementTree.Element) -> str:
    return " ".join(" ".join(element.itertext()).split())


def section(document: ElementTree.Element, key: str) -> ElementTree.Element:
    return next(s for s in document.iter("section") if s.get("id") == key)


def test_the_further_parts_have_their_sections() -> None:
    ratios = {"speedup": 0.7, "speedup_low": 0.6, "speedup_high": 0.8, "plain_speedup": 1.5}
    peers = [
        {
            "name": "other",
            "version": "2",
            "precision": "Q4",
            "runs": [{"batch_size": 1, "tokens_per_s": 9, **ratios}],
        },
        {"name": "absent", "runs": [], "error": "pip could not install it"},
    ]
    data = {
        "runs": RUNS,
        "peers": peers,
        "suite_runs": [run_of("smart(method=union)", 1, "edit", 2.3, 1.4, 4.1)],
        "variant_runs": [run_of("smart(variant=all_levels)", 4, "all", 0.8, 0.7, 0.9)],
    }
    document = ElementTree.fromstring(page(LabResults.from_dict(data)))
    other = section(document, "peers")
    assert "other is faster than ours at batch 1: 0.70 (0.60–0.80)" in text_of(other)
    assert "absent: pip could not install it" in text_of(other)
    assert [c.text for c in other.iter("td") if c.get("class") == SLOWER] == ["0.70 (0.60–0.80)"]
    assert "edit 2.30 (1.40–4.10)" in text_of(section(document, "suites"))
    assert "all_levels 4 0.80 (0.70–0.90)" in text_of(section(document, "variants"))


def test_parts_of_several_files_make_one_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text(
        json.dumps({"runs": RUNS, "provenance": {"command": "smart bench <a&b>"}})
    )
    for name in ("b", "c"):
        peer = {"name": name, "version": "1", "precision": "bf16", "runs": []}
        other = {
            "runs": [],
            "peers": [peer],
            "provenance": {"command": f"smart_lab bench --peers {name}"},
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(other))
    files = [str(tmp_path / f"{name}.json") for name in "bac"]
    assert cli.main(["report", *files, "--html", str(tmp_path / "r.html")], LAB) == 0
    read = LabResults.read(*map(Path, files))
    assert [peer["name"] for peer in read.peers] == ["b", "c"]
    assert len(read.runs) == len(RUNS)
    document = ElementTree.fromstring((tmp_path / "r.html").read_text())
    told = text_of(section(document, "origin"))
    assert "--peers b" in told
    assert "smart bench <a&b>" in told
