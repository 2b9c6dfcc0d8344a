"""Chat templates outside the server: a process bounds their time and memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from smart_decoding.cli import main as cli
from smart_decoding.errors import CapacityError, ConfigError
from smart_decoding.models.text import bounds, chat_template, rendering
from smart_decoding.models.text.tokenizer import Tokenizer

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="has no such bounds")
HI = [{"role": "user", "content": "hi"}]
LARGE = "{{ messages[0].content.replace('', 'a' * 999999999) }}"
LOOP = "{% for i in range(99999) %}"
ENDLESS = LOOP * 3 + "{% endfor %}" * 3
BREAKING = {
    "translate": "{{ ('a' * 100000).translate({97: 'b' * 1000000}) }}",
    "format": "{{ '{:>2000000000}'.format(1) }}",
    "replace": LARGE,
    "constant": "{{ 'a' * 10 ** 10 }}",
    "loop": ENDLESS,
    "growth": "{% set n = namespace(s='a') %}" + LOOP + "{% set n.s = n.s ~ n.s %}{% endfor %}",
}


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 0.5)


def child() -> subprocess.Popen[bytes]:
    found = rendering._renderer._child
    assert found is not None
    return found


@pytest.mark.parametrize("name", BREAKING)
def test_a_template_that_breaks_a_bound_is_refused(name: str, tokenizer: Tokenizer) -> None:
    """They took 17 GB, or ended as a defect."""
    words = r"takes more than 0.5 s of a processor, or than 256 MiB of memory"
    with pytest.raises(ConfigError, match=words):
        tokenizer.apply_chat_template(HI, template=BREAKING[name])
    assert tokenizer.apply_chat_template(HI) == "hi"


@pytest.fixture
def tokenizer() -> Tokenizer:
    backend: Any = None
    return Tokenizer(backend, template="{{ messages[0].content }}")


def test_a_given_template_is_compiled_within_the_bounds(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Constants are computed then."""
    file = tmp_path / "template.jinja"
    file.write_text("{{ 3 ** 1000000000 }}")
    assert cli.main(["run", "hi", "--chat-template", str(file)]) == 2
    assert "template.jinja is no Jinja template: the chat template takes" in capsys.readouterr().err


def test_a_prompt_is_what_it_is_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [{"role": "user", "content": "caf\u00e9\n\ud800", "name": None, "x": ("a", 1.5)}]
    template = "{{ messages[0] | tojson }}{{ t }}{{ o }}"
    variables: dict[str, Any] = {"t": True, "o": object()}
    found = chat_template.render(template, given, variables)
    with monkeypatch.context() as here:
        here.setattr(bounds, "bounded", True)
        assert found == chat_template.render(template, given, variables)
    with pytest.raises(ConfigError, match="no such message"):
        chat_template.render("{{ raise_exception('no such message') }}", HI, {})
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ConfigError, match="takes JSON only: ValueError"):
        chat_template.render(template, HI, {"loop": loop})


def test_a_process_that_is_killed_is_started_again() -> None:
    assert chat_template.render("{{ messages[0].content }}", HI, {}) == "hi"
    child().kill()
    assert chat_template.render("{{ messages[0].content }}", HI, {}) == "hi"


def test_one_that_is_killed_twice_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    rendering._renderer._stop()
    with pytest.raises(CapacityError, match="ended with status 1: try again"):
        chat_template.render("{{ messages[0].content }}", HI, {})
    monkeypatch.undo()
    assert chat_template.render("{{ messages[0].content }}", HI, {}) == "hi"


def test_ctrl_c_leaves_no_answer_for_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 60.0)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            chat_template.render(ENDLESS, HI, {})
    finally:
        timer.cancel()
    assert chat_template.render("{{ messages[0].content }}", HI, {}) == "hi"


def test_it_ends_with_this_process_and_has_no_secrets() -> None:
    program = (
        "from smart_decoding.models.text import chat_template, rendering\n"
        "assert chat_template.render('{{ x }}', [], {'x': 1}) == '1'\n"
        "print(rendering._renderer._child.pid)\n"
        "print(open(f'/proc/{rendering._renderer._child.pid}/environ').read().count('hidden'))\n"
    )
    if not Path("/proc/self/environ").exists():
        pytest.skip("needs Linux")
    environment = {**os.environ, "SMART_API_KEY": "hidden", "HF_TOKEN": "hidden"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, check=True
    )
    pid, secrets = map(int, done.stdout.split())
    assert secrets == 0
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_bounded_process_starts_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "bounded", True)
    monkeypatch.setattr(subprocess, "Popen", None)
    rendering._renderer._stop()
    assert chat_template.render("{{ messages[0].content }}", HI, {}) == "hi"
