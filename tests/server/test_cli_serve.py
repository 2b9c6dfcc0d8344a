"""`smart serve`: options from the command line, a file and the environment; bad ones are refused
before any loading."""

from __future__ import annotations

import argparse
import io
import json
import logging
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from serving import serving

from smart_decoding import llm
from smart_decoding.cli import main as cli
from smart_decoding.cli import serve as cli_serve
from smart_decoding.engine_args import EngineArgs
from smart_decoding.options import offered
from smart_decoding.server import launch
from smart_decoding.server.settings import ServerSettings


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ServerSettings, dict[str, Any]]]:
    """What would be served, and with which options of LLM."""
    found: list[tuple[ServerSettings, dict[str, Any]]] = []
    monkeypatch.delenv("SMART_API_KEY", raising=False)
    monkeypatch.setattr(llm, "LLM", lambda model, **options: dict(model=model, **options))

    def serve(load: Any, settings: ServerSettings) -> int:
        found.append((settings, load()))
        return 0

    monkeypatch.setattr(launch, "serve", serve)
    return found


def test_defaults(served: Any) -> None:
    assert cli.main(["serve"]) == 0
    ((settings, options),) = served
    assert settings == ServerSettings("smollm2-135m")
    assert EngineArgs(**options) == EngineArgs()


