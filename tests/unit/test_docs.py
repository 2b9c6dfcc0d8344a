"""The documentation: links lead somewhere, pages are in the site, modules that it names exist.

`make docs` builds the site strictly; this needs no MkDocs.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from smart_decoding.cli.demo import PROMPTS
from smart_decoding.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]
if not (ROOT / "docs" / "index.md").is_file():
    pytest.skip("the docs are not in the source distribution", allow_module_level=True)
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
LINK = re.compile(r"\]\(([^)\s]+)\)")
MODULE = re.compile(r"`((?:core|engine|models|drafters|integrations|server|kernels)/[\w/]+\.py)`")


def anchors(page: Path) -> set[str]:
    """As GitHub and MkDocs make them of headings."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", t).strip().lower()) for t in titles}


def broken_links(page: Path) -> Iterator[str]:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.is_file() or (anchor and anchor not in anchors(target)):
            yield link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert list(broken_links(page)) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One, two\n[a](#one-two) [b](#three) [c](nowhere.md) [d](https://example.org)\n"
    )
    assert list(broken_links(page)) == ["#three", "nowhere.md"]


def test_every_page_has_its_place_in_the_site() -> None:
    named = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert pages <= named
    assert {name for name in named if not name.startswith("repo/")} <= pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_modules_that_are_named_exist(page: Path) -> None:
    if page.name in ("LOG.md", "CHANGELOG.md"):
        pytest.skip("history names what there was")
    source = ROOT / "src" / "smart_decoding"
    named = MODULE.findall(page.read_text(encoding="utf-8"))
    assert [name for name in named if not (source / name).is_file()] == []


def test_the_sources_name_pages_that_exist() -> None:
    """Error messages and docstrings send readers to docs/."""
    folders = [ROOT / "src", ROOT / "benchmarks" / "smart_lab", ROOT / "tools"]
    named = {
        name
        for folder in folders
        for path in folder.rglob("*.py")
        for name in re.findall(r"\bdocs/[\w/-]+\.(?:md|json)", path.read_text(encoding="utf-8"))
    }
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_the_lines_of_errors_are_those_of_the_sources() -> None:
    """docs/troubleshooting.md quotes them; … stands for what varies."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[^|]*) \| [^|]* \|$", text, re.MULTILINE)
    quoted = [line for row in rows for line in re.findall(r"`(.*?)`", row)]
    assert len(quoted) > 20
    source = "\n".join(_texts(ROOT / "src"))
    pieces = {line: max(line.split("…"), key=len).rstrip(" :") for line in quoted}
    assert [line for line, piece in pieces.items() if piece not in source] == []


def _texts(folder: Path) -> Iterator[str]:
    """All string constants, and those within f-strings."""
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 105


def test_the_recording_is_of_todays_demo() -> None:
    """docs/demo.svg, which tools/record_demo.py writes."""
    path = ROOT / "docs" / "demo.svg"
    assert path.stat().st_size <= 200_000
    text = " ".join(ElementTree.parse(path).getroot().itertext())
    assert all(f"> {prompt}" in text for prompt in PROMPTS)
    assert "identical output: yes" in text


def test_entries_of_the_log_have_dates_newest_first() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "LOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    dates = [re.fullmatch(r"(\d{4}-\d\d-\d\d): \S.*", heading) for heading in headings]
    assert all(dates), [h for h, date in zip(headings, dates, strict=True) if not date]
    assert sorted(headings, key=lambda h: h[:10], reverse=True) == headings


GGUF_RUN = ROOT / "benchmarks" / "results" / "zen5" / "2026-12-02-gguf.json"


def readme_and_runs() -> tuple[str, dict[int, Any]]:
    """The README, and the run that it shows, by requests at once."""
    runs = {run["slots"]: run for run in json.loads(GGUF_RUN.read_text(encoding="utf-8"))["runs"]}
    return (ROOT / "README.md").read_text(encoding="utf-8"), runs


def test_the_readme_table_of_a_gguf_file_is_in_its_file() -> None:
    """Tokens per second, prompts included: each rival's best way; ours plainly, and `smart` with
    the model's own head."""
    readme, runs = readme_and_runs()
    lines = re.findall(r"^\| (\d+) at once \|(.*)\|$", readme, re.MULTILINE)
    assert [int(slots) for slots, _ in lines] == list(runs)
    for slots, line in lines:
        rates = {each["name"]: each["overall"][0] for each in runs[int(slots)]["contestants"]}
        engines = ("llama.cpp ", "ik_llama.cpp ", "OpenVINO ", "auto plain", "auto smart union")
        expected = [max(rates[name] for name in rates if name.startswith(who)) for who in engines]
        cells = [cell.strip().strip("*") for cell in line.split("|")]
        assert cells == [f"{rate:.1f}" for rate in expected]
        assert line.count("**") == 2
        assert max(cells, key=float) in line.split("**")[1]


