"""A tiny random model with a byte tokenizer, and real uvicorn servers in threads."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import tokenizers
import torch
import transformers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from smart_decoding.models.text.tokenizer import Tokenizer
from smart_decoding.server import preparation_process
from smart_decoding.server.launch import Server, bind, make_server
from smart_decoding.server.preparation import setup_of
from smart_decoding.server.preparation_process import HEAD, unframed
from smart_decoding.server.settings import ServerSettings

if TYPE_CHECKING:
    from smart_decoding.llm import LLM
    from smart_decoding.server.worker import Worker

NAME = "tiny"
STREAMED = {
    "model": NAME,
    "prompt": "abcabcabc",
    "max_tokens": 900,
    "ignore_eos": True,
    "temperature": 0,
    "stream": True,
}
LONG = {"model": NAME, "prompt": "a", "max_tokens": 300, "ignore_eos": True, "temperature": 0}


def outgrowing(start: str, count: int) -> str:
    """A grammar so ambiguous that it outgrows llguidance's limits some tokens into `r0`."""
    rules = [f'r{i}: r{(i + 1) % count} r{(i + 2) % count} | "a" | "b" | "c"' for i in range(count)]
    return "\n".join([f"start: {start}", *rules])


OUTGROWING = outgrowing("r0", 80)
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)


def save_tiny_model(folder: Path, vocab_size: int = 258) -> Path:
    """Random weights, a token a byte, and a chat template. Ids from 258 on have no text."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=200,
        vocab_size=vocab_size,
        max_position_embeddings=4096,
        initializer_range=0.15,
        bos_token_id=256,
        eos_token_id=257,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken("<bos>", special=True), AddedToken("<eos>", special=True)]
    )
    Tokenizer(backend, {"bos_token": "<bos>", "eos_token": "<eos>"}, TEMPLATE).save(folder)
    return folder


@dataclass
class Running:
    """A server that answers. `llm` is the one in its worker."""

    url: str
    worker: Worker
    server: Server
    thread: threading.Thread

    @property
    def llm(self) -> LLM:
        assert self.worker.llm is not None
        return self.worker.llm

    def idle(self, seconds: float = 5.0) -> bool:
        """Whether requests hold no slots and pages any more within `seconds`."""
        pool = self.llm.engine.pool
        return wait_for(lambda: self.worker.active == 0 and pool.used == 0, seconds)

    def quiet(self, seconds: float = 5.0) -> bool:
        """Whether no request is under way any more within `seconds`."""
        return wait_for(lambda: not self.server.server_state.tasks, seconds)


def wait_for(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


@contextmanager
def serving(load: Callable[[], LLM], ready: bool = True, **settings: Any) -> Iterator[Running]:
    """A server on a free port, or the one given."""
    given = ServerSettings(**{"model_name": NAME, "shutdown_timeout": 5, **settings})
    server, worker = make_server(load, given)
    with bind("127.0.0.1", settings.get("port", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        running = Running(url, worker, server, thread)
        try:
            assert wait_for(lambda: server.started and (not ready or worker.llm is not None), 30)
            yield running
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


@contextmanager
def stretches_of_loops() -> Iterator[list[float]]:
    """Processor seconds of each callback of an event loop: as long as one of them nobody else's
    request is looked at, however few processors the machine has left. Of garbage is searched what
    comes from now on, as in a process of `smart serve`."""
    found: list[float] = []
    run = asyncio.Handle._run

    def timed(handle: asyncio.Handle) -> None:
        began = time.thread_time()
        run(handle)
        found.append(time.thread_time() - began)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio.Handle, "_run", timed)
        gc.collect()
        gc.freeze()
        try:
            yield found
        finally:
            gc.unfreeze()


@contextmanager
def client(running: Running, address: str = "127.0.0.2") -> Iterator[httpx.Client]:
    """One that comes from another address."""
    transport = httpx.HTTPTransport(local_address=address)
    with httpx.Client(base_url=running.url, timeout=30, transport=transport) as made:
        yield made


def longest_gap(running: Running, done: threading.Event, address: str = "127.0.0.2") -> float:
    """Seconds between two pieces of a stream, or to an answer about health, at most."""
    longest = 0.0
    whole = 0
    end = time.monotonic() + 60.0  # a test that fails does not say that it is done
    with client(running, address) as bystander:
        while not done.is_set() and time.monotonic() < end:
            last = time.monotonic()
            lines = [""]
            with bystander.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as r:
                r.raise_for_status()
                for line in filter(None, r.iter_lines()):
                    lines.append(line)
                    longest = max(longest, time.monotonic() - last)
                    last = time.monotonic()
            assert lines[-1] == "data: [DONE]"
            whole += 1
            for path in ("/health", "/metrics"):
                bystander.get(path).raise_for_status()
                longest = max(longest, time.monotonic() - last)
                last = time.monotonic()
    assert whole
    return longest


def slow(llm: LLM, seconds: float) -> LLM:
    """The same model, whose every round takes a little longer."""
    step = llm.engine.step

    def slower(*given: Any) -> Any:
        time.sleep(seconds)
        return step(*given)

    llm.engine.step = slower  # type: ignore[method-assign]
    return llm


def prepared(llm: LLM, task: bytes) -> Any:
    """The result of a task, in this process."""
    preparation = preparation_process.Tasks(**setup_of(llm))
    return unframed(preparation_process.answer(preparation, task)[HEAD.size :])["result"]


def post(running: Running, path: str, **options: Any) -> httpx.Response:
    return httpx.post(running.url + path, timeout=20, **options)


@contextmanager
def reading(stream: httpx.Response, read: Callable[[str], object]) -> Iterator[None]:
    """While another thread reads the lines of a stream."""
    stop = threading.Event()

    def read_all() -> None:
        for line in stream.iter_lines():
            read(line)
            if stop.is_set():
                return

    reader = threading.Thread(target=read_all)
    reader.start()
    yield
    stop.set()
    reader.join()


@contextmanager
def busy(running: Running, headers: dict[str, str] | None = None, **more: Any) -> Iterator[None]:
    """While one answer streams."""
    body = {**STREAMED, **more}
    url = f"{running.url}/v1/completions"
    with (
        httpx.stream("POST", url, json=body, headers=headers, timeout=30) as stream,
        reading(stream, lambda _: None),
    ):
        yield
