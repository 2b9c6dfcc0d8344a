"""`smart run` and what it shares: arguments, refusals, and what it prints, on a scripted LLM."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import threading
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scripted import FakeLLM, fails, vision_checkpoints

from smart_decoding.cli import main as cli
from smart_decoding.cli import prompts as cli_prompts
from smart_decoding.cli import run as cli_run
from smart_decoding.cli.model_options import speculative_config
from smart_decoding.core.policies import POLICIES
from smart_decoding.engine.outputs import CompletionOutput
from smart_decoding.engine.request import RequestMetrics
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.errors import ConfigError, ModelError
from smart_decoding.options import mapping


def test_run_streams_the_answer(fake: type[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "hi"]) == 0
    out, err = capsys.readouterr()
    assert out == "Paris is the capital.\n"
    assert err == ""
    (llm,) = fake.made
    assert llm.model == "smollm2-135m"
    assert llm.options["speculative_config"] is None
    assert llm.options["dtype"] == "bfloat16"
    assert llm.options["device"] == "auto"
    prompt, params = llm.calls[0]
    assert prompt.tokens == [1, ord("h"), ord("i")]
    assert params == SamplingParams(temperature=0.0, max_tokens=256)
    assert llm.options["draft_later"]
    assert llm.loads == [1]  # behind the first word, and not once all is answered


def test_run_says_what_drafts_by_default(
    fake: type[FakeLLM], capsys: pytest.CaptureFixture[str]
) -> None:
    for options in ([], ["--policy", "eagle2"]):
        assert cli.main(["run", "hi", "--model", "m", *options]) == 0
        out, err = capsys.readouterr()
        assert out == "Paris is the capital.\n"
        assert err == "smart: drafts come from ngram; --method and --draft choose another\n"
    for options in (["--method", "ngram"], ["--draft", "a-head"], ["--policy", "off"]):
        assert cli.main(["run", "hi", "--model", "m", *options]) == 0
        assert capsys.readouterr().err == ""


def test_run_names_a_faster_drafter_that_is_not_here(
    fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_run, "siblings", lambda vocab, parameters: ["small"])
    assert cli.main(["run", "hi", "--model", "m"]) == 0
    reported = "`smart models pull small` adds a faster one, --method and --draft choose another"
    assert capsys.readouterr().err == f"smart: drafts come from ngram; {reported}\n"


def test_run_passes_everything_on(fake: type[FakeLLM]) -> None:
    options = (
        "--model m --method ngram --policy eagle2 --policy-option depth=3 --policy-option top_k=4"
    )
    sampling = "--temperature 0.8 --top-p 0.9 --top-k 40 --min-p 0.05 --seed 7 --max-tokens 9"
    other = (
        "--method-option longest=5 --dtype fp32 --device cpu --raw --max-model-len 99 "
        "--quantization int8 --activations int8 --chat-template vicuna --trust-pickle"
    )
    assert cli.main(["run", *f"{options} {sampling} {other}".split(), "once upon"]) == 0
    (llm,) = fake.made
    assert llm.options["speculative_config"] == {
        "method": "ngram",
        "policy": "eagle2",
        "depth": 3,
        "top_k": 4,
        "longest": 5,
    }
    assert (llm.model, llm.options["dtype"], llm.options["device"]) == ("m", "fp32", "cpu")
    assert llm.options["quantization"] == "int8"
    assert llm.options["activations"] == "int8"
    assert llm.options["max_model_len"] == 99
    assert llm.options["chat_template"] == "vicuna"
    assert llm.options["trust_pickle"] is True
    params = SamplingParams(temperature=0.8, top_p=0.9, top_k=40, min_p=0.05, seed=7, max_tokens=9)
    assert llm.calls == [("once upon", params)]


def test_run_shows_the_model_a_picture(fake: type[FakeLLM], tmp_path: Path) -> None:
    from PIL import Image

    vision_checkpoints().save_llava(tmp_path / "llava")
    seeing = str(tmp_path / "llava")
    for name, colour in (("a.png", "red"), ("b.jpg", "blue")):
        Image.new("RGB", (9, 7), colour).save(tmp_path / name)
    images = [
        "--model",
        seeing,
        "--image",
        str(tmp_path / "a.png"),
        "--image",
        str(tmp_path / "b.jpg"),
    ]
    assert cli.main(["run", *images, "what?"]) == 0
    assert fake.made[0].model == seeing
    *pictures, text = fake.made[0].calls[0][0]
    assert text == {"type": "text", "text": "what?"}
    assert [part["type"] for part in pictures] == [
        "image",
        "image",
    ]
    assert [part["image"].size for part in pictures] == [(9, 7), (9, 7)]
    assert cli.main(["run", "--raw", *images, "<image>what?<image>"]) == 0
    prompt = fake.made[1].calls[0][0]
    assert prompt["prompt"] == "<image>what?<image>"
    assert len(prompt["multi_modal_data"]["image"]) == 2


def test_run_refuses_a_bad_picture_before_loading(
    fake: type[FakeLLM], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    assert "bad.png: an image is corrupt" in fails(
        capsys, "run", "--image", str(tmp_path / "bad.png"), "what?"
    )
    assert "none.png: No such file" in fails(
        capsys, "run", "--image", str(tmp_path / "none.png"), "what?"
    )
    assert not fake.made


@pytest.mark.parametrize("given", [True, False])
def test_run_says_what_to_do_for_a_model_that_does_not_see(
    fake: type[FakeLLM], tmp_path: Path, capsys: pytest.CaptureFixture[str], given: bool
) -> None:
    tiny = vision_checkpoints()
    tiny.picture(1).save(tmp_path / "a.png")
    tiny.save_text(tmp_path / "text")
    capsys.readouterr()  # transformers shows its progress
    model = ["--model", str(tmp_path / "text")] if given else []
    said = fails(capsys, "run", *model, "--image", str(tmp_path / "a.png"), "what?")
    name = model[-1] if given else "smollm2-135m"
    assert (
        said == f"smart: error: {name} reads text only: give a --model that takes images "
        "(docs/vision.md)\n"
    )
    assert not fake.made


def test_run_reports_statistics_on_stderr(
    fake: type[FakeLLM], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "--stats", "hi"]) == 0
    assert capsys.readouterr().err == (
        "10.0 tokens/s, 4.00 tokens per round (plain decoding: 1); 5 tokens, first token after "
        "500 ms, 3 of 5 drafts accepted; Q4_K_M, activations in 8 bits\n"
    )


def test_a_batch_has_statistics_of_all_its_answers(
    fake: type[FakeLLM],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The second answer begins 0.1 s behind the first, and ends 0.1 s behind it."""
    generate = FakeLLM.generate

    def both(llm: FakeLLM, prompts: list[Any], params: Any, on_step: Any, use_tqdm: bool) -> Any:
        outputs = [generate(llm, prompt, params, None, use_tqdm)[0] for prompt in prompts]
        answer = outputs[1].outputs[0]
        later = replace(answer.metrics, first_token=0.6, finished=1.0, rounds=2)
        outputs[1].outputs = [replace(answer, metrics=later)]
        return outputs

    monkeypatch.setattr(FakeLLM, "generate", both)
    path = tmp_path / "prompts"
    path.write_text("one\ntwo\n")
    assert cli.main(["run", "--batch", str(path), "--stats"]) == 0
    assert (
        "16.0 tokens/s, 2.67 tokens per round (plain decoding: 1); 10 tokens in 2 answers, "
        "first tokens within 600 ms, 6 of 10 drafts accepted; "
    ) in capsys.readouterr().err


