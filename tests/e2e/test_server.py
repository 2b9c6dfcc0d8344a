"""The default model behind the server, speculating: the answer is what `LLM` gives without
speculation."""

from __future__ import annotations

import json
import socket
import threading
import time

import openai
import pytest

from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.engine.structured import StructuredOutputsParams
from smart_decoding.llm import LLM
from smart_decoding.server.launch import bind, make_server
from smart_decoding.server.settings import ServerSettings

pytestmark = pytest.mark.model

MODEL = "smollm2-135m"
MESSAGES = [{"role": "user", "content": "Why is the sky blue?"}]
SCHEMA = {
    "type": "object",
    "properties": {"reason": {"type": "string", "maxLength": 40}, "sure": {"type": "boolean"}},
    "required": ["reason", "sure"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}


def test_the_answer_is_generates() -> None:
    options = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 2}
    params = {"temperature": 0.0, "max_tokens": 24}
    plain = LLM(MODEL, speculative_config=False, **options)
    expected = plain.chat(MESSAGES, SamplingParams(**params))[0].outputs[0]
    structure = StructuredOutputsParams(json=SCHEMA)
    formed = plain.chat(
        MESSAGES, SamplingParams(temperature=0, max_tokens=100, structured_outputs=structure)
    )
    smart = {"method": "ngram", "policy": "static"}  # needs no profile of this machine
    server, worker = make_server(
        lambda: LLM(MODEL, speculative_config=smart, **options), ServerSettings(MODEL)
    )
    listener: socket.socket = bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + 60
        while worker.llm is None and worker.error is None and time.monotonic() < deadline:
            time.sleep(0.02)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, **params)
            stream = client.chat.completions.create(
                model=MODEL, messages=MESSAGES, stream=True, **params
            )
            streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            shaped = client.chat.completions.create(
                model=MODEL,
                messages=MESSAGES,
                temperature=0,
                max_tokens=100,
                response_format=FORMAT,
            )
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
    assert answer.choices[0].message.content == streamed == expected.text != ""
    assert answer.usage.completion_tokens == len(expected.token_ids)
    assert shaped.choices[0].message.content == formed[0].outputs[0].text
    value = json.loads(shaped.choices[0].message.content)
    assert set(value) == {"reason", "sure"}
    assert len(value["reason"]) <= 40
