"""`python -m smart_lab results`: one Markdown page a machine, made from the JSON files beside it,
and a picture of some of them.

benchmarks/results/MACHINE/DATE-KIND.json is one run: what `bench`, `robustness`, `busy`,
`vllm` or `transformers` wrote. A new run of a kind replaces the one before.

Needed by tests/lab/test_results.py: every page of benchmarks/results is of its JSON files, as is
docs/images/speeds.svg.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smart_decoding.errors import ConfigError
from smart_decoding.files import write_text
from smart_lab import bars, tables
from smart_lab.results import Results, mapping
from smart_lab.sections import Cell, RatioCell, Section, text_of

RESULTS = Path(__file__).parents[1] / "results"
PICTURE = Path(__file__).parents[2] / "docs" / "images" / "speeds.svg"
MADE = """\
Made by `python -m smart_lab results` from the JSON files of this folder; do not edit.

A command ran at the commit below it, and its options and versions are of that commit. Some options
are gone since: `git checkout COMMIT` brings them back."""
LAST = "6f6a75aa"  # a commit with all commands of older runs
TOLD = {"simulated": ": nothing here was measured"}
# Kind -> title, in the order of the page.
KINDS = {
    "bench": "Policies",
    "gguf": "A GGUF file here and in llama.cpp",
    "gguf-huge-pages": "The same with huge pages for llama.cpp, and a head",
    "gguf-avx2": "The same with AVX2 alone, on both sides",
    "gguf-avx2-exact": "Exact products with AVX2 alone, on both sides",
    "gguf-avx-vnni": "The same with AVX2 and AVX-VNNI, on both sides",
    "gguf-queue": "The same with a queue, and in vLLM",
    "gguf-head": "The same with a head that was trained for it",
    "gguf-bench": "The same model, `smart bench`",
    "fair-comparison": "Rivals on the same native path",
    "fair-comparison-1.5b": "Rivals on the same native path, the 1.5B",
    "batch-16-32": "Large batches",
    "sampled": "Sampled",
    "robustness": "Never slower?",
    "robustness-1.5b": "Never slower? The 1.5B",
    "busy": "Beside busy processes",
    "busy-bench": "The same, `smart bench`",
    "peers": "Other engines",
    "vllm": "Inside vLLM",
    "transformers": "Inside transformers",
    "pictures": "Pictures",
    "pictures-fp32": "Pictures, fp32",
    "published": "Simulated from data sheets",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which pages, and whether they are only checked."""
    parser.add_argument(
        "--folder", type=Path, default=RESULTS, help="whose subfolders are machines"
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where a page is not up to date"
    )


def main(args: argparse.Namespace) -> int:
    """Write or check the pages and the picture. Raises ConfigError for a file that is no run."""
    stale = []
    folders = sorted(path for path in args.folder.iterdir() if path.is_dir())
    made = {folder / "README.md": page(folder) for folder in folders}
    if args.folder == RESULTS:
        made[PICTURE] = bars.drawn(RESULTS)
    for target, text in made.items():
        if target.exists() and target.read_text(encoding="utf-8") == text:
            continue
        stale.append(target)
        if not args.check:
            write_text(target, text)
            print(f"wrote {target}")
    if args.check and stale:
        raise ConfigError(
            f"not up to date: {', '.join(map(str, stale))}; run python -m smart_lab results"
        )
    return 0


def page(folder: Path) -> str:
    """Return the page of one machine."""
    files = sorted(folder.glob("*.json"), key=lambda path: list(KINDS).index(kind_of(path)))
    return (
        "\n\n".join(
            [
                f"# {folder.name}{TOLD.get(folder.name, ': what was measured')}",
                MADE,
                *(section(path) for path in files),
            ]
        )
        + "\n"
    )


def kind_of(path: Path) -> str:
    """Return the kind in the file's name. Raises ConfigError for another name."""
    kind = path.stem[len("2026-11-26-") :]
    if kind not in KINDS:
        raise ConfigError(f"{path} is not named DATE-KIND.json with a kind of: {', '.join(KINDS)}")
    return kind


def section(path: Path) -> str:
    """Return one run: its provenance, then its tables."""
    kept = path.with_suffix(".md")  # tables that no command measures any more
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        parts = tables_of(data)
        if kept.exists():
            title = f"Parts that are gone; commit {LAST} can measure them:"
            parts += [title, kept.read_text(encoding="utf-8").rstrip()]
        if not parts:
            raise ValueError("it has no part that pages show")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no run that a page can show: {error!r}") from error
    origin = mapping(data.get("provenance"))
    command = f"```sh\n{origin.get('command') or '# not recorded'}\n```"
    return "\n\n".join(
        [f"## {KINDS[kind_of(path)]}: [{path.name}]({path.name})", command, facts(origin), *parts]
    )


def facts(origin: Mapping[str, Any]) -> str:
    """Return date, commit, versions, hardware and weights, a line each."""
    hardware = mapping(origin.get("hardware"))
    rows = {
        "date": origin.get("time"),
        "commit": origin.get("commit"),
        "hardware": ", ".join(
            _as_text(name, value) for name, value in hardware.items() if value not in (None, "", [])
        ),
        "versions": ", ".join(
            f"{name} {value}" for name, value in mapping(origin.get("versions")).items()
        ),
        "weights": ", ".join(
            f"{name} {value}" for name, value in mapping(origin.get("weights")).items()
        ),
        "draft head": origin.get("head"),
    }
    return "\n".join(f"- {name}: {value or 'not recorded'}" for name, value in rows.items())


def tables_of(data: Mapping[str, Any]) -> list[str]:
    """Return every part of a run as a table under its title."""
    found: list[Section] = []
    if "llama_cpp" in data:
        found += tables.gguf(data)
    elif data.get("runs"):
        runs = Results.from_dict(data).runs
        found += [tables.by_batch(runs), tables.tuned(runs), tables.over(runs)]
    if data.get("robustness"):
        found.append(tables.robust(data["robustness"]))
    if data.get("busy"):
        found.append(tables.busy(data["busy"]))
    found += [tables.vllm(run) for run in data.get("vllm", ())]
    found += [tables.transformers(run) for run in data.get("transformers", ())]
    return [_shown(part) for part in found if part.rows or part.lines]


def _shown(part: Section) -> str:
    text = as_markdown(part)
    return f"### {part.title}\n\n{text}" if part.title else text


def _as_text(name: str, value: Any) -> str:
    shown = " ".join(map(str, value)) if isinstance(value, list) else value
    return f"{name} {shown}"


def as_markdown(section: Section) -> str:
    """Table, list and captions, a blank line between them; speedups below 1 are bold."""
    parts = []
    if section.rows:
        rows = [_row([_markdown(cell) for cell in row]) for row in section.rows]
        parts.append("\n".join([_row(section.head), "|" + "---|" * len(section.head), *rows]))
    if section.lines:
        parts.append("\n".join(f"- {text_of(line)}" for line in section.lines))
    return "\n\n".join([*parts, *section.captions])


def _markdown(cell: Cell) -> str:
    if isinstance(cell, RatioCell) and cell.value < 0.995:
        return f"**{cell.value:.2f}**{cell.bounds}"
    return text_of(cell)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
