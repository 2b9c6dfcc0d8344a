"""`suffix` of /v1/completions, and llama.cpp's /infill as editors call it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tokenizers
from serving import NAME, Running, post, save_tiny_model, serving

from smart_decoding import LLM, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Iterator

MARKS = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>", "<|file_sep|>"]
PREFIX, SUFFIX, MIDDLE, PAD, FILE = range(258, 263)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose vocabulary has the tokens."""
    folder = save_tiny_model(tmp_path_factory.mktemp("coder"), 263)
    file = str(folder / "tokenizer.json")
    backend = tokenizers.Tokenizer.from_file(file)
    backend.add_tokens(MARKS)
    backend.save(file)
    return folder


@pytest.fixture(scope="module")
def coder(folder: Path) -> Iterator[Running]:
    def load() -> LLM:
        config = {"method": "ngram", "policy": "static", "min_n": 1}
        return LLM(folder, speculative_config=config, dtype="float32", max_model_len=256)

    with serving(load) as running:
        yield running


@pytest.fixture(scope="module")
def plain(folder: Path) -> LLM:
    """Decodes plainly, outside of any server."""
    return LLM(folder, speculative_config=False, dtype="float32", max_model_len=256)


def answer_to(plain: LLM, prompt: list[int], count: int) -> str:
    params = SamplingParams(temperature=0, max_tokens=count, stop_token_ids=[*range(258, 263)])
    return plain.generate({"prompt_token_ids": prompt}, params)[0].outputs[0].text


def ids(coder: Running, text: str) -> list[int]:
    return coder.llm.tokenizer.encode(text, add_special_tokens=False)


def test_a_suffix_is_filled_in(coder: Running, plain: LLM) -> None:
    body = {"prompt": "def f(", "suffix": "): pass", "max_tokens": 12, "temperature": 0}
    choice = post(coder, "/v1/completions", json=body).json()["choices"][0]
    prompt = [PREFIX, *ids(coder, "def f("), SUFFIX, *ids(coder, "): pass"), MIDDLE]
    assert choice["text"] == answer_to(plain, prompt, 12)
    tokens = {**body, "prompt": ids(coder, "def f(")}
    assert post(coder, "/v1/completions", json=tokens).json()["choices"][0] == choice
    goes_on = post(coder, "/v1/completions", json={**body, "suffix": ""}).json()
    assert goes_on["usage"]["prompt_tokens"] == len("def f(")
    assert goes_on["choices"][0]["text"] != choice["text"]


def test_the_middle_ends_at_tokens_of_its_end(coder: Running) -> None:
    body = {"prompt": "a", "suffix": "b", "max_tokens": 9, "temperature": 0}
    for token in (PAD, FILE, PREFIX):
        forced = {**body, "logit_bias": {str(token): 100}}
        answer = post(coder, "/v1/completions", json=forced).json()
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["choices"][0]["text"] == ""
        assert answer["usage"]["completion_tokens"] == 1
    on = post(coder, "/v1/completions", json={**forced, "ignore_eos": True}).json()
    assert on["usage"]["completion_tokens"] == 9


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/completions", {"prompt": "a", "suffix": "b"}, "suffix"),
        ("/infill", {"input_prefix": "a", "input_suffix": "b"}, "input_prefix"),
    ],
)
def test_other_models_say_so(running: Running, path: str, body: Any, field: str) -> None:
    answer = post(running, path, json={**body, "max_tokens": 1})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")
    assert error["message"].startswith(f"{field}: this model has no tokens for filling in")
    assert running.idle()


# as llama.vim sends it
EDITOR = {
    "input_prefix": "import os\n",
    "input_suffix": "):\n    pass\n",
    "input_extra": [{"text": "x = 1\n", "time": 12.5, "filename": "a.py"}],
    "prompt": "def f(",
    "n_predict": 8,
    "n_indent": 4,
    "top_k": 40,
    "top_p": 0.99,
    "stream": False,
    "samplers": ["top_k", "top_p", "infill"],
    "cache_prompt": True,
    "t_max_prompt_ms": 500,
    "t_max_predict_ms": 1000,
    "id_slot": 0,
    "model": "",
}


def test_editors_fill_in(coder: Running, plain: LLM) -> None:
    answer = post(coder, "/infill", json=EDITOR)
    assert answer.status_code == 200
    assert "samplers" in answer.headers["warning"]
    found = answer.json()
    extra = [FILE, *ids(coder, "a.py\nx = 1\n"), FILE, *ids(coder, "filename\n")]
    before = [PREFIX, *ids(coder, "import os\ndef f(")]
    prompt = [*extra, *before, SUFFIX, *ids(coder, "):\n    pass\n"), MIDDLE]
    assert found["content"] == answer_to(plain, prompt, 8)
    assert found["tokens_evaluated"] == len(prompt)
    assert (found["stop"], found["truncated"], found["model"]) == (True, False, NAME)
    assert found["timings"]["predicted_n"] == found["tokens_predicted"]


def test_editors_get_the_fields_that_they_request(coder: Running) -> None:
    fields = ["content", "timings/prompt_n", "timings/predicted_n", "truncated", "nothing"]
    body = {**EDITOR, "response_fields": fields, "input_prefix": "a" * 5000}
    found = post(coder, "/infill", json=body).json()
    assert list(found) == fields[:-1]
    assert found["truncated"] is True
    assert found["timings/predicted_n"] <= 8


def test_without_a_limit_half_of_the_context_stays_free(coder: Running) -> None:
    body = {name: value for name, value in EDITOR.items() if name != "n_predict"}
    for limit in ({}, {"n_predict": -1}):
        long = {**body, **limit, "input_prefix": "a" * 5000, "stop": ["\n"]}
        assert post(coder, "/infill", json=long).json()["tokens_evaluated"] == 128


def test_a_prompt_is_read_ahead_without_an_answer(coder: Running) -> None:
    extra = [{"text": "x = 1\n", "time": [12, 500], "filename": "a.py"}]  # as Vim counts
    ahead = {"input_extra": extra, "n_predict": 0, "samplers": []}
    found = post(coder, "/infill", json=ahead).json()
    assert (found["content"], found["tokens_predicted"]) == ("", 1)


def test_an_editor_waits_no_longer_than_it_says(coder: Running) -> None:
    (line,) = ids(coder, "\n")
    body = {**EDITOR, "n_predict": 100, "ignore_eos": True, "logit_bias": {str(line): 100}}
    whole = post(coder, "/infill", json={**body, "t_max_predict_ms": 60_000}).json()
    assert whole["tokens_predicted"] == 100
    short = post(coder, "/infill", json={**body, "t_max_predict_ms": 1}).json()
    assert short["tokens_predicted"] < 100
    assert whole["content"].startswith(short["content"])
    assert "\n" in short["content"]


def test_infill_streams(coder: Running) -> None:
    whole = post(coder, "/infill", json=EDITOR).json()
    lines = post(coder, "/infill", json={**EDITOR, "stream": True}).text.splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert "".join(each["content"] for each in events) == whole["content"]
    assert [each["stop"] for each in events] == [False] * (len(events) - 1) + [True]
    assert events[-1]["tokens_predicted"] == whole["tokens_predicted"]


@pytest.mark.parametrize(
    "change", [{"n": 2}, {"n_predict": -2}, {"n_predict": 5000}, {"input_extra": [{}]}]
)
def test_infill_refuses(coder: Running, change: dict[str, Any]) -> None:
    assert post(coder, "/infill", json={**EDITOR, **change}).status_code == 400
    assert coder.idle()
