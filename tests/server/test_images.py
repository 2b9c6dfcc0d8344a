"""Pictures in OpenAI's messages: the official client, and what is refused."""

from __future__ import annotations

import base64
import io
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from serving import NAME, Running, post, prepared, serving, slow, wait_for

from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.llm import LLM
from smart_decoding.multimodal import prompts
from smart_decoding.server import pictures
from smart_decoding.server.chat import chat_task
from smart_decoding.server.schemas import Message
from smart_decoding.server.tools import Tool, explained

sys.path.append(str(Path(__file__).parents[1] / "parity"))
from vision import picture, save_llava, save_qwen2_vl


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
            (expected,) = plain.chat(
                [{"role": "user", "content": content}], SamplingParams(temperature=0, max_tokens=12)
            )
            whole = client.chat.completions.create(**request)
            assert whole.choices[0].message.content == expected.outputs[0].text
            assert whole.usage.prompt_tokens == len(expected.prompt_token_ids)
            stream = client.chat.completions.create(**request, stream=True)
            assert (
                "".join(chunk.choices[0].delta.content or "" for chunk in stream)
                == expected.outputs[0].text
            )
            answers.add(expected.outputs[0].text)
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


LISTS = (
    "SYSTEM: {% for m in messages %}{{ m['role'] }}:"
    "{% for part in m['content'] | selectattr('type', 'equalto', 'text') %} {{ part['text'] }}"
    "{% endfor %}{% endfor %}"
)


def test_a_template_of_lists_reads_a_conversation_with_tools(folder: Path) -> None:
    """As llava-hf's templates are: contents that were texts are nothing to them."""
    llm = LLM(folder, speculative_config=False, chat_template=LISTS, max_model_len=512)
    messages = [{"role": "user", "content": "What time is it?"}]
    described = {"type": "function", "function": {"name": "now"}}
    offered = [Tool.model_validate(described)]
    task = chat_task(llm, [Message.model_validate(each) for each in messages], offered).task
    tokens = prepared(llm, task)[0]
    assert "What time is it?" in llm.tokenizer.decode(tokens)
    assert tokens == llm.chat_prompt(explained(messages, [described])).tokens


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