def test_the_model_may_be_an_option_as_for_llama_server(
    served: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "smart.toml"
    file.write_text('model = "m"\n')
    for given in (["-m", "a.gguf"], ["--model", "a.gguf"], ["a.gguf"]):
        assert cli.main(["serve", *given, "--config", str(file)]) == 0
    assert [options["model"] for _, options in served] == ["a.gguf"] * 3
    assert [settings.model_name for settings, _ in served] == ["a.gguf"] * 3
    assert cli.main(["serve", "b", "-m", "a.gguf"]) == 2
    assert "two models are given, b and a.gguf" in capsys.readouterr().err


def test_sampling_defaults_of_the_model_can_be_left_out_or_changed(served: Any) -> None:
    more = ["--generation-config", "vllm", "--override-generation-config", "temperature=0.5"]
    assert cli.main(["serve", *more]) == 0
    ((_, options),) = served
    assert options["generation_config"] == "vllm"
    assert options["override_generation_config"] == {"temperature": 0.5}


def test_the_command_line_wins_over_the_file(served: Any, tmp_path: Path) -> None:
    file = tmp_path / "smart.toml"
    file.write_text(
        'model = "m"\nport = 9000\nmax_queue = 3\npolicy = "eagle2"\n'
        'method = "ngram"\napi-key = ["a", "b"]\n'
        'quantization = "int8"\nqueue-timeout = 5\ntrust-pickle = true\n'
        "[policy-option]\ndepth = 2\n"
    )
    table = tmp_path / "table.toml"
    table.write_text('[speculative-config]\nmethod = "ngram"\n')
    assert cli.main(["serve", "--config", str(table)]) == 0
    assert served.pop()[1]["speculative_config"] == {"method": "ngram"}
    assert (
        cli.main(["serve", "--port", "8000", "--config", str(file), "--max-n", "2", "--seed", "5"])
        == 0
    )
    ((settings, options),) = served
    assert (settings.port, settings.max_queue, settings.max_n, settings.queue_timeout) == (
        8000,
        3,
        2,
        5,
    )
    assert options["trust_pickle"] is True
    assert options["quantization"] == "int8"
    assert options["seed"] == 5
    assert settings.api_keys == ("a", "b")
    assert settings.model_name == options["model"] == "m"
    assert options["speculative_config"] == {"method": "ngram", "policy": "eagle2", "depth": 2}


def test_the_chat_template_reaches_the_model_and_is_read_before_it(
    served: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", "--chat-template", "vicuna"]) == 0
    assert served[0][1]["chat_template"] == "vicuna"
    missing = tmp_path / "none.jinja"
    assert cli.main(["serve", "--chat-template", str(missing)]) == 2
    assert len(served) == 1
    err = capsys.readouterr().err
    assert str(missing) in err
    assert err.count("\n") == 1


def test_limits_of_pictures_reach_the_model(served: Any, tmp_path: Path) -> None:
    more = [
        "--limit-mm-per-prompt",
        "image=2",
        "--mm-processor-option",
        "max_pixels=1000",
        "--max-image-pixels",
        "9",
    ]
    assert cli.main(["serve", "--allowed-local-media-path", str(tmp_path), *more]) == 0
    options = served[0][1]
    assert options["allowed_local_media_path"] == str(tmp_path)
    assert options["limit_mm_per_prompt"] == {"image": 2}
    assert options["mm_processor_kwargs"] == {"max_pixels": 1000}
    assert options["max_image_pixels"] == 9


def test_origins_one_by_one_or_as_vllm_takes_them(served: Any) -> None:
    origins = ("--allowed-origins", "http://a.example", "--allowed-origins", '["http://b", "*"]')
    assert cli.main(["serve", "m", *origins]) == 0
    ((settings, _),) = served
    assert settings.allowed_origins == ("http://a.example", "http://b", "*")


def test_a_key_from_the_environment(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMART_API_KEY", "secret")
    assert cli.main(["serve", "--host", "0.0.0.0"]) == 0
    assert served[0][0].api_keys == ("secret",)
    assert cli.main(["serve", "--host", "0.0.0.0", "--no-api-key"]) == 0
    assert served[1][0].api_keys == ()
    assert served[1][0].no_api_key


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("prot = 1", "prot"),
        ("port = 'x'", "port"),
        ("port = true", "port"),
        ("port = [1, 2]", "port"),
        ("port = { a = 1 }", "port"),
        ("host = false", "host"),
        ("port =", "cannot read"),
        ("log-level = 'loud'", "choose from"),
        ("policy = 'none'", "unknown policy"),
        ("trust-pickle = 1", "trust-pickle"),
        ("policy-option = 3", "policy-option"),
        ("port = 99999", "port=99999"),
        ("max-queue = -1", "max_queue=-1"),
    ],
)
def test_bad_files(
    served: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, words: str
) -> None:
    file = tmp_path / "smart.toml"
    file.write_text(content)
    assert cli.main(["serve", "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("smart: error: ")
    assert error.count("\n") == 1
    assert words in error
    assert served == []


def test_a_switch_on_the_command_line(served: Any) -> None:
    assert cli.main(["serve", "--trust-pickle", "--head-timeout", "3"]) == 0
    assert served[0][1]["trust_pickle"] is True
    assert served[0][0].head_timeout == 3


def test_commands_of_vllm(served: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """What changes nothing here is taken, and what would change something is not left out."""
    common = "-tp 1 --pipeline-parallel-size=1 --trust-remote-code --enable-chunked-prefill "
    common += "--load-format auto --dtype auto --swap-space 4 --disable-log-requests "
    common += "--enable-auto-tool-choice --tool-call-parser hermes --jinja "
    common += "--gpu-memory-utilization 0.8 --no-async-scheduling --block-size 16 --task generate"
    assert cli.main(["serve", "m", *common.split(), "--no-enable-prefix-caching"]) == 0
    assert cli.main(["serve", "m"]) == 0
    (_, options), (_, usual) = served
    assert EngineArgs(**options) == replace(
        EngineArgs(**usual),
        trust_remote_code=True,
        enable_chunked_prefill=True,
        dtype="auto",
        swap_space=4,
        gpu_memory_utilization=0.8,
        async_scheduling=False,
        block_size=16,
        task="generate",
        enable_prefix_caching=False,
    )
    with pytest.raises(SystemExit):  # no short form of an option that --help does not list
        cli.main(["serve", "m", "--max-seq-len", "8192"])
    assert "unrecognized arguments: --max-seq-len" in capsys.readouterr().err
    for wrong in ("-tp 2", "--load-format dummy", "--enable-lora", "--kv-cache-dtype fp8"):
        assert cli.main(["serve", "m", *wrong.split()]) == 2
        assert "is not supported: leave it at" in capsys.readouterr().err
    assert len(served) == 2


def test_bad_command_lines(served: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for line in (
        ["--host", "0.0.0.0"],
        ["--policy-option", "wrong=1"],
        ["--config", "missing.toml"],
        ["--api-key", "k", "--no-api-key"],
    ):
        assert cli.main(["serve", *line]) == 2, line
    assert served == []


def test_help_names_every_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    text = " ".join(capsys.readouterr().out.split()).replace("- ", "-")
    for each in (*offered(EngineArgs), *offered(ServerSettings)):
        about = each.metadata
        if about["help"] != argparse.SUPPRESS:
            assert f"--{about['name'] or each.name.replace('_', '-')}" in text
            shown = about["usual"] or {(): "none", None: "none"}.get(each.default, each.default)
            words = {"True": "on", "False": "off"}.get(str(shown), shown)
            assert f"({words})" in text


def test_a_taken_port_is_one_line(served: Any) -> None:
    with launch.bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(cli_serve.ConfigError, match="cannot listen"):
            launch.bind("127.0.0.1", taken.getsockname()[1])


def test_a_host_that_is_no_name_is_one_line() -> None:
    """getaddrinfo raises UnicodeError for it."""
    with pytest.raises(cli_serve.ConfigError, match=r"cannot listen on a\.\.b port 0"):
        launch.bind("a..b", 0)


@pytest.fixture
def loggers() -> Iterator[None]:
    """As they were, afterwards."""
    kept = [logging.getLogger(name) for name in ("smart", "uvicorn", "")]
    before = [(each.handlers, each.propagate, each.level) for each in kept]
    yield
    for each, (handlers, propagate, level) in zip(kept, before, strict=True):
        each.handlers = handlers
        each.propagate = propagate
        each.setLevel(level)


def test_whoever_logs_does_so_in_json(capsys: pytest.CaptureFixture[str], loggers: None) -> None:
    launch.set_up_logging("info")
    logging.getLogger("asyncio").error("socket.accept() out of system resource")
    assert json.loads(capsys.readouterr().err)["logger"] == "asyncio"


@pytest.mark.parametrize("terminal", [True, False])
def test_no_client_writes_to_the_terminal(
    terminal: bool, load: Any, loggers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths, field names and models' names come from strangers. What errors quote is left out."""
    written = io.StringIO()
    monkeypatch.setattr(written, "isatty", lambda: terminal)
    evil = "\x1b]0;owned\x07\n12:00:00 GET / 200\r\x9b31m\u202e\u2028"
    with serving(load) as running, monkeypatch.context() as patch:
        patch.setattr("sys.stderr", written)
        launch.set_up_logging("info")
        httpx.get(f"{running.url}/{quote(evil)}")
        httpx.get(f"{running.url}/v1/models/{quote(evil)}")
        body = {"model": evil, "prompt": "a", evil: 1}
        httpx.post(f"{running.url}/v1/completions", json=body)
        launch.log.info("ready", extra={"speculation": evil})
        try:
            raise ValueError(evil)
        except ValueError as error:
            launch.log.error("failed", exc_info=error)
    lines = written.getvalue().split("\n")
    assert sum("owned" in line for line in lines) == 4
    assert "raise ValueError(evil)" in written.getvalue()
    assert not [line for line in lines if re.search("[\x00-\x1f\x7f-\x9f\u2028\u202e]", line)]
    assert not [line for line in lines if line.startswith("12:00:00 GET / 200")]
    if not terminal:
        messages = [json.loads(line)["message"] for line in lines if line]
        assert any(f"GET /{evil} 404" == message for message in messages)


@pytest.mark.parametrize("terminal", [True, False])
def test_people_are_told_where_to_look_and_programs_get_json_lines(
    terminal: bool, loggers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.StringIO()
    monkeypatch.setattr(written, "isatty", lambda: terminal)
    monkeypatch.setattr("sys.stderr", written)

    def run(sockets: Any) -> None:
        launch.log.info("ready", extra={"speculation": "a head"})
        launch.log.warning("GET / 200", extra={"seconds": 1.234})

    worker = SimpleNamespace(error=None)
    made = SimpleNamespace(run=run), worker
    monkeypatch.setattr(launch, "make_server", lambda load, settings: made)
    name = "Ann's model"
    settings = ServerSettings(name, host="0.0.0.0", port=0, api_keys=("k",))
    assert launch.serve(lambda: None, settings) == 0  # type: ignore[arg-type,return-value]
    lines = written.getvalue().splitlines()
    if not terminal:
        assert [json.loads(line)["level"] for line in lines] == ["info", "info", "warning"]
        return
    assert re.fullmatch(r"\d\d:\d\d:\d\d ready, a head", lines[-2])
    assert lines[-1].endswith(" warning: GET / 200, 1.23 s")
    url = re.search(r"page +(http://localhost:\d+)/ ", written.getvalue())[1]
    _, _, example = written.getvalue().partition("example ")
    words = shlex.split(example.partition("  end ")[0])
    assert words[:2] == ["curl", f"{url}/v1/chat/completions"]
    assert words[words.index("-H") + 1] == "Authorization: Bearer KEY"
    assert json.loads(words[words.index("-d") + 1])["model"] == name
