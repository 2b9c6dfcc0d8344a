"""Every example of docs/ runs, here with a tiny model, or stands below with the reason why not.

Python blocks of a page run one after another, in one namespace. Of shell blocks each command is
run, or at least read by its own parser.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.append(str(Path(__file__).parents[1] / "server"))

from serving import NAME, Running, save_tiny_model, serving

import smart_decoding
from smart_decoding import AsyncLLM, EngineArgs
from smart_decoding.cli.main import build_parser, main
from smart_decoding.llm import LLM
from smart_decoding.profiling import measure

ROOT = Path(__file__).parents[2]
if not (ROOT / "docs" / "index.md").is_file():
    pytest.skip("the docs are not in the source distribution", allow_module_level=True)
LAB = pytest.importorskip("smart_lab.__main__").LAB
PAGES = sorted((ROOT / "docs").rglob("*.md"))
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"(?:^|\s+)# .*$", re.MULTILINE)
ASSIGNMENT = re.compile(r"[A-Z]\w*=")
MODELS = re.compile(r"smollm2-135m|qwen2\.5-coder-1\.5b|model\.gguf|HuggingFaceTB/[\w.-]+")

# Python that does not run here: what its block contains, and why.
PYTHON_NOT_RUN = {
    "Qwen2-VL": "a model for images: tests/parity/test_vision_engine.py runs tiny ones",
}
# Commands of `smart` that are only read by its parser, and why.
READ = {
    "serve": "does not end; the examples with curl and OpenAI's client ask a server",
    "bench": "fetches its prompts, and takes minutes: tests/unit/bench",
    "train": "takes hours: tests/unit/training",
    "export": "needs a head: tests/parity/test_head_export.py",
    "tune": "needs another engine: tests/integrations/test_tune_*.py",
    "models pull": "fetches: tests/unit/cli/test_models.py",
    "models rm": "removes: tests/unit/cli/test_models.py",
    "run --draft": "needs a head that was trained for the model",
    "run --image": "needs a model for images",
}
# Other programs, and why they are not run.
OTHERS = {
    "apt-get": "the system's",
    ".": "the shell's",
    "export": "the shell's",
    "cd": "the shell's",
    "for": "the shell's",
    "done": "the shell's",
    "git": "its output is piped: a file stands for it",
    "cmake": "builds llama.cpp",
    "ninja": "builds llama.cpp",
    "llama-server": "another engine",
    "vllm": "another engine",
    "sglang": "another engine",
}


def blocks(page: Path, *languages: str) -> list[str]:
    return [body for name, body in FENCE.findall(page.read_text("utf-8")) if name in languages]


def with_blocks(*languages: str) -> Any:
    found = [page for page in PAGES if blocks(page, *languages)]
    return pytest.mark.parametrize("page", found, ids=lambda page: page.stem)


def commands(block: str) -> Iterator[tuple[list[str], bool]]:
    """The words of each command, and whether another one's output is piped into it."""
    text = COMMENT.sub("", block).replace("\\\n", " ")
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";|\n")
    lexer.whitespace = " \t"
    lexer.whitespace_split = True
    lexer.commenters = ""
    words: list[str] = []
    piped = False
    for token in [*lexer, "\n"]:
        if token.strip(";|\n"):
            words.append(token)
            continue
        while words and (words[0] == "do" or ASSIGNMENT.match(words[0])):
            words = words[1:]
        if words:
            yield words, piped
        words, piped = [], token == "|"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache and folder; costs are measured in a tenth of a second."""
    monkeypatch.setenv("SMART_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(measure, "SECONDS", 0.1)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Running]:
    with serving(lambda: LLM(folder, max_model_len=1024, max_num_seqs=4)) as server:
        yield server


@with_blocks("python")
def test_python_runs(
    page: Path, folder: Path, running: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = {field.name for field in dataclasses.fields(EngineArgs)}

    def tiny(model: str, speculative_config: Any = None, **given: Any) -> LLM:
        assert given.keys() <= options
        drafts = {"method": "ngram", "min_n": 1}
        if isinstance(speculative_config, dict) and "model" not in speculative_config:
            drafts |= speculative_config
        return LLM(folder, speculative_config=drafts, max_model_len=1024)

    if page.stem == "your-policy":  # its first block is a file
        (tmp_path / "narrow.py").write_text(blocks(page, "python")[0], encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "narrow", raising=False)
    monkeypatch.setattr(smart_decoding, "LLM", tiny, raising=False)
    monkeypatch.setattr(smart_decoding, "AsyncLLM", lambda m: AsyncLLM(tiny(m)), raising=False)
    names: dict[str, Any] = {"__name__": "example"}
    for block in blocks(page, "python"):
        if any(text in block for text in PYTHON_NOT_RUN):
            compile(block, str(page), "exec")
            continue
        code = block.replace("http://localhost:8000", running.url)
        model = NAME if "OpenAI(" in code or "client." in code else str(folder)
        exec(compile(MODELS.sub(model, code), str(page), "exec"), names)


@with_blocks("sh")
def test_commands_run(
    page: Path,
    folder: Path,
    running: Running,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("prompt.txt").write_text("Why?\n")
    Path("prompts.txt").write_text("Why?\nHow?\n")
    for block in blocks(page, "sh"):
        for words, piped in commands(block):
            program, *rest = words
            if program == "smart":
                source = "prompt.txt" if piped or rest[0] == "chat" else os.devnull
                with open(source) as stdin:
                    monkeypatch.setattr(sys, "stdin", stdin)
                    smart(rest, folder, capsys)
            elif program == "curl":
                asked(words, running)
            elif program == "make":
                assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
            elif program == "pip":
                check_extras(rest)
            elif program == "cp":
                assert (ROOT / rest[0]).is_file()
            elif program == "python":
                python(rest)
            else:
                assert program in OTHERS


def smart(words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a command with the tiny model, or let its parser read it."""
    command = words[0]
    build_parser(command).parse_args(words)
    kinds = {command, " ".join(words[:2]), *(f"{command} {word}" for word in words[1:])}
    if kinds & READ.keys():
        return
    if command in ("run", "chat"):
        named = [str(folder) if MODELS.fullmatch(word) else word for word in words[1:]]
        given = [] if str(folder) in named else ["-m", str(folder)]
        words = [command, *named, *given, "-n", "4", "--seed", "0"]
    assert main(words) == 0
    assert capsys.readouterr().out


