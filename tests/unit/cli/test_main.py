"""The command line: errors, exit codes, help, and the package's public names."""

from __future__ import annotations

import argparse
import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted import FakeLLM, fails
from terminal import SCRIPTED

import smart_decoding
from smart_decoding.cli import main as cli
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.errors import ConfigError, ModelError

SMART = [sys.executable, "-m", "smart_decoding.cli.main"]


def test_errors_are_one_line(fake: type[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    fake.failure = ModelError("no model 'x':\n  try y")
    assert cli.main(["run", "hi"]) == 2
    assert capsys.readouterr().err == "smart: error: no model 'x': try y\n"


@pytest.mark.parametrize("argv", [["--debug", "run", "hi"], ["run", "--debug", "hi"]])
def test_debug_shows_the_traceback(
    argv: list[str], fake: type[FakeLLM], capsys: pytest.CaptureFixture[str]
) -> None:
    fake.failure = ModelError("broken")
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("smart: error: broken\n")


def test_a_defect_is_reported_as_one(
    fake: type[FakeLLM], capsys: pytest.CaptureFixture[str]
) -> None:
    fake.failure = ZeroDivisionError("by zero")
    assert cli.main(["run", "hi"]) == 1
    assert "smart: error: ZeroDivisionError: by zero; this is a defect" in capsys.readouterr().err


def test_the_systems_errors_are_not_defects(
    fake: type[FakeLLM], capsys: pytest.CaptureFixture[str]
) -> None:
    fake.failure = OSError(errno.ENOSPC, "No space left on device", "cache/weights")
    assert cli.main(["run", "hi"]) == 2
    assert capsys.readouterr().err == "smart: error: cache/weights: No space left on device\n"


def test_a_full_disk_is_no_defect(fake: type[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    """Libraries in Rust put the system's error into their text."""
    fake.failure = RuntimeError("Error while serializing: No space left on device (os error 28)")
    assert cli.main(["run", "hi"]) == 2
    assert "No space left on device: make room there" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["run -f", "run --batch", "serve --config"])
def test_a_file_that_is_not_there_is_named_once(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = fails(capsys, *option.split(), "/nonexistent")
    assert said == "smart: error: /nonexistent: No such file or directory\n"


def test_interruption(fake: type[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    fake.failure = KeyboardInterrupt()
    assert cli.main(["run", "hi"]) == 130
    assert capsys.readouterr().err.strip() == "smart: interrupted"


def test_no_command_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    told = capsys.readouterr()
    assert all(f"\n    {name} " in told.out for name in cli.COMMANDS)
    assert told.err == ""


def test_an_unknown_command_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'bench'" in fails(capsys, "sing")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("generate", "run"),
        ("pull", "models pull"),
        ("serv", "serve"),
    ],
)
def test_what_was_meant_by_a_command(
    given: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = fails(capsys, given, "x")
    assert said.startswith(f"smart: error: no command '{given}'; did you mean 'smart {meant}'?")


def test_what_was_meant_by_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean list?" in fails(capsys, "models", "lst")
    assert "did you mean bf16?" in fails(capsys, "run", "hi", "--dtype", "bf61")


def smart(*argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(Path(smart_decoding.__file__).parents[1])}
    command = [sys.executable, *argv]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, **options)


def options_of(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from options_of(each)
        elif action.option_strings and action.help != argparse.SUPPRESS:
            yield action


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_tells_defaults(command: str) -> None:
    """Of every option that has one; those of `smart bench` and `serve` are None until they run."""
    (commands,) = (
        action
        for action in cli.build_parser(command)._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    for option in options_of(commands.choices[command]):
        assert option.help, option.option_strings
        default = option.default
        if default in (None, argparse.SUPPRESS, "", [], {}) or option.nargs == 0:
            continue
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        texts = (f"{shown:g}",) if isinstance(shown, float) else ()
        texts += (str(shown), json.dumps(default, default=str))
        assert any(text in option.help for text in texts), option.option_strings


def test_help_tells_the_defaults_of_bench(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "always runs (default: off,smart)" in said
    assert "requests at once (default: 1,4)" in said
    assert "unless they are given, policies off,smart,chain, batch-sizes 1,4,16, limit 8" in said


@pytest.mark.parametrize("command", [[], ["serve"], ["export"], ["train"]])
def test_help_imports_nothing_slow(command: list[str]) -> None:
    slow = {"torch", "numpy", "scipy", "tokenizers"} | ({"tqdm"} if not command else set())
    show = (
        "import sys; from smart_decoding.cli.main import main\n"
        f"try: main({[*command, '--help']})\nexcept SystemExit: pass\n"
        f"print(sorted({slow} & set(sys.modules)))"
    )
    done = smart("-c", show)
    assert done.returncode == 0
    assert done.stdout.endswith("[]\n")
    assert "usage: smart" in done.stdout


def test_loading_a_model_imports_nothing_slow_but_torch() -> None:
    slow = "{'gguf', 'httpx', 'huggingface_hub', 'matplotlib', 'scipy', 'transformers', 'yaml'}"
    done = smart("-c", f"import sys, smart_decoding.llm; print({slow} & set(sys.modules))")
    assert done.stdout == "set()\n"


def test_as_a_program() -> None:
    for module in ("smart_decoding", "smart_decoding.cli.main"):
        assert smart("-m", module, "--version").stdout == "smart 0.2.0\n"
    wrong = smart("-m", "smart_decoding.cli.main", "run", "--temperature", "9", "hi")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "smart: error: temperature=9.0 is not allowed: it must be in [0, 2]\n"


def test_a_closed_pipe_is_quiet() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    env = {**os.environ, "PYTHONPATH": str(Path(smart_decoding.__file__).parents[1])}
    command = [sys.executable, "-m", "smart_decoding.cli.main", "models"]
    done = subprocess.run(
        command, env=env, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


CLOSED = "smart: error: standard output is closed: >/dev/null discards what is printed\n"
NO_PROMPT = "smart: error: there is no prompt: give one, or -f FILE, or one through a pipe\n"


@pytest.mark.parametrize(
    ("closed", "command", "expected"),
    [
        (">&-", [*SMART, "models"], (2, "", CLOSED)),
        (">&-", [*SMART, "--help"], (2, "", CLOSED)),
        ("2>&-", [*SMART, "run", "--temperature", "9", "hi"], (2, "", "")),
        ("2>&-", SCRIPTED, (0, "Paris is the capital.\n", "")),
        ("<&-", [*SMART, "run"], (2, "", NO_PROMPT)),
    ],
)
def test_a_closed_stream_is_no_defect(
    closed: str, command: list[str], expected: tuple[int, str, str], tmp_path: Path
) -> None:
    env = {**os.environ, "SMART_CACHE": str(tmp_path)}
    closing = ["sh", "-c", f'exec "$@" {closed}', "sh", *command]
    done = subprocess.run(
        closing, env=env, input="hi\n", capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == expected


def test_public_names() -> None:
    assert smart_decoding.__all__ == [
        "LLM",
        "AsyncEngineArgs",
        "AsyncLLM",
        "CapacityError",
        "CompletionOutput",
        "ConfigError",
        "DownloadError",
        "EngineArgs",
        "EngineStoppedError",
        "Logprob",
        "ModelError",
        "RequestOutput",
        "RequestOutputKind",
        "SamplingParams",
        "SmartError",
        "StructuredOutputsParams",
        "TextPrompt",
        "TokensPrompt",
        "__version__",
    ]
    assert set(smart_decoding.__all__) <= set(dir(smart_decoding))
    assert all(getattr(smart_decoding, name) is not None for name in smart_decoding.__all__)
    assert smart_decoding.SamplingParams is SamplingParams
    assert smart_decoding.ConfigError is ConfigError
    assert (Path(smart_decoding.__file__).parent / "py.typed").is_file()
    assert smart_decoding.__version__ == "0.2.0"
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = smart_decoding.Nonsense


def test_llm_is_exported(fake: type[FakeLLM]) -> None:
    assert smart_decoding.LLM is fake
