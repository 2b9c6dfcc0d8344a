"""`smart chat`: history, commands, and what stands below an answer, on a scripted LLM."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import stat
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scripted import FakeLLM, fails

from smart_decoding.cli import chat_input, chat_session
from smart_decoding.cli import main as cli
from smart_decoding.engine.stopping import LOOP
from smart_decoding.errors import CapacityError, ModelError

ANSWER = {"role": "assistant", "content": "Paris is the capital."}


def talk(
    monkeypatch: pytest.MonkeyPatch, *lines: str, options: tuple[str, ...] = (), code: int = 0
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    assert cli.main(["chat", *options]) == code


def interrupt(
    monkeypatch: pytest.MonkeyPatch, number: int, pieces: tuple[str, str] = FakeLLM.pieces
) -> None:
    """Press Ctrl-C behind the first piece of an answer. number: of the answer, from 1; pieces: of
    its text."""
    generate, usual = FakeLLM.generate, FakeLLM.pieces

    def interrupted(llm: FakeLLM, prompt: Any, params: Any, on_step: Any, use_tqdm: bool) -> Any:
        def show(touched: list[Any]) -> None:
            on_step(touched)
            if len(llm.calls) == number:
                raise KeyboardInterrupt

        FakeLLM.pieces = pieces if len(llm.calls) == number - 1 else usual
        return generate(llm, prompt, params, show, use_tqdm)

    monkeypatch.setattr(FakeLLM, "pieces", usual)
    monkeypatch.setattr(FakeLLM, "generate", interrupted)


def said(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


@pytest.fixture
def calls(fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The conversations that were made into prompts: a token for each character."""
    found: list[Any] = []

    def prompt(_: FakeLLM, messages: list[dict[str, Any]]) -> Any:
        found.append(messages)
        return SimpleNamespace(tokens=[0] * sum(len(each["content"]) for each in messages))

    monkeypatch.setattr(FakeLLM, "chat_prompt", prompt)
    return found