def one_colour(side: int, seed: int = 0) -> str:
    """A data URL of a few kilobytes, of many megapixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (seed, 100, 50)).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def kilobytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


@pytest.fixture(scope="module")
def many(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Running]]:
    """Servers of both kinds of models that take 16 pictures a prompt."""
    made = tmp_path_factory.mktemp("qwen")
    save_qwen2_vl(made)
    options: dict[str, Any] = {"dtype": "float32", "max_model_len": 800, "max_num_seqs": 4}
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                serving(lambda each=each: LLM(each, speculative_config=False, **options))
            )
            for each in (folder, made)
        ]


def gap_beside(running: Running, body: dict[str, Any]) -> float:
    """The longest time to an answer about health and one of a token, while another is answered."""
    small = {"model": NAME, "prompt": "a", "max_tokens": 1}
    gaps = [0.0]
    elsewhere = httpx.HTTPTransport(local_address="127.0.0.2")
    with (
        ThreadPoolExecutor() as pool,
        httpx.Client(base_url=running.url, transport=elsewhere, timeout=30) as bystander,
    ):
        sent = pool.submit(httpx.post, f"{running.url}/v1/chat/completions", json=body, timeout=60)
        while not sent.done():
            began = time.monotonic()
            assert bystander.get("/health").status_code == 200
            assert bystander.post("/v1/completions", json=small).status_code == 200
            gaps.append(time.monotonic() - began)
        assert sent.result().status_code == 200, sent.result().text
    return max(gaps)


@pytest.mark.parametrize("which", [0, 1])
def test_sixteen_large_pictures_cost_little_memory_and_nobody_elses_time(
    many: list[Running], which: int
) -> None:
    """They were 4.9 GB. Of the gap the least of three counts: other tests run beside this one."""
    running = many[which]
    body = {"model": NAME, "max_tokens": 2, "messages": ask(*[one_colour(3584)] * 16)}
    post(running, "/v1/chat/completions", json={**body, "messages": ask(one_colour(20))})
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
    before = kilobytes("VmRSS")
    gap = gap_beside(running, body)
    assert (kilobytes("VmHWM") - before) / 1024 < 256
    for _ in range(2):
        if gap >= 0.3:
            gap = min(gap, gap_beside(running, body))
    assert gap < 0.3
    assert running.idle()


def test_a_prompt_too_long_is_refused_before_a_picture_is_decoded(
    many: list[Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    monkeypatch.setattr(prompts, "open_image", lambda *_: decoded.append(1))
    messages = ask(*[one_colour(3584)] * 16)
    messages[0]["content"].append({"type": "text", "text": "x" * 700})
    for running in many:
        body = {"model": NAME, "messages": messages}
        reply = post(running, "/v1/chat/completions", json=body)
        assert reply.status_code == 400
        assert reply.json()["error"]["code"] == "context_length_exceeded"
        counted = post(running, "/tokenize", json={"messages": ask(one_colour(3584))})
        assert counted.status_code == 200
    assert decoded == []


def test_pictures_that_wait_are_bytes_within_bounds_and_are_dropped_at_the_end(
    many: list[Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "MOST_OF_ONE", 20_000)
    monkeypatch.setattr(pictures, "MOST", 40_000)
    running = many[1]
    held = running.worker.pictures
    url = f"{running.url}/v1/chat/completions"
    body = {"model": NAME, "max_tokens": 60, "ignore_eos": True, "messages": ask(data_url(1))}
    size = held_by(running, ask(data_url(1)))
    fitting = 20_000 // size
    engine = running.llm.engine
    slow(running.llm, 0.02)
    with ThreadPoolExecutor() as pool:
        sent = [pool.submit(httpx.post, url, json=body, timeout=60) for _ in range(fitting)]
        assert wait_for(lambda: len(engine._requests) == fitting)
        assert held._held == {"127.0.0.1": fitting * size}
        assert all(
            picture.pixels.frames.dtype == np.uint8 and picture.pixels.frames.nbytes == size
            for request in list(engine._requests.values())
            for picture in request.media.pictures
        )
        refused = httpx.post(url, json=body, timeout=60)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "queue_full"
        assert "retry-after" in refused.headers
        elsewhere = httpx.HTTPTransport(local_address="127.0.0.2")
        with httpx.Client(transport=elsewhere, timeout=60) as bystander:
            assert bystander.post(url, json={**body, "max_tokens": 1}).status_code == 200
        assert all(each.result().status_code == 200 for each in sent)
    assert running.idle()
    assert held._held == {}
    kept = [*engine._batched, *engine.last_round.requests]
    assert kept
    pictures_kept = [p for r in kept if r.media for p in r.media.pictures]
    assert all(p.pixels is None and p.embeddings is None for p in pictures_kept)


def test_a_server_bounds_the_pixels_of_what_must_be_turned(seeing: Running) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("L", (5100, 5000)).save(buffer, "JPEG", exif=exif)
    url = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    reply = post(seeing, "/v1/chat/completions", json={"model": NAME, "messages": ask(url)})
    assert reply.status_code == 400
    assert "1/2 of max_image_pixels=50000000" in reply.json()["error"]["message"]


def held_by(running: Running, messages: list[dict[str, Any]]) -> int:
    prompts = running.llm.prompts
    conversation, pictures = prompts.split(messages)
    tokens, text = prompts.conversations.tokens(conversation)
    return prompts.plan(tokens, pictures, text).bytes


def test_who_hangs_up_or_is_refused_gives_its_room_back(many: list[Running]) -> None:
    running = many[1]
    url = f"{running.url}/v1/chat/completions"
    body = {"model": NAME, "messages": ask(data_url(1)), "max_tokens": 300, "ignore_eos": True}
    with httpx.stream("POST", url, json={**body, "stream": True}, timeout=30) as stream:
        next(stream.iter_lines())
        assert running.worker.pictures._held
    assert wait_for(lambda: not running.worker.pictures._held)
    broken = data_url(1)[:-60]
    for change in ({"max_tokens": 4000}, {"messages": ask(broken[: len(broken) // 4 * 4])}):
        assert post(running, "/v1/chat/completions", json={**body, **change}).status_code == 400
    assert running.worker.pictures._held == {}


def test_a_picture_of_another_key_is_not_told_by_its_embeddings(folder: Path) -> None:
    """They are kept, and computing them takes time."""
    made = lambda: LLM(folder, speculative_config=False, dtype="float32", max_model_len=400)  # noqa: E731
    body = {"model": NAME, "max_tokens": 1, "messages": ask(data_url(1))}
    with serving(made, api_keys=("a", "b")) as running:
        tower = running.llm.target._tower
        run = tower._run
        computed: list[str] = []
        tower._run = lambda pixels: computed.append(key) or run(pixels)  # type: ignore[method-assign]
        for key in ("a", "b", "a", "b"):
            headers = {"authorization": f"Bearer {key}"}
            reply = post(running, "/v1/chat/completions", json=body, headers=headers)
            assert reply.status_code == 200
        assert computed == ["a", "b"]
