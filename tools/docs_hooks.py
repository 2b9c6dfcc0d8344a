"""What `mkdocs build` adds to docs/: files outside it that pages link to, and the commands' --help.

A link out of docs/, such as ../benchmarks/results/zen4/README.md, works in the repository. For the
site the file is taken along as repo/benchmarks/results/zen4/README.md, with what it links to.

Needed by `make docs` (mkdocs.yml).
"""

from __future__ import annotations

import contextlib
import io
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = "repo/"  # where files from outside docs/ are in the site
ALL_HELP = "<!-- every command's --help -->"
EXAMPLE = "<!-- examples/your_engine.py -->"
LINK = re.compile(r"(?<=\]\()([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files outside docs/ that pages link to, and those that they link to."""
    waiting = [ROOT / "docs" / file.src_uri for file in files.documentation_pages()]
    while waiting:
        page = waiting.pop()
        for path in _linked(page):
            uri = _uri(path)
            if uri.startswith(OUTSIDE) and files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
                if path.endswith(".md"):
                    waiting.append(ROOT / path)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Points links at where the files are in the site; fills in what is generated."""
    here = page.file.src_uri
    source = here.removeprefix(OUTSIDE) if here.startswith(OUTSIDE) else f"docs/{here}"

    def moved(link: re.Match[str]) -> str:
        if not _is_local(link[1]):
            return link[1]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[1]))
        return posixpath.relpath(_uri(path), posixpath.dirname(here) or ".")

    text = LINK.sub(moved, markdown)
    if ALL_HELP in text:
        text = text.replace(ALL_HELP, "\n".join(_commands()))
    if EXAMPLE in text:
        example = (ROOT / "examples" / "your_engine.py").read_text(encoding="utf-8")
        text = text.replace(EXAMPLE, f"```python\n{example}```")
    return text


def _linked(page: Path) -> Iterator[str]:
    """Files that a page links to, relative to the repository."""
    folder = page.parent.relative_to(ROOT).as_posix()
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if not _is_local(link):
            continue
        path = posixpath.normpath(posixpath.join(folder, link))
        if not (ROOT / path).is_file():
            raise PluginError(f"{page.relative_to(ROOT)} links to {link}, which is no file")
        yield path


def _is_local(link: str) -> bool:
    return "://" not in link and not link.startswith(("mailto:", "/"))


def _uri(path: str) -> str:
    return path.removeprefix("docs/") if path.startswith("docs/") else OUTSIDE + path


def _commands() -> Iterator[str]:
    """A section for each command, as its --help prints it."""
    from smart_decoding.cli.main import COMMANDS, build_parser

    os.environ |= {"COLUMNS": "100", "NO_COLOR": "1"}
    for name, (summary, _module) in COMMANDS.items():
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            build_parser(name).parse_args([name, "--help"])
        yield f"\n## smart {name}\n\n{summary[0].upper()}{summary[1:]}.\n"
        yield f"```text\n{printed.getvalue()}```\n"