def test_history_grows_and_is_forgotten(
    fake: type[FakeLLM],
    calls: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    system = {"role": "system", "content": "be brief"}
    talk(
        monkeypatch,
        "one",
        "",
        "two",
        "/clear",
        "three",
        "/set system",
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
    assert [llm.started for llm in fake.made] == [[0]]  # measures before the first message
    assert err.count("[10.0 tok/s, 4.0 tokens per round (plain decoding: 1); 5 tokens]\n") == 4
    (llm,) = fake.made
    assert llm.model == "some-model"
    assert llm.options["stop_at_loops"] == chat_session.LOOP_TOKENS


def test_what_fails_leaves_no_trace_in_the_history(
    fake: type[FakeLLM],
    calls: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    generate = FakeLLM.generate

    def first_fails(llm: FakeLLM, *given: Any, **options: Any) -> Any:
        FakeLLM.failure = None if llm.calls else ModelError("no logits")
        return generate(llm, *given, **options)

    monkeypatch.setattr(FakeLLM, "generate", first_fails)
    talk(monkeypatch, "one", "two", code=2)
    assert calls[1] == [said("two")]
    assert "smart: error: no logits\n" in capsys.readouterr().err


def test_ctrl_c_keeps_the_question_and_the_answer_so_far(
    fake: type[FakeLLM],
    calls: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    interrupt(monkeypatch, 1)
    talk(monkeypatch, "one", "go on")
    assert calls[1] == [said("one"), {"role": "assistant", "content": "Paris"}, said("go on")]
    out, err = capsys.readouterr()
    assert out == "Paris\nParis is the capital.\n"
    assert "the answer is kept as far as it goes" in err


@pytest.mark.parametrize("pieces", [("", " is the capital."), ("\n", " is the capital.")])
def test_ctrl_c_before_the_first_word_keeps_nothing_of_the_turn(
    pieces: tuple[str, str],
    fake: type[FakeLLM],
    calls: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Templates that demand alternation refuse two questions in a row."""
    interrupt(monkeypatch, 2, pieces)
    talk(monkeypatch, "one", "two", "three")
    assert calls[2] == [said("one"), ANSWER, said("three")]
    err = capsys.readouterr().err
    assert "no word came, so the question is not kept either" in err
    assert "the answer is kept as far as it goes" not in err


def test_an_answer_without_a_word_is_not_kept(
    fake: type[FakeLLM],
    calls: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(FakeLLM, "pieces", ("", ""))
    talk(monkeypatch, "one", "two")
    assert calls[1] == [said("two")]
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("no word came, so the question is not kept either") == 2


def test_ctrl_c_behind_the_end_of_an_answer_ends_nothing(
    fake: type[FakeLLM], calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = chat_session.figures

    def interrupted(*given: Any) -> str:
        if len(calls) == 1:
            raise KeyboardInterrupt
        return figures(*given)

    monkeypatch.setattr(chat_session, "figures", interrupted)
    talk(monkeypatch, "one", "two")
    assert calls[1] == [said("one"), ANSWER, said("two")]


def test_quotes_make_one_message_of_several_lines(
    fake: type[FakeLLM], calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    talk(
        monkeypatch,
        '"""one',
        "  /bye",
        'two"""',
        '"""three"""',
        '/set system """be',
        'brief"""',
        '"""',
        "four",
        '"""',
        '"""never closed',
        "five",
    )
    texts = [messages[-1]["content"] for messages in calls]
    assert texts == ["one\n  /bye\ntwo", "three", "four", "never closed\nfive"]
    assert calls[2][0] == {"role": "system", "content": "be\nbrief"}


def test_a_path_is_no_command(
    fake: type[FakeLLM],
    calls: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = ["/etc/hosts what is this", "/tmp/a.b", "/1 or 2?", "// comment", " /tmp", "/"]
    talk(monkeypatch, *lines, "/tmp is what?", code=2)
    assert [messages[-1]["content"] for messages in calls] == [line.strip() for line in lines]
    assert "no command /tmp (a blank before it makes it a message)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("entry", "hint"),
    [
        ("/hlep", "no command /hlep .*; did you mean /help\\?"),
        ("/cleer", "; did you mean /clear\\?"),
        ("/reset", "; did you mean /clear\\?"),
        ("/system be brief", "; did you mean /set system TEXT\\?"),
        ("/save", "/save needs more: /save FILE"),
        ("/set", "/set needs more: /set NAME VALUE"),
        ("/set temprature 1", "no parameter 'temprature'; did you mean temperature\\?; there are"),
        ("/set temperature hot", "temperature takes a number: /set temperature VALUE"),
        ("/set temperature", "temperature takes a number"),
        ("/set temperature 9", "temperature=9.0 is not allowed: it must be in \\[0, 2\\]"),
        ("/set parameter num_ctx 9", "the context's length is chosen at the start"),
        ("/model smolm2-135m", "no model 'smolm2-135m' is known; did you mean smollm2-135m\\?"),
        ("/load /no/such/file", "/no/such/file cannot be read: No such file"),
        ("/load /dev/zero", "/dev/zero holds no conversation"),
        ("/save /no/such/file", "/no/such/file cannot be written: No such file"),
    ],
)
def test_a_wrong_command_gets_one_line(
    entry: str,
    hint: str,
    fake: type[FakeLLM],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    talk(monkeypatch, entry, code=2)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert re.search(hint, err)
    assert not fake.made[0].calls


def test_parameters_are_set(
    fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(FakeLLM, "recommended", {"temperature": 0.6, "top_k": 20})
    talk(
        monkeypatch,
        "one",
        "/set parameter repeat_penalty 1.1",
        "/set temp 0.3",
        "/set max-tokens 7",
        "/set num_predict -1",
        "/set seed 5",
        "two",
        "/set seed -1",
        "/set temperature 0",
        "/show",
        "three",
    )
    first, second, third = (params for _, params in fake.made[0].calls)
    assert (first.temperature, first.top_k, first.max_tokens) == (0.6, 20, 1024)
    assert first.seed is not None
    assert (second.temperature, second.repetition_penalty, second.seed) == (0.3, 1.1, 5)
    assert (second.top_k, second.max_tokens) == (20, None)
    assert third.greedy
    shown = dict(line.split(None, 1) for line in capsys.readouterr().err.splitlines() if line)
    assert shown["model"] == "smollm2-135m, Q4_K_M, activations in 8 bits"
    assert shown["temperature"] == "0.0"
    assert shown["repetition_penalty"] == "1.1"
    assert shown["seed"] == "a new one for each answer"
    assert shown["conversation"] == "2 turns, 22 of 4096 tokens"


def test_each_answer_draws_anew(fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch) -> None:
    talk(monkeypatch, "one", "two", options=("--temp", "1"))
    first, second = (params.seed for _, params in fake.made[0].calls)
    assert first != second


def test_help_lists_every_command(
    fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(monkeypatch, "/?", "/help")
    err = capsys.readouterr().err
    for use in ("/set NAME", "/show", "/clear", "/save FILE", "/load FILE", "/model NAME", "/bye"):
        assert err.count(f"\n{use}") + err.startswith(use) == 2


def test_a_conversation_is_saved_and_loaded(
    fake: type[FakeLLM],
    calls: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "our talk.json"
    talk(monkeypatch, "/set system be brief", "one", f"/save {file}")
    saved = [{"role": "system", "content": "be brief"}, said("one"), ANSWER]
    assert json.loads(file.read_text(encoding="utf-8")) == saved
    talk(monkeypatch, "gone", f"/load {file}", "two", f"/save {file}")
    assert calls[-1] == [*saved, said("two")]
    assert json.loads(file.read_text(encoding="utf-8")) == [*saved, said("two"), ANSWER]
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_what_is_no_utf8_is_not_saved_and_ends_nothing(
    fake: type[FakeLLM],
    calls: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "talk.json"
    file.write_text(json.dumps([said("\ud800"), ANSWER]))
    talk(monkeypatch, f"/load {file}", f"/save {tmp_path / 'new'}", "two", code=2)
    assert calls[0] == [said("\ud800"), ANSWER, said("two")]
    assert "surrogates not allowed" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_reader_who_leaves_ends_the_chat(
    fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeLLM.failure = BrokenPipeError()
    monkeypatch.setattr("os.dup2", lambda *_: None)  # standard output is pytest's
    talk(monkeypatch, "one", "two", code=cli.BROKEN_PIPE)
    assert len(fake.made[0].calls) == 1


@pytest.mark.parametrize("before", [None, 0o600, 0o644])
def test_a_saved_conversation_is_for_its_owner_only(
    before: int | None, fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "talk.json"
    if before is not None:
        file.write_text("[]")
        file.chmod(before)
    talk(monkeypatch, "one", f"/save {file}")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert json.loads(file.read_text()) == [said("one"), ANSWER]


def test_a_folder_that_may_not_be_searched_gets_no_conversation(
    fake: type[FakeLLM],
    calls: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    exists = Path.exists

    def refused(path: Path) -> bool:
        if path == Path("/closed/x"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return exists(path)

    monkeypatch.setattr(Path, "exists", refused)
    talk(monkeypatch, "one", "/save /closed/x", "/load /closed/x", "two", code=2)
    assert calls[1] == [said("one"), ANSWER, said("two")]
    err = capsys.readouterr().err
    assert "/closed/x cannot be written: Permission denied\n" in err
    assert "/closed/x cannot be read: Permission denied\n" in err


@pytest.mark.parametrize(
    "content",
    [
        "[1, 2]",
        "{}",
        '""',
        '["role"]',
        '[{"role": "user"}]',
        '[{"role": "tool", "content": "x"}]',
        '[{"role": "user", "content": null}]',
        '[{"role": "user", "content": "x", "name": "y"}]',
        '[{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]',
        '[{"role": "system", "content": "x"}, {"role": "system", "content": "y"}]',
    ],
)
def test_a_file_of_something_else_is_neither_read_nor_overwritten(
    content: str,
    fake: type[FakeLLM],
    calls: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = tmp_path / "notes"
    other.write_text(content)
    talk(monkeypatch, "one", f"/save {other}", f"/load {other}", "two", code=2)
    assert other.read_text() == content
    assert calls[1] == [said("one"), ANSWER, said("two")]
    assert capsys.readouterr().err.count(f"{other} holds no conversation") == 2


def test_another_model_goes_on_with_the_conversation(
    fake: type[FakeLLM],
    calls: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make = FakeLLM.__init__

    def load(llm: FakeLLM, model: str, **options: Any) -> None:
        if model == "bad/model":
            raise ModelError("no such repository")
        if model == "slow/model":
            raise KeyboardInterrupt
        if model == "closed/model":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), model)
        make(llm, model, **options)

    monkeypatch.setattr(FakeLLM, "__init__", load)
    lines = ["one", "/model good/model", "two"]
    lines += ["/model bad/model", "/model slow/model", "/model closed/model", "three"]
    talk(monkeypatch, *lines, options=("--temp", "0.5", "--max-model-len", "99"), code=2)
    assert [llm.model for llm in fake.made] == ["smollm2-135m", *["good/model"] * 4]
    assert calls[-1] == [said("one"), ANSWER, said("two"), ANSWER, said("three")]
    assert all(llm.options["max_model_len"] == 99 for llm in fake.made)
    assert [params.temperature for llm in fake.made for _, params in llm.calls] == [0.5] * 3
    err = capsys.readouterr().err
    assert "smart: error: no such repository\n" in err
    assert "smart: error: slow/model is not loaded\n" in err
    assert "Permission denied: 'closed/model'\n" in err


def test_a_model_is_gone_before_the_next_one_is_loaded(
    fake: type[FakeLLM], calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[FakeLLM]] = []
    make = FakeLLM.__init__

    def load(llm: FakeLLM, model: str, **options: Any) -> None:
        assert [each() for each in made] == [None] * len(made)
        make(llm, model, **options)
        made.append(weakref.ref(fake.made.pop()))

    monkeypatch.setattr(FakeLLM, "__init__", load)
    talk(monkeypatch, "one", "/model good/model", "two", "/model other/model", "three")
    assert len(made) == 3


def test_a_first_model_that_cannot_be_loaded_ends_the_chat(
    fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(llm: FakeLLM, model: str, **options: Any) -> None:
        raise ModelError("no such repository")

    monkeypatch.setattr(FakeLLM, "__init__", load)
    assert fails(capsys, "chat", "a/b") == "smart: error: no such repository\n"


def test_what_outgrows_the_context_loses_its_first_turns(
    fake: type[FakeLLM],
    calls: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of 200 tokens 150 may be the prompt's; what has more is cut to 100. A turn has 9 + 21."""
    monkeypatch.setattr(FakeLLM, "context", 200)
    lines = [f"message {n}" for n in range(6)]
    talk(monkeypatch, *lines, options=("--system", "s" * 10))
    system = {"role": "system", "content": "s" * 10}
    history = [message for line in lines for message in (said(line), ANSWER)]
    assert calls[4] == [system, *history[:8], said("message 4")]  # 139 tokens
    assert calls[-1] == [system, *history[6:10], said("message 5")]  # 79; 109 are too many
    err = capsys.readouterr().err
    note = "outgrew the context of 200 tokens: the first 3 of its 6 turns are forgotten\n"
    assert err.count("outgrew") == 1
    assert note in err


@pytest.mark.parametrize("failure", [None, CapacityError("the prompt is too long")])
def test_a_message_longer_than_the_context_is_refused(
    failure: CapacityError | None,
    fake: type[FakeLLM],
    calls: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(FakeLLM, "context", 100)
    prompt = FakeLLM.chat_prompt

    def refusing(llm: FakeLLM, messages: list[dict[str, Any]]) -> Any:
        if failure is not None and len(messages[-1]["content"]) > 99:
            raise failure
        return prompt(llm, messages)

    monkeypatch.setattr(FakeLLM, "chat_prompt", refusing)
    talk(monkeypatch, "one", "x" * 100, "two", "y" * 79, code=2)
    kept = [messages for messages in calls if messages[-1] == said("two")]
    assert kept == [[said("one"), ANSWER, said("two")]]
    assert len(fake.made[0].calls) == 3  # a message of 79 tokens leaves room for 21
    err = capsys.readouterr().err
    assert err.count("smart: error: ") == 1
    assert "longer than the context of 100 tokens: shorten it, or start with a larger" in err


def test_a_loop_is_said_and_not_kept(
    fake: type[FakeLLM],
    calls: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The repetitions, " is the capital.", begin at the second token."""
    monkeypatch.setattr(FakeLLM, "stop_reason", LOOP)
    monkeypatch.setattr(chat_session, "loop_start", lambda tokens, least: 1)
    talk(monkeypatch, "one", "two")
    assert calls[1] == [said("one"), {"role": "assistant", "content": "Paris"}, said("two")]
    out, err = capsys.readouterr()
    assert out == "Paris is the capital.\n" * 2
    assert err.count("the answer repeats itself, so it was ended: a larger model") == 2


@pytest.mark.parametrize(
    ("most", "cut"), [("5", ", cut at max_tokens]"), ("6", ", cut at the context's end]")]
)
def test_an_answer_that_is_cut_says_where(
    most: str,
    cut: str,
    fake: type[FakeLLM],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(FakeLLM, "finish_reason", "length")
    talk(monkeypatch, "one", options=("-n", most))
    assert cut in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs Linux's /dev/full")
def test_a_history_on_a_full_disk_goes_on() -> None:
    history = chat_input._history(Path("/dev/full"))
    history.append_string("one")
    assert history.get_strings() == ["one"]


def test_a_closed_standard_input_is_refused(
    fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert "there is no standard input" in fails(capsys, "chat")
    assert not fake.made


def test_only_one_model(fake: type[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    assert "two models are given" in fails(capsys, "chat", "a", "-m", "b")
    assert not fake.made


def test_what_is_no_utf8_is_replaced(fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch) -> None:
    typed = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", typed)
    assert cli.main(["chat"]) == 0
    assert fake.made[0].messages == [said("caf\ufffd")]
