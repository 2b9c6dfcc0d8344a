"""A training run that was interrupted goes on where it stopped, and leaves no half-written file
behind."""

from __future__ import annotations

import io
import json
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from smart_decoding.cli import main as cli
from smart_decoding.errors import ConfigError, ModelError
from smart_decoding.kernels.weights import QuantizedTensor, as_tensor
from smart_decoding.models.checkpoints.loading import Checkpoint
from smart_decoding.models.checkpoints.rounding import RoundedWeights
from smart_decoding.models.families.config import ModelConfig
from smart_decoding.models.heads.export import write_head
from smart_decoding.models.heads.files import HeadFiles, load_head
from smart_decoding.models.heads.forms import EAGLE2
from smart_decoding.training import train
from smart_decoding.training.conversations import hold_out, recorded_layers
from smart_decoding.training.head import Form, TrainableHead, narrowed
from smart_decoding.training.train import Trainer, TrainOptions

CONFIG = ModelConfig("llama", 2, 32, 4, 2, 16, 48, 61, 10_000.0, 1e-5, 256, tie_embeddings=True)
AUX_LAYERS = (1, 2)
STEP = 10.0  # seconds that a step takes on the clock below
STEPS = 24
FILES = {"config.json", "model.safetensors", "state.pt", "training.json"}