def asked(words: list[str], running: Running) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl")
    there = [word.replace("localhost:8000", running.url) for word in words]
    line = [MODELS.sub(NAME, word) for word in there]
    done = subprocess.run([*line, "-sS"], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert b'"choices"' in done.stdout


def check_extras(words: list[str]) -> None:
    """Of this package's extras those that exist are named."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in re.findall(r"\.\[(\w+)\]", " ".join(words)):
        assert extra in project["optional-dependencies"]


def python(words: list[str]) -> None:
    """A command of the laboratory is read by its parser; a file exists."""
    if words[0] != "-m":
        assert (ROOT / words[0]).is_file()
    elif words[1] == "smart_lab":
        build_parser(words[2], LAB).parse_args(words[2:])
    else:
        assert words[1].split(".")[0] in OTHERS


def test_the_editors_configuration_is_read() -> None:
    (text,) = blocks(ROOT / "docs" / "serving.md", "yaml")
    models = yaml.safe_load(text)["models"]
    assert {role for model in models for role in model["roles"]} >= {"chat", "autocomplete"}
    assert {model["apiBase"] for model in models} == {"http://localhost:8000/v1"}


def test_what_cannot_be_run_is_still_there() -> None:
    """No reason stands without its example."""
    code = "".join(block for page in PAGES for block in blocks(page, "python"))
    assert [text for text in PYTHON_NOT_RUN if text not in code] == []
    lines = [words for page in PAGES for b in blocks(page, "sh") for words, _ in commands(b)]
    shell = "\n".join(" ".join(words) for words in lines)
    for kind in READ:
        command, _, word = kind.partition(" ")
        assert re.search(rf"^smart {command}\b.*{word}", shell, re.MULTILINE), kind
    assert OTHERS.keys() <= {words[0] for words in lines} | {"sglang"}


def test_a_wrong_command_is_found(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        smart(["run", "--no-such-option", "hi"], folder, capsys)
    found = list(commands('A=1 git diff | smart run -x "a; b" \\\n  c  # not this'))
    assert found == [(["git", "diff"], False), (["smart", "run", "-x", "a; b", "c"], True)]