def test_statistics_tell_what_auto_chose(
    fake: type[FakeLLM], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake, "reason", "8 bits on amx, 1.50 times as fast")
    assert cli.main(["run", "--stats", "hi"]) == 0
    assert capsys.readouterr().err.endswith("\nauto: 8 bits on amx, 1.50 times as fast\n")
    assert cli.main(["run", "hi"]) == 0
    assert "auto" not in capsys.readouterr().err


def test_run_draws_another_seed_each_time_and_tells_it(
    fake: type[FakeLLM], capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in ([], [], ["--seed", "7"]):
        assert cli.main(["run", "--temperature", "0.8", "--stats", *seed, "hi"]) == 0
    first, second, given = (llm.calls[0][1].seed for llm in fake.made)
    assert isinstance(first, int)
    assert isinstance(second, int)
    assert first != second
    assert given == 7
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith(f", seed {first}; {fake.made[0].precision}")
    assert lines[1].endswith(f", seed {second}; {fake.made[1].precision}")
    assert "seed" not in lines[2]


def test_run_takes_the_prompt_as_llama_cpp_does(fake: type[FakeLLM], tmp_path: Path) -> None:
    path = tmp_path / "prompt"
    path.write_text("-")  # from a file it means nothing
    for words in (["-p", "hi"], ["-f", str(path)]):
        assert cli.main(["run", "-m", "m", "--temp", "0.5", "-n", "3", "--raw", *words]) == 0
    assert [llm.calls[0][0] for llm in fake.made] == ["hi", "-"]
    assert {llm.model for llm in fake.made} == {"m"}
    params = fake.made[0].calls[0][1]
    assert (params.temperature, params.max_tokens) == (0.5, 3)


@pytest.mark.parametrize("command", ["run", "chat", "serve", "bench", "demo"])
def test_threads_are_set_before_the_kernels_are_loaded(
    command: str, fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMART_NUM_THREADS", "9")
    observed: list[str] = []
    module = import_module(f"smart_decoding.cli.{command}")
    monkeypatch.setattr(module, "main", lambda _: observed.append(os.environ["SMART_NUM_THREADS"]))
    prompt = ["hi"] if command == "run" else []
    for threads in ([], ["-t", "3"]):
        assert cli.main([command, *prompt, *threads]) == 0
    assert observed == ["9", "3"]


def test_run_leaves_weights_and_profile_after_the_answer(fake: type[FakeLLM]) -> None:
    assert cli.main(["run", "hi"]) == 0
    (llm,) = fake.made
    assert llm.profiles == [1]
    assert llm.kept == [1]


def test_run_ends_well_if_its_profile_is_interrupted(
    fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_llm: FakeLLM) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fake, "take_profile", interrupted)
    assert cli.main(["run", "hi"]) == 0
    assert "Paris" in capsys.readouterr().out


def test_a_batch_must_hold_prompts(
    fake: type[FakeLLM], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts"
    path.write_text("\n")
    assert "holds no prompt" in fails(capsys, "run", "--batch", str(path))
    path.write_bytes(b"\xff")
    assert "is not UTF-8 text" in fails(capsys, "run", "--batch", str(path))
    assert "is not UTF-8 text" in fails(capsys, "run", "-f", str(path))
    path.write_text("hi\n")
    picture = ["--image", str(tmp_path / "a.png")]
    assert "cannot be given with --batch" in fails(capsys, "run", "--batch", str(path), *picture)
    for given in (["-p", "hi"], ["hi"], ["-f", str(path)]):
        assert "cannot be given with --batch" in fails(capsys, "run", "--batch", str(path), *given)
    assert not fake.made


def test_run_reads_standard_input(fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch) -> None:
    for given in ([], ["-"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe\n"))
        assert cli.main(["run", "--raw", *given]) == 0
    assert [llm.calls[0][0] for llm in fake.made] == ["from a pipe\n"] * 2


@pytest.mark.parametrize(
    ("given", "model", "prompt"),
    [
        (["hi"], "smollm2-135m", "hi"),
        (["smollm2-135m@pypi", "hi"], "smollm2-135m@pypi", "hi"),
        (["--stats", "m.gguf", "-p", "hi"], "m.gguf", "hi"),
        (["owner/name:Q4_K_M", "hi"], "owner/name:Q4_K_M", "hi"),
        (["-m", "m", "owner/name"], "m", "owner/name"),
        (["m.gguf", "-n", "5", "- an item"], "m.gguf", "- an item"),
        (["m.gguf", "-n", "5", "--", "-5"], "m.gguf", "-5"),
        (["-hf", "owner/name", "hi"], "owner/name", "hi"),
        (["hf.co/owner/name", "hi"], "hf.co/owner/name", "hi"),
    ],
)
def test_run_takes_the_model_before_the_prompt(
    given: list[str], model: str, prompt: str, fake: type[FakeLLM]
) -> None:
    assert cli.main(["run", "--raw", *given]) == 0
    (llm,) = fake.made
    assert (llm.model, llm.calls[0][0]) == (model, prompt)


def test_the_words_behind_a_model_need_no_quotes(fake: type[FakeLLM]) -> None:
    assert cli.main(["run", "--raw", "smollm2-135m", "Why", "is", "the sky blue?"]) == 0
    assert cli.main(["run", "--raw", "-m", "small", "Why", "--max-tokens", "3", "not?"]) == 0
    calls = [(llm.model, llm.calls[0][0]) for llm in fake.made]
    assert calls == [("smollm2-135m", "Why is the sky blue?"), ("small", "Why not?")]


def test_a_word_that_may_be_a_model_is_told_to_be_none(
    fake: type[FakeLLM], capsys: pytest.CaptureFixture[str]
) -> None:
    said = fails(capsys, "run", "llama3", "hi")
    assert "if 'llama3' is a model, none is known by this name: give a hub id" in said
    assert not fake.made


def test_options_in_other_programs_words(fake: type[FakeLLM]) -> None:
    small = ["run", "-m", "small"]
    assert cli.main([*small, "-sys", "Rhyme", "--predict", "3", "hello"]) == 0
    assert cli.main([*small, "-no-cnv", "--n-predict=4", "--pr", "hello"]) == 0
    rhyming, raw = fake.made
    assert rhyming.messages[0] == {"role": "system", "content": "Rhyme"}
    assert rhyming.calls[0][1].max_tokens == 3
    assert raw.calls[0][0] == "hello"  # --pr is still short for --prompt alone
    assert raw.calls[0][1].max_tokens == 4


def test_a_model_alone_is_no_prompt(
    fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    for model in ("smollm2-135m", "./nope.gguf", "TCP/IP"):
        assert f"{model!r} is taken for the model" in fails(capsys, "run", model)
    reported = fails(capsys, "run", "qwen2.5-coder-1.5", "hi")
    assert "did you mean qwen2.5-coder-1.5b?" in reported
    monkeypatch.setattr(sys, "stdin", None)
    assert "no standard input" in fails(capsys, "run", "-")
    assert not fake.made


def test_what_is_piped_comes_behind_the_prompt(
    fake: type[FakeLLM],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing that was given is left out; who keeps a pipe open is told what is waited for."""
    path = tmp_path / "file"
    path.write_text("of a file")
    expected = {
        ("Shorten:",): "Shorten:\n\npiped",
        ("Shorten:", "-f", "-"): "Shorten:\n\npiped",
        ("Shorten:", "-f", str(path)): "Shorten:\n\nof a file\n\npiped",
        ("-f", str(path)): "of a file\n\npiped",
        (): "piped",
    }
    monkeypatch.setattr(cli_prompts, "PATIENCE", 0.0)
    for given, prompt in expected.items():
        ours, theirs = os.pipe()
        os.write(theirs, b"piped")
        os.close(theirs)
        with os.fdopen(ours) as pipe:
            monkeypatch.setattr(sys, "stdin", pipe)
            assert cli.main(["run", "--raw", *given]) == 0
        assert fake.made[-1].calls[0][0] == prompt
    assert "reading standard input" not in capsys.readouterr().err
    ours, theirs = os.pipe()
    with os.fdopen(ours) as pipe:
        monkeypatch.setattr(sys, "stdin", pipe)
        timer = threading.Timer(0.1, os.close, [theirs])
        timer.start()
        assert cli.main(["run", "--raw", "alone"]) == 0
    assert fake.made[-1].calls[0][0] == "alone"
    assert "reading standard input" in capsys.readouterr().err


def test_run_says_that_an_answer_was_cut(
    fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(FakeLLM, "finish_reason", "length")
    assert cli.main(["run", "hi"]) == 0
    assert capsys.readouterr().err == "smart: cut at --max-tokens\n"


def test_instructions_go_before_the_message(
    fake: type[FakeLLM], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "--system", "be brief", "hi"]) == 0
    roles = [(message["role"], message["content"]) for message in fake.made[0].messages]
    assert roles == [("system", "be brief"), ("user", "hi")]
    capsys.readouterr()
    assert "--raw leaves out" in fails(capsys, "run", "--system", "be brief", "--raw", "hi")


def test_drafts_are_asked_for_as_vllm_writes_them(
    fake: type[FakeLLM], capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"method": "ngram", "num_speculative_tokens": 4}
    words = ["run", "hi", "--speculative-config", json.dumps(config)]
    assert cli.main(words) == 0
    assert fake.made[0].options["speculative_config"] == config
    capsys.readouterr()
    assert "takes the place of" in fails(capsys, *words, "--method", "ngram")
    assert "is not JSON" in fails(capsys, *words[:-1], "ngram")


def test_a_terminal_is_not_waited_for(
    fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("typed\n"))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert "there is no prompt" in fails(capsys, "run")
    assert not fake.made


def test_standard_input_must_be_text(
    fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    assert "not valid UTF-8" in fails(capsys, "run", "-")
    assert not fake.made


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--policy greedy", "choose one of: off, chain, static, eagle2, paper, smart"),
        ("--method telepathy", "choose from"),
        ("--method draft_model", "give --draft MODEL"),
        ("--method none --policy chain", "policy 'chain' is given: leave out one of them"),
        ("--draft small --method-option model=other", "give it once"),
        ("--dtype int4", "'bf16', 'bfloat16', 'fp32', 'float32', 'float', 'auto'"),
        (
            "--policy chain --policy-option depth=3",
            "policy 'chain' has no option 'depth'; its options: length",
        ),
        ("--policy-option cost=3", "policy 'smart' has no option 'cost'"),
        ("--policy chain --policy-option length=0", "length"),
        ("--policy-option depth", "'depth' is not of the form option=value"),
        (
            "--policy chain --policy-option length=2 --policy-option length=3",
            "'length' is given more than once",
        ),
        ("--policy chain --policy-option length=2 --method-option length=3", "give it once"),
        ("--temperature 3", "temperature=3.0 is not allowed: it must be in [0, 2]"),
        ("--temperature warm", "argument --temperature/--temp: invalid float value: 'warm'"),
        ("--frobnicate", "unrecognized arguments: --frobnicate"),
        ("--temprature=3", "did you mean --temperature? (see: smart run --help)"),
        ("--threads 0", "--threads 0 is not allowed: it must be at least 1"),
        ("Why is", "put a text of several words in quotes"),
    ],
)
def test_bad_arguments_are_refused_before_a_model_is_loaded(
    arguments: str, message: str, fake: type[FakeLLM], capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in fails(capsys, "run", *arguments.split(), "hi")
    assert not fake.made


@pytest.mark.parametrize(
    ("command", "reported"),
    [
        ("bench smollm2-135m", "unrecognized arguments: smollm2-135m; a model is given by --model"),
        ("train --output x y", "unrecognized arguments: y (see:"),
        ("run -m t.gguf -ngl 99 -p hi", "there is no -ngl here: leave it out, as all layers"),
        ("run --flash-attn=on hi", "there is no --flash-attn here: leave it out, as the fastest"),
        ("serve -no-cnv", "there is no -no-cnv here: smart run --raw continues a text"),
        ("serve smollm2-135m -xy 1", "unrecognized arguments: -xy 1 (see:"),
    ],
)
def test_a_model_in_the_wrong_place_is_told_where_it_belongs(
    command: str, reported: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reported in fails(capsys, *command.split())


@pytest.mark.parametrize("prompt", ["", " \n", "\udcff"])
def test_a_prompt_must_hold_text(
    prompt: str, fake: type[FakeLLM], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "the prompt is" in fails(capsys, "run", prompt)
    assert not fake.made


def test_every_policy_is_accepted_by_name_and_named_in_the_help() -> None:
    parser = cli.build_parser("run")
    with contextlib.redirect_stdout(io.StringIO()) as help_, pytest.raises(SystemExit):
        parser.parse_args(["run", "--help"])
    assert ", ".join(POLICIES) in " ".join(help_.getvalue().split())
    for name in POLICIES:
        assert speculative_config(parser.parse_args(["run", "--policy", name, "hi"])) == {
            "policy": name
        }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=1", 1),
        ("a=true", True),
        ("a=mc_sim", "mc_sim"),
        ("a=[[0],[1]]", [[0], [1]]),
        ("a=", ""),
    ],
)
def test_option_values(text: str, value: object) -> None:
    assert mapping(text) == {"a": value}


def test_lines_of_a_batch_end_at_line_breaks_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fake: type[FakeLLM]
) -> None:
    path = tmp_path / "prompts"
    path.write_bytes('\ufeff{"prompt": "a\u2028b"}\r\nc\u2028d\x0ce\n'.encode())
    assert cli_prompts.read_prompts(path) == ["a\u2028b", "c\u2028d\x0ce"]
    for odd in (
        '{"prompt": null}',
        r'{"prompt": "\ud800"}',
        '{"prompt": ["a"]}',
        '{"a":' * 100_000,
    ):
        path.write_text(odd)
        assert "no JSON object with a text" in fails(capsys, "run", "--batch", str(path))
    assert not fake.made


@pytest.mark.parametrize("words", [["llama3.2"], ["qwen3:8b", "Why?"]])
def test_a_model_of_ollamas_is_no_prompt(
    words: list[str], fake: type[FakeLLM], capsys: pytest.CaptureFixture[str]
) -> None:
    """The default model was fetched, and answered the word."""
    assert f"no model '{words[0]}' is known" in fails(capsys, "run", *words)
    assert not fake.made
    assert cli.main(["run", "-p", words[0]]) == 0


def test_lengths_are_told_as_in_llama_cpp(fake: type[FakeLLM]) -> None:
    assert cli.main(["run", "-n64", "hi"]) == 0
    assert cli.main(["run", "-n", "-1", "hi"]) == 0
    assert [made.calls[-1][1].max_tokens for made in fake.made] == [64, None]


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("terminal", [False, True])
def test_a_terminal_gets_no_control_characters_of_a_batch(
    as_json: bool, terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate(*_: Any, on_step: Any, **__: Any) -> list[Any]:
        on_step([SimpleNamespace(id="batch-0", finished=True)])
        return []

    llm: Any = SimpleNamespace(generate=generate, tokenizer=SimpleNamespace(token_text=None))
    answer = CompletionOutput(0, "\x9b2J", [1], "stop", None, RequestMetrics(arrival=0.0))
    monkeypatch.setattr(cli_run, "completion_of", lambda *_: answer)
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stdout", out)
    cli_run.answer_all(llm, ["q"], ["q"], SamplingParams(), as_json)
    assert "2J" in out.getvalue()
    assert ("\x9b" in out.getvalue()) is not terminal


def test_a_terminal_gets_no_control_characters_of_an_error(
    fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model's file may hold any."""
    fake.failure = ModelError("no \x1b[2J model")
    err = io.StringIO()
    monkeypatch.setattr(err, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", err)
    assert cli.main(["run", "hi"]) == 2
    assert err.getvalue() == "smart: error: no [2J model\n"


def test_a_batch_comes_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    assert cli_prompts.read_prompts(Path("-")) == ["one", "two"]
    monkeypatch.setattr(sys, "stdin", None)  # as after <&-
    with pytest.raises(ConfigError, match="no standard input"):
        cli_prompts.read_prompts(Path("-"))


def test_run_samples_as_the_model_recommends(
    fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    recommended = {"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.05, "max_tokens": 99}
    monkeypatch.setattr(FakeLLM, "recommended", recommended)
    for options in ([], ["--temperature", "0"], ["--repeat-penalty", "1.2", "-n", "9"]):
        assert cli.main(["run", "hi", *options]) == 0
    own, greedy, other = (llm.calls[0][1] for llm in fake.made)
    assert own == SamplingParams(**recommended, seed=own.seed)
    assert own.seed is not None
    assert greedy == SamplingParams(**{**recommended, "temperature": 0.0})
    chosen = {"repetition_penalty": 1.2, "max_tokens": 9}
    assert other == SamplingParams(**{**recommended, **chosen}, seed=other.seed)