class Clock:
    """Each second look is STEP later: a step starts and ends."""

    def __init__(self) -> None:
        self.looks = 0

    def __call__(self) -> float:
        self.looks += 1
        return STEP * self.looks


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        train, "time", SimpleNamespace(monotonic=Clock(), perf_counter=time.perf_counter)
    )
    monkeypatch.setattr(train, "bf16_is_faster", lambda: False)
    monkeypatch.setattr(train, "SAVE_EVERY", 1e9)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty conversations of 20 to 40 tokens."""
    folder = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 41, (40,), generator=generator)
    total = int(lengths.sum())
    tensors = {
        "tokens": torch.randint(0, CONFIG.vocab, (total,), generator=generator).int(),
        "taps": torch.randn(total, len(AUX_LAYERS) * CONFIG.hidden, generator=generator).bfloat16(),
        "starts": torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0))),
        "answers": torch.full((40,), 6),
    }
    save_file(tensors, folder / "shard-0000.safetensors")
    return folder


@pytest.fixture
def trainer(data: Path, tmp_path: Path) -> Callable[..., Trainer]:
    generator = torch.Generator().manual_seed(3)
    weights = {
        n: torch.randn(s, generator=generator) * 0.2 for n, s in CONFIG.expected_shapes().items()
    }

    def make(
        output: str = "head", aux_layers: tuple[int, ...] = AUX_LAYERS, **more: Any
    ) -> Trainer:
        options = TrainOptions(
            aux_layers, STEP * STEPS, draft_vocab=32, batch_tokens=150, max_unroll=2, **more
        )
        return Trainer(
            Checkpoint(CONFIG, weights, tmp_path, {"model": "tiny"}),
            data,
            tmp_path / output,
            options,
        )

    return make


def during_step(trainer: Trainer, number: int, action: Callable[[], object]) -> None:
    """Does `action` in the middle of the step of that number, counted from 1 over all runs."""
    really = trainer._optimiser.step

    def step(*given: Any) -> None:
        really(*given)
        if trainer.steps + 1 == number:
            action()

    trainer._optimiser.step = step  # type: ignore[method-assign]


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_head_in_quants_is_measured_as_it_is_written_and_goes_on_as_it_was(
    trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    trainer("plain").run()
    rounded = trainer("rounded", quantization="int4")
    rounded.run()
    plain, written = (load_head(tmp_path / each, CONFIG).weights for each in ("plain", "rounded"))
    expected = RoundedWeights(plain, "int4")
    assert {name for name, weight in written.items() if isinstance(weight, QuantizedTensor)}
    for name, weight in written.items():
        assert torch.equal(as_tensor(weight), as_tensor(expected[name])), name
    assert torch.equal(rounded.head.fc.weight, as_tensor(written["fc.weight"]).float())
    states = [torch.load(tmp_path / each / "state.pt")["head"] for each in ("plain", "rounded")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[1]["fc.weight"], rounded.head.fc.weight)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"quantization": "int3"}, "none of int8, int4"),
        ({"quantization": "int4", "layout": "eagle3"}, "has no words for a head in quants"),
    ],
)
def test_quants_that_cannot_be_written_are_refused_before_training(
    more: dict[str, str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        TrainOptions(AUX_LAYERS, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("stops", [(1,), (7,), (3, 15, 23)])
def test_an_interrupted_run_ends_like_one_that_was_not(
    trainer: Callable[..., Trainer], tmp_path: Path, stops: tuple[int, ...]
) -> None:
    expected = trainer("whole").run()
    assert expected["steps"] == STEPS
    assert expected["epochs"] > 2
    for stop in stops:
        stopped = trainer()
        during_step(stopped, stop, ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            stopped.run()
        assert names(tmp_path / "head") == {"state.pt"}
        resumed = trainer()
        assert (resumed.steps, resumed.trained, resumed.elapsed) == (
            stop,
            stopped.trained,
            stop * STEP,
        )
        assert resumed.epochs == stopped.epochs > 0
        for name, weight in stopped.head.state_dict().items():
            assert torch.equal(resumed.head.state_dict()[name], weight)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    figures = trainer().run()
    assert figures == expected
    assert names(tmp_path / "head") == FILES
    mine, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("head", "whole"))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert json.loads((tmp_path / "head" / "training.json").read_text())["figures"] == expected
    assert load_head(tmp_path / "head", CONFIG).aux_layers == AUX_LAYERS


def test_a_finished_run_is_only_measured_again(trainer: Callable[..., Trainer]) -> None:
    expected = trainer().run()
    again = trainer()
    assert again.run() == expected
    assert again.steps == STEPS


def test_a_crash_costs_what_came_after_the_last_checkpoint(
    trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "SAVE_EVERY", 5 * STEP)

    def crash() -> None:
        raise RuntimeError("power cut")

    crashed = trainer()
    during_step(crashed, 10, crash)
    with pytest.raises(RuntimeError, match="power cut"):
        crashed.run()
    resumed = trainer()
    assert 0 < resumed.steps < 10
    assert resumed.elapsed == resumed.steps * STEP
    assert resumed.run()["steps"] == STEPS


def test_every_epoch_sees_every_conversation_once(trainer: Callable[..., Trainer]) -> None:
    stopped = trainer()
    size = len(stopped._train)
    for first in (0, 5):  # from the beginning, and from within an epoch
        batches = stopped._batches()
        stopped.trained = 0
        trained_ids = [id(item) for batch in take(batches, first, stopped) for item in batch]
        trained_ids += [
            id(item) for batch in until(stopped._batches(), size, stopped) for item in batch
        ]
        assert len(trained_ids) == size == len(set(trained_ids))


def take(batches: Iterator[list[Any]], count: int, trainer: Trainer) -> list[list[Any]]:
    taken = []
    for _ in range(count):
        taken.append(next(batches))
        trainer.trained += len(taken[-1])
    return taken


def until(batches: Iterator[list[Any]], size: int, trainer: Trainer) -> list[list[Any]]:
    taken = []
    while trainer.trained < size:
        taken += take(batches, 1, trainer)
    return taken


def test_a_full_disk_is_reported_as_one(
    trainer: Callable[..., Trainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch says `unexpected pos` in its place. A limit of file sizes stands for the disk."""
    resource = pytest.importorskip("resource")
    full = trainer()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(RuntimeError) as caught:
            full._save_state()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    code, message = cli._described(caught.value, debug=False)
    assert (code, message) == (2, "cannot write a file: File too large: make room there")
    assert not [*(tmp_path / "head").iterdir()]