def test_the_readme_tells_drafts_from_kernels_as_the_file_does() -> None:
    readme, runs = readme_and_runs()
    gain, over_llama_cpp, same = {}, {}, []
    for slots, run in runs.items():
        found = {each["name"]: each for each in run["contestants"]}
        theirs = [each for name, each in found.items() if name.startswith("llama.cpp ")]
        plain = found["auto plain"]["overall"][0]
        gain[slots] = found["auto smart union"]["overall"][0] / plain
        over_llama_cpp[slots] = plain / max(each["overall"][0] for each in theirs)
        same += [each["same"] for each in theirs]
        kinds = [run["by_task"][name] for name in ("auto smart union", "auto plain")]
        ratios = [kinds[0][kind] / kinds[1][kind] for kind in ("code", "maths", "general")]
        cells = [f"**{x:.2f}**" if x < 1 else f"{x:.2f}" for x in (*ratios, gain[slots])]
        assert f"| {slots} at a time | {' | '.join(cells)} |" in readme
    text = " ".join(readme.split())
    assert f"with drafts SMART is {gain[1]:.2f} times as fast as without" in text
    assert f"Without drafts it is {over_llama_cpp[1]:.2f} times as fast as llama.cpp" in text
    assert f"drafts bring {100 * (gain[8] - 1):.0f} %" in text
    assert f"SMART is {over_llama_cpp[8]:.1f} times as fast as llama.cpp" in text
    assert f"for {100 * min(same):.0f} to {100 * max(same):.0f} % of their length" in text


def test_the_ratios_by_cpu_are_in_the_files_that_they_name() -> None:
    """docs/will-it-help.md: with drafts over plain decoding, bold below 1."""
    text = (ROOT / "docs" / "will-it-help.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]* \| ((?:[^|]*\| ){5})(`\w[^|]*\.json`) \|$", text, re.MULTILINE)
    assert len(rows) == 9
    for cells, files in rows:
        found: dict[int, float] = {}
        for name in re.findall(r"`(.*?)`", files):
            found = _ratios(ROOT / "benchmarks" / "results" / name) | found
        for requests, cell in zip((1, 4, 8, 16, 32), cells.split("|"), strict=False):
            if cell.strip() != "–":
                value = float(cell.strip(" *"))
                assert value == pytest.approx(found[requests], abs=0.006)
                assert ("*" in cell) == (value < 1)


def _ratios(path: Path) -> dict[int, float]:
    """Requests at once -> speed of the default way over plain decoding, prompts included where the
    file has that."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if "robustness" in content:
        good = [c for c in content["robustness"] if c["case"] == "the shipped head"]
        order = sorted(good, key=lambda case: case["arrivals"])  # a closed batch, then a queue
        return {case["batch_size"]: case["end_to_end"] for case in order}
    if "contestants" in content["runs"][0]:
        rates = {
            run["slots"]: {each["name"]: each["overall"][0] for each in run["contestants"]}
            for run in content["runs"]
        }
        return {n: of["auto smart union"] / of["auto plain"] for n, of in rates.items()}
    smart = [r for r in content["runs"] if (r["policy"], r["task"]) == ("smart", "all")]
    return {run["batch_size"]: run["speedup"] for run in smart}


def test_the_reference_is_of_use_without_the_site() -> None:
    """A code host shows neither --help nor docstrings: tables name all commands, classes and
    functions, with links to their sources."""
    folder = ROOT / "docs" / "reference"
    page = (folder / "commands.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `smart (\w+)` \| (.*) \| \[`cli/(\w+)\.py`\]", page, re.MULTILINE)
    assert [(name, (what, f"smart_decoding.cli.{module}")) for name, what, module in rows] == [
        *COMMANDS.items()
    ]
    page = (folder / "python.md").read_text(encoding="utf-8")
    table, _, _ = page.partition(":::")
    public = r"::: smart_decoding\.([\w.]+)\.([A-Z]\w+|make_policy|accept)$"
    for module, name in re.findall(public, page, re.MULTILINE):
        (row,) = re.findall(rf"^\| [^|]*`{name}`.*$", table, re.MULTILINE)
        assert any(f"{module.replace('.', '/')}{end}" in row for end in (".py", "/__init__.py"))
