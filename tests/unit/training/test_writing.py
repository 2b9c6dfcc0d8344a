"""What a target writes to train on, without a model: user turns, pictures, shards."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from smart_decoding.cli import main as cli
from smart_decoding.errors import ModelError
from smart_decoding.multimodal.prompts import MediaPrompt
from smart_decoding.training import generate as writing
from smart_decoding.training import shards
from smart_decoding.training.conversations import load_conversations
from smart_decoding.training.generate import Recorder, generate
from smart_decoding.training.shards import Recorded, Writer, have_pictures

if TYPE_CHECKING:
    from smart_decoding.engine.media import Media

END = 0  # the token of <end>


def recorded(first: int, length: int = 30) -> Recorded:
    tokens = [first, *range(1, length)]
    return Recorded(tokens, 4, torch.zeros(length, 8, dtype=torch.bfloat16), [])


def test_shards_are_never_written_over(tmp_path: Path) -> None:
    """Neither where one was removed, nor where another writer is at work."""
    writer, other = Writer(tmp_path), Writer(tmp_path)
    for each in (writer, other, writer):
        each.add(recorded(7))
        each.flush()
    assert Writer(tmp_path).tokens == 90
    written = shards.shards_in(tmp_path)
    assert len(written) == 3
    written[0].unlink()
    again = Writer(tmp_path)
    again.add(recorded(8))
    again.flush()
    assert len(shards.shards_in(tmp_path)) == 3
    assert Writer(tmp_path).tokens == 90


def test_tokens_are_counted_and_not_shards(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    writer.add(recorded(7, 30))
    writer.add(recorded(8, 40))
    assert writer.tokens == 70
    writer.flush()
    assert Writer(tmp_path).tokens == 70
    assert Writer(tmp_path).prompts() == {(7, 1, 2, 3), (8, 1, 2, 3)}


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    writer.add(recorded(7))
    writer.flush()
    (path,) = shards.shards_in(tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    for read in (Writer, load_conversations, have_pictures):
        with pytest.raises(ModelError, match=rf"{path.name} .* corrupt"):
            read(tmp_path)


class Stub:
    """Characters are tokens; each request writes `says`, then END."""

    def __init__(self, says: str) -> None:
        self.says = says
        self.requests: list[tuple[str, list[int], Any]] = []
        self.running: list[Any] = []
        self.tokenizer = SimpleNamespace(encode=self.encode)
        self.engine = SimpleNamespace(add_request=self.add, step=self.step)
        self.recorder = Recorder((1,))

    @staticmethod
    def encode(text: str, add_special_tokens: bool = True) -> list[int]:
        return [END if c == "$" else ord(c) for c in text.replace("<end>", "$")]

    @staticmethod
    def decode(tokens: list[int], skip_special_tokens: bool = True) -> str:
        return "".join("<end>" if token == END else chr(token) for token in tokens)

    def chat_prompt(self, messages: list[dict[str, str]]) -> MediaPrompt:
        text = f"user:{messages[0]['content']}<end>model:"
        return MediaPrompt(self.encode(text), None, text)

    def add(self, name: str, prompt: list[int], params: Any, media: Media | None) -> None:
        self.requests.append((name, list(prompt), params))
        tokens = [*prompt, *map(ord, self.says), END]
        stop = SimpleNamespace(text=self.says)
        request = SimpleNamespace(id=name, prompt=prompt, tokens=tokens, media=media, stop=stop)
        request.finished = True
        self.running.append(request)

    def step(self) -> list[Any]:
        done, self.running = self.running, []
        for request in done:
            if request.id in self.recorder.request_ids:
                self.recorder.extend(request, torch.zeros(len(request.tokens) - 1, 8), 0, [])
            self.recorder.release(request)
        return done


def two_at_once(monkeypatch: pytest.MonkeyPatch, says: str, complete: bool) -> Any:
    """A target that says this, and turns that are complete, or that it goes on with."""
    monkeypatch.setattr(writing, "CONCURRENT", 2)
    monkeypatch.setattr(writing, "user_turn", lambda rng: (f"Tell {rng.integers(1e9)}", complete))
    return Stub(says)


def test_a_turn_that_the_target_completes_ends_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the template's end of a turn is: its token is the template's to write."""
    llm = two_at_once(monkeypatch, " of tides please, and at some length", complete=False)
    generate(llm, llm.recorder, tmp_path, 100)
    answers = [Stub.decode(prompt) for name, prompt, _ in llm.requests if name.startswith("answer")]
    assert answers
    for text in answers:
        assert text.startswith("user:Tell ")
        assert text.endswith(" of tides please, and at some length<end>model:")
        assert text.count("<end>") == 1
    written, _ = load_conversations(tmp_path)
    assert written[0].answer == len(written[0].prompt) == len(Stub.encode(answers[0]))


def test_conversations_that_are_done_are_written_whatever_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = two_at_once(monkeypatch, "of tides, and at some length", complete=True)
    step = llm.step
    done: list[Any] = []

    def interrupted() -> list[Any]:
        if done:
            raise KeyboardInterrupt
        done.extend(step())
        return done

    llm.engine.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        generate(llm, llm.recorder, tmp_path, 10_000)
    written, _ = load_conversations(tmp_path)
    assert len(written) == len(done) == 2


def test_the_same_question_about_a_picture_is_answered_greedily_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "CONCURRENT", 4)
    llm: Any = Stub("it is a cat on a mat, asleep")
    pictures = [SimpleNamespace(key=key) for key in (b"a", b"b")]

    def ask(messages: Any) -> MediaPrompt:
        media: Any = SimpleNamespace(pictures=[messages], mm_embeds=lambda first, last: [])
        return MediaPrompt(Stub.encode("user:What?<end>model:"), media)

    llm.chat_prompt = ask
    generate(llm, llm.recorder, tmp_path, 400, turn=lambda rng: pictures[int(rng.integers(2))])
    greedy = [params for _, _, params in llm.requests if params.temperature == 0]
    assert len(greedy) <= 2 < len(llm.requests)


def test_conversations_about_pictures_need_pictures_for_the_prior(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """That is said before an hour of training, not behind it."""
    from smart_decoding.cli import train

    data = tmp_path / "data"
    data.mkdir()
    rows = np.arange(4)
    tensors = {
        "tokens": torch.zeros(30, dtype=torch.int32),
        "visual": torch.from_numpy(rows),
        "embeddings": torch.zeros(4, 8, dtype=torch.bfloat16),
    }
    save_file(tensors, data / "shard-0000.safetensors")
    assert have_pictures(data)
    config = SimpleNamespace(layers=2)
    monkeypatch.setattr(train, "_target", lambda args: SimpleNamespace(config=config))
    monkeypatch.setattr(train, "_use_huge_pages", lambda: None)
    assert cli.main(["train", "--output", str(tmp_path), "--skip-generation"]) == 2
    assert "are about pictures: give --images" in capsys.readouterr().err
    assert cli.main(["train", "--output", str(tmp_path), "--seed", "-1"]) == 2
    assert "seed must be an integer from 0" in capsys.readouterr().err
