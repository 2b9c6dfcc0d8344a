"""`smart chat`: history, commands, and what stands below an answer, on a scripted LLM."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
from scripted import FakeLLM, fails

from smart_decoding.cli import main as cli
from smart_decoding.errors import CapacityError

ANSWER = {"role": "assistant", "content": "Paris is the capital."}


def talk(
    monkeypatch: pytest.MonkeyPatch, *lines: str, options: tuple[str, ...] = (), code: int = 0
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    assert cli.main(["chat", *options]) == code


def said(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def test_history_grows_and_is_forgotten(
    fake: type[FakeLLM],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(
        FakeLLM,
        "chat_prompt",
        lambda _, messages: calls.append(messages),
    )
    system = {"role": "system", "content": "be brief"}
    talk(
        monkeypatch,
        "one",
        "",
        "two",
        "/reset",
        "three",
        "/system",
        "/nonsense",
        "four",
        "/bye",
        "five",
        options=("--system", "be brief", "some-model"),
    )
    assert calls == [
        [system, said("one")],
        [system, said("one"), ANSWER, said("two")],
        [system, said("three")],
        [said("three"), ANSWER, said("four")],
    ]
    out, err = capsys.readouterr()
    assert out == "Paris is the capital.\n" * 4
    assert err.count("[5 tokens, 10.0 tok/s, 3 of 5 drafts accepted]\n") == 4
    assert "no command /nonsense" in err
    (llm,) = fake.made
    assert llm.model == "some-model"


@pytest.mark.parametrize("failure", [CapacityError("too long"), KeyboardInterrupt()])
def test_what_fails_leaves_no_trace_in_the_history(
    failure: BaseException,
    fake: type[FakeLLM],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls: list[Any] = []

    def prompt(_: FakeLLM, messages: list[Any]) -> None:
        calls.append(messages)
        FakeLLM.failure = failure if len(calls) == 1 else None

    monkeypatch.setattr(FakeLLM, "chat_prompt", prompt)
    code = 2 if isinstance(failure, CapacityError) else 0
    talk(monkeypatch, "one", "two", code=code)
    assert calls[1] == [said("two")]
    err = capsys.readouterr().err
    assert ("too long; /reset" in err) == isinstance(failure, CapacityError)


def test_a_path_is_no_command(
    fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(monkeypatch, "/tmp/foo is what?", "/help me", "/reset now", "/tmp/foo", "/nonsense")
    (llm,) = fake.made
    assert llm.messages == [said("/tmp/foo")]
    assert len(llm.calls) == 2
    assert capsys.readouterr().err.count("no command") == 1


def test_only_one_model(fake: type[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    assert "two models are given" in fails(capsys, "chat", "a", "-m", "b")
    assert not fake.made


def test_what_is_no_utf8_is_replaced(fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch) -> None:
    typed = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", typed)
    assert cli.main(["chat"]) == 0
    assert fake.made[0].messages == [said("caf\ufffd")]
