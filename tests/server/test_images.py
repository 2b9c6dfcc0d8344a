"""Pictures in OpenAI's messages: the official client, and what is refused."""

from __future__ import annotations

import base64
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from serving import NAME, Running, post, serving

from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.llm import LLM

sys.path.append(str(Path(__file__).parents[1] / "parity"))
from vision import picture, save_llava


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("llava")
    save_llava(made)
    picture(2).save(made / "two.png")
    return made


@pytest.fixture(scope="module")
def seeing(folder: Path) -> Iterator[Running]:
    options: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 512,
        "max_num_seqs": 4,
        "limit_mm_per_prompt": {"image": 2},
        "allowed_local_media_path": folder,
    }
    with serving(
        lambda: LLM(folder, speculative_config={"method": "ngram", "policy": "static"}, **options)
    ) as one:
        yield one


def data_url(number: int) -> str:
    buffer = io.BytesIO()
    picture(number).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def ask(*urls: str, role: str = "user") -> list[dict[str, Any]]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": role, "content": [*parts, {"type": "text", "text": "What is it?"}]}]


def test_the_official_client_sends_pictures(seeing: Running, folder: Path) -> None:
    plain = LLM(folder, speculative_config=False, dtype="float32", max_model_len=512)
    with openai.OpenAI(base_url=f"{seeing.url}/v1", api_key="none", max_retries=0) as client:
        answers = set()
        for number, url in ((1, data_url(1)), (2, (folder / "two.png").as_uri())):
            request: dict[str, Any] = {
                "model": NAME,
                "messages": ask(url),
                "temperature": 0,
                "max_tokens": 12,
            }
            content = [
                {"type": "image", "image": picture(number)},
                {"type": "text", "text": "What is it?"},
            ]
            (wanted,) = plain.chat(
                [{"role": "user", "content": content}], SamplingParams(temperature=0, max_tokens=12)
            )
            whole = client.chat.completions.create(**request)
            assert whole.choices[0].message.content == wanted.outputs[0].text
            assert whole.usage.prompt_tokens == len(wanted.prompt_token_ids)
            stream = client.chat.completions.create(**request, stream=True)
            assert (
                "".join(chunk.choices[0].delta.content or "" for chunk in stream)
                == wanted.outputs[0].text
            )
            answers.add(wanted.outputs[0].text)
        assert len(answers) == 2
    counted = post(seeing, "/tokenize", json={"messages": ask(data_url(1))}).json()
    assert counted["count"] == whole.usage.prompt_tokens
    assert seeing.idle()


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (ask("http://127.0.0.1:1/a.png"), "are not fetched"),
        (ask("data:image/png;base64,aGVsbG8="), "corrupt or of an unsupported type"),
        (ask("file:///etc/hostname"), "does not lie within allowed_local_media_path"),
        (ask(*[data_url(1)] * 3), "3 images in one prompt: at most 2 are allowed"),
        ([{"role": "user", "content": "<image>"}], "0 images for a prompt of 1 image placeholders"),
    ],
)
def test_a_bad_picture_is_a_bad_request(seeing: Running, messages: Any, words: str) -> None:
    reply = post(seeing, "/v1/chat/completions", json={"model": NAME, "messages": messages})
    assert reply.status_code == 400
    assert words in reply.json()["error"]["message"]
    assert reply.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "input_audio"}, "messages.0.content.0: Input tag 'input_audio'"),
        ({"type": "image_url"}, "messages.0.content.0.image_url.image_url: Field required"),
        ({"type": "image_url", "image_url": "x"}, "messages.0.content.0.image_url.image_url: "),
    ],
)
def test_malformed_parts_are_bad_requests(
    seeing: Running, part: dict[str, Any], words: str
) -> None:
    body = {"model": NAME, "messages": [{"role": "user", "content": [part]}]}
    reply = post(seeing, "/v1/chat/completions", json=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"].startswith(words)


def test_a_completion_cannot_have_pictures(seeing: Running) -> None:
    placeholder = seeing.llm.tokenizer.encode("<image>", add_special_tokens=False)
    for prompt in ("<image> What is it?", ["a", "<image>"], placeholder):
        reply = post(seeing, "/v1/completions", json={"model": NAME, "prompt": prompt})
        assert reply.status_code == 400
        assert "0 images for a prompt of 1" in reply.json()["error"]["message"]
    assert (
        post(
            seeing, "/v1/completions", json={"model": NAME, "prompt": "a", "max_tokens": 1}
        ).status_code
        == 200
    )


def test_a_text_model_refuses_pictures(running: Running) -> None:
    reply = post(
        running, "/v1/chat/completions", json={"model": NAME, "messages": ask(data_url(1))}
    )
    assert reply.status_code == 400
    assert "reads text only" in reply.json()["error"]["message"]