def test_a_head_that_is_not_finite_is_refused(
    trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    trainer().run()
    path = tmp_path / "head" / "model.safetensors"
    tensors = load_file(path)
    name = "fc.weight"
    tensors[name].flatten()[1] = torch.nan
    save_file(tensors, path)
    with pytest.raises(ModelError, match=f"tensor {name} holds numbers that are not finite"):
        load_head(tmp_path / "head", CONFIG)


@pytest.mark.parametrize(
    "writer",
    ["torch.save", "smart_decoding.models.heads.export.save_file", "pathlib.Path.write_text"],
)
def test_ctrl_c_while_writing_keeps_the_older_file(
    trainer: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    trainer().run()
    before = {name: (tmp_path / "head" / name).read_bytes() for name in FILES}

    def half(*given: Any, **more: Any) -> None:
        where = next(g for g in given if isinstance(g, Path | io.IOBase))
        with where.open("wb") if isinstance(where, Path) else where as file:
            file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writer, half)
        with pytest.raises(KeyboardInterrupt):
            trainer().run()
    after = {name: (tmp_path / "head" / name).read_bytes() for name in names(tmp_path / "head")}
    assert after.keys() == before.keys()
    load_file(tmp_path / "head" / "model.safetensors")
    assert json.loads(after["config.json"]) == json.loads(before["config.json"])
    assert trainer().steps == STEPS


def test_a_second_ctrl_c_interrupts_at_once(
    trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    stopped = trainer()

    def twice() -> None:
        ctrl_c()
        ctrl_c()

    during_step(stopped, 2, twice)
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    assert stopped.steps == 1
    assert not (tmp_path / "head").exists()


def test_a_run_goes_on_from_a_head_and_writes_its_layout(
    data: Path, trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    """What another run gave, written as EAGLE-3: the output rows are the head's own now, and learn
    too."""
    generator = torch.Generator().manual_seed(5)
    weights = {
        n: torch.randn(s, generator=generator) * 0.2 for n, s in CONFIG.expected_shapes().items()
    }
    checkpoint = Checkpoint(CONFIG, weights, tmp_path, {"model": "tiny"})
    options = TrainOptions(AUX_LAYERS, STEP * STEPS, 32, 150, max_unroll=2, layout="eagle3")
    first = Trainer(checkpoint, data, tmp_path / "first", options)
    earlier = first.run()["held_out_top_1_2_4_by_depth"]["1"]
    init = load_head(tmp_path / "first", CONFIG)
    assert "fc_norm.0.weight" not in init.weights
    assert init.aux_layers == AUX_LAYERS
    second = Trainer(checkpoint, data, tmp_path / "second", options, None, init)
    assert torch.equal(second.draft_ids, init.weights["draft_ids"])
    assert second.evaluate()["held_out_top_1_2_4_by_depth"]["1"] == pytest.approx(
        earlier, abs=0.05
    )  # bf16
    assert second.run()["steps"] == STEPS
    after = load_head(tmp_path / "second", CONFIG)
    for name in ("lm_head.weight", "fc.weight", "midlayer.self_attn.q_proj.weight"):
        assert after.weights[name].shape == init.weights[name].shape
        assert not torch.equal(after.weights[name], init.weights[name])


def test_a_narrower_network_keeps_the_neurons_that_carry_most() -> None:
    """So that nothing changes where the others do nothing."""
    torch.manual_seed(0)
    gate, up, down = torch.randn(48, 8), torch.randn(48, 8), torch.randn(8, 48)
    down[:, 1::3] = 0.0
    x = torch.randn(5, 8)

    def network(weights: list[torch.Tensor]) -> torch.Tensor:
        gate, up, down = weights
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    kept = narrowed([gate, up, down], 32)
    assert [len(kept[0]), len(kept[1]), kept[2].shape[1]] == [32, 32, 32]
    torch.testing.assert_close(network(kept), network([gate, up, down]))
    with pytest.raises(ConfigError, match="intermediate_size=64, but training starts from 48"):
        narrowed([gate, up, down], 64)


@pytest.mark.parametrize("from_head", [False, True])
def test_a_narrower_head_is_trained_and_read_back(
    data: Path, trainer: Callable[..., Trainer], tmp_path: Path, from_head: bool
) -> None:
    wide = trainer("wide")
    wide.run()
    init = load_head(tmp_path / "wide", CONFIG) if from_head else None
    options = replace(wide.options, intermediate_size=32)
    narrow = Trainer(wide._checkpoint, data, tmp_path / "narrow", options, None, init)
    assert narrow.run()["steps"] == STEPS
    files = load_head(tmp_path / "narrow", CONFIG)
    assert files.shape.ffn == 32
    assert files.weights["midlayer.mlp.down_proj.weight"].shape == (CONFIG.hidden, 32)
    with pytest.raises(ConfigError, match="no multiple of 32"):
        replace(options, intermediate_size=40)


def test_an_eagle1_head_learns_too(
    data: Path, trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    """It reads the last layer's output, and the target's whole vocabulary ranks what comes out."""
    checkpoint = trainer()._checkpoint
    folder = tmp_path / "eagle1"
    torch.manual_seed(6)
    head = TrainableHead(
        Form(replace(CONFIG, layers=1), 1, fc_norm=False, fused=True, fc_bias=True)
    )
    weights = {**head.exported(), "draft_ids": torch.arange(CONFIG.vocab)}
    write_head(
        HeadFiles({}, weights, (CONFIG.layers,), head.config, EAGLE2),
        checkpoint,
        "eagle",
        folder,
    )
    init = load_head(folder, CONFIG)
    tensors = load_file(data / "shard-0000.safetensors")
    (tmp_path / "last").mkdir()
    last = tensors["taps"][:, CONFIG.hidden :].contiguous()
    save_file({**tensors, "taps": last}, tmp_path / "last" / "shard-0000.safetensors")
    options = TrainOptions(init.aux_layers, STEP * STEPS, 32, 150, max_unroll=2, layout="eagle")
    losses = []
    learner = Trainer(checkpoint, tmp_path / "last", tmp_path / "trained", options, None, init)
    step = learner._step
    learner._step = lambda batch: losses.append(step(batch)) or losses[-1]  # type: ignore[method-assign, func-returns-value]
    learner.run()
    assert sum(losses[-6:]) < sum(losses[:6])
    assert len(losses) == STEPS
    after = load_head(tmp_path / "trained", CONFIG)
    assert after.fused
    assert after.weights.keys() == init.weights.keys()
    assert not torch.equal(after.weights["fc.weight"], init.weights["fc.weight"])


def test_a_head_may_leave_out_the_last_layer_but_its_data_may_not(
    data: Path, trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    """The last layer's output says what the target would have said."""
    assert (
        recorded_layers((1,), CONFIG.layers)
        == AUX_LAYERS
        == recorded_layers(AUX_LAYERS, CONFIG.layers)
    )
    early = trainer(aux_layers=(1,))
    assert early.head.fc.in_features == CONFIG.hidden
    assert early.run()["steps"] == STEPS
    assert load_head(tmp_path / "head", CONFIG).aux_layers == (1,)
    config = json.loads((tmp_path / "head" / "config.json").read_text())
    for wrong in ([CONFIG.layers + 1], [0], []):
        (tmp_path / "head" / "config.json").write_text(json.dumps({**config, "taps": wrong}))
        with pytest.raises(ModelError, match="reads layers"):
            load_head(tmp_path / "head", CONFIG)
    tensors = load_file(data / "shard-0000.safetensors")
    (tmp_path / "other").mkdir()
    save_file(
        {**tensors, "taps": tensors["taps"][:, :32].contiguous()},
        tmp_path / "other" / "shard-0000.safetensors",
    )
    with pytest.raises(ModelError, match=r"with other --aux-layers than \(1, 2\)"):
        Trainer(early._checkpoint, tmp_path / "other", tmp_path / "x", early.options)


def test_a_checkpoint_that_does_not_fit_is_refused(
    trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    stopped = trainer()
    during_step(stopped, 1, ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    path = tmp_path / "head" / "state.pt"
    whole = path.read_bytes()
    for content in (b"", b"junk", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ModelError, match=r"state\.pt is corrupt.*remove it") as caught:
            trainer()
        assert "\n" not in str(caught.value)
    path.write_bytes(whole)
    assert trainer().steps == 1
    with pytest.raises(ModelError, match="other --aux-layers"):
        trainer(aux_layers=(2,))


@given(st.lists(st.integers(0, 2**32 - 1), min_size=9, max_size=120), st.data())
def test_what_was_trained_on_is_never_held_out_later(
    hashes: list[int], draw: st.DataObject
) -> None:
    """Neither by a twin, whose prompt is the same, nor as more is written."""
    data = [SimpleNamespace(prompt_hash=number) for number in hashes]
    fewer = draw.draw(st.integers(1, len(data)))
    for written in (data[:fewer], data):
        trained, held = hold_out(written)  # type: ignore[arg-type]
        assert len(trained) + len(held) == len(written)
        assert len(held) >= min(8, len(written))
        assert not {item.prompt_hash for item in trained} & {item.prompt_hash for item in held}
    before, _ = hold_out(data[:fewer])  # type: ignore[arg-type]
    assert not {item.prompt_hash for item in before} & {item.prompt_hash for item in held}


def test_three_per_cent_of_many_prompts_are_held_out() -> None:
    data = [SimpleNamespace(prompt_hash=number << 20) for number in range(4096)]
    _, held = hold_out(data)  # type: ignore[arg-type]
    assert len(held) == round(0.03 * 4096)


def test_a_prompt_is_its_tokens_and_its_pictures(tmp_path: Path) -> None:
    """The same question about another picture is another prompt, even if no picture is read."""
    tokens = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 9], [5, 6, 7, 8]])
    answers = torch.arange(10).expand(4, 10) + 20
    lengths = torch.full((4,), 14)
    pictures = torch.ones(4, CONFIG.hidden, dtype=torch.bfloat16)
    pictures[3] = 2
    tensors = {
        "tokens": torch.cat((tokens, answers), dim=1).flatten().int(),
        "taps": torch.zeros(56, len(AUX_LAYERS) * CONFIG.hidden).bfloat16(),
        "starts": torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0))),
        "answers": torch.full((4,), 4),
        "visual": torch.arange(4) * 14 + 1,
        "embeddings": pictures,
    }
    save_file(tensors, tmp_path / "shard-0000.safetensors")
    for supports_images in (False, True):
        found, _ = train.load_conversations(tmp_path, supports_images=supports_images)
        first, twin, other_words, other_picture = (item.prompt_hash for item in found)
        assert first == twin
        assert len({first, other_words, other_picture}) == 3


def test_an_answers_end_is_a_target_too(trainer: Callable[..., Trainer]) -> None:
    """The target never reads the last token, so that nothing is recorded of it but what the row
    before it says."""
    made = trainer()
    weights = made._checkpoint.weights
    output = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    for item in made._train:
        last = item.aux_hidden[-1, -CONFIG.hidden :].float()
        normed = last / (last.pow(2).mean() + CONFIG.rms_eps).sqrt() * weights["model.norm.weight"]
        assert len(item.tokens) == len(item.aux_hidden) + 1
        assert item.tokens[-1] == int((output @ normed).argmax())
    batch = made._train[:5]
    _, _, chosen = next(made._unrolled(batch, 1))
    assert chosen.tolist() == [
        int(made._objective.draft_of[token])
        for item in batch
        for token in item.tokens[item.answer :]
    ]


def test_answers_are_trained_on_up_to_where_they_loop(data: Path, tmp_path: Path) -> None:
    with safe_open(data / "shard-0000.safetensors", "pt") as shard:
        tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    starts = tensors["starts"].tolist()
    answer = int(tensors["answers"][0])
    longest = max(range(40), key=lambda i: starts[i + 1] - starts[i])
    tensors["tokens"][starts[longest] + answer + 9 : starts[longest + 1]] = (
        7  # 30 times, of which one is kept
    )
    save_file(tensors, tmp_path / "shard-0000.safetensors")
    before, after = (train.load_conversations(folder)[0] for folder in (data, tmp_path))
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        assert (
            len(new.tokens)
            == len(new.aux_hidden)
            == (answer + 10 if i == longest else len(old.tokens))
        )
