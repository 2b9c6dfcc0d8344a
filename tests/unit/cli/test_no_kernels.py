"""On a CPU without kernels, or with a model that they do not serve, nothing runs silently on plain
torch instead."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import save_file

from smart_decoding import llm as llm_module
from smart_decoding.bench import runner
from smart_decoding.cli import main as cli
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.errors import ConfigError, ModelError
from smart_decoding.kernels import library
from smart_decoding.llm import LLM
from smart_decoding.models.checkpoints import loading
from smart_decoding.models.cpu import kernel_check
from smart_decoding.models.families.config import ModelConfig
from smart_decoding.models.families.reading import config_to_hf
from smart_decoding.models.heads.eagle_head import EagleHead
from smart_decoding.models.heads.files import HeadFiles
from smart_decoding.server import launch
from smart_decoding.training import prior

VOCAB = 61
SERVED = ModelConfig("llama", 2, 32, 4, 2, 16, 48, VOCAB, 10_000.0, 1e-5, 512, tie_embeddings=True)
ODD = replace(SERVED, ffn=47)
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
PROMPT = [1, 2, 3, 1, 2, 3, 1, 2]
MISSING = "the CPU kernels are not built: build them"
COMMANDS = {
    "run": ["run", "hi"],
    "demo": ["demo"],
    "bench": ["bench", "--policies", "off"],
    "serve": ["serve", "--port", "0"],
    "train": ["train", "--output", "head"],
}
CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def saved(folder: Path, config: ModelConfig) -> Path:
    """A random model whose words are w0, w1, ..."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=generator) * 0.3
        for name, shape in config.expected_shapes().items()
    }
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_to_hf(config)))
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": "{{ messages[0].content }}"})
    )
    return folder


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where nothing was compiled."""
    monkeypatch.setattr(library, "unavailable", lambda: MISSING)
    kernel_check._warn.cache_clear()


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whoever looks for a model, fetches prompts or listens fails with another error than the one
    expected."""

    def fail(*given: Any, **options: Any) -> None:
        raise AssertionError("nothing is to be loaded")

    for module, name in (
        (llm_module, "load_checkpoint"),
        (loading, "resolve"),
        (runner, "load_task"),
        (launch, "serve"),
    ):
        monkeypatch.setattr(module, name, fail)
    monkeypatch.chdir(tmp_path)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "smart.kernels"]


# -------------------------------------------------------------------------------------------------
# no kernels at all


@pytest.mark.usefixtures("missing", "nothing_loads")
def test_llm_refuses_before_anything_is_fetched() -> None:
    with pytest.raises(ConfigError) as caught:
        LLM("no/such-model", device="cpu")
    assert str(caught.value).startswith(MISSING)
    assert "allow_slow=True" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.usefixtures("missing", "nothing_loads")
def test_commands_stop_with_one_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(COMMANDS[command]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"smart: error: {MISSING}")
    assert err.count("\n") == 1
    assert "--allow-slow" in err


@pytest.mark.parametrize("command", COMMANDS)
def test_allow_slow_reaches_the_model(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[bool] = []

    def made(*given: Any, allow_slow: bool = False, **options: Any) -> None:
        calls.append(allow_slow)
        raise ModelError("no model in this test")

    for module in (llm_module, runner, prior):
        monkeypatch.setattr(module, "LLM", made)
    config = saved(tmp_path / "model", SERVED)
    monkeypatch.setattr(
        loading, "resolve", lambda name, *_: loading.Source(str(name), config, "random")
    )
    monkeypatch.setattr(launch, "serve", lambda load, settings: load())
    monkeypatch.setattr(runner, "load_task", lambda task, limit: [])
    monkeypatch.chdir(tmp_path)
    assert cli.main(COMMANDS[command]) == 2
    assert cli.main([*COMMANDS[command], "--allow-slow"]) == 2
    assert calls == [False, True]


def test_plain_torch_runs_where_it_is_asked_for_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved(tmp_path / "model", SERVED)
    native = answer(folder, False)
    monkeypatch.setattr(library, "unavailable", lambda: MISSING)
    kernel_check._warn.cache_clear()
    with caplog.at_level(logging.WARNING, "smart.kernels"):
        slow = [
            answer(folder, speculation, allow_slow=True)
            for speculation in (False, {"method": "ngram"})
        ]
    assert slow == [native, native]
    (line,) = warnings(caplog)
    assert line.startswith(f"no CPU kernels: {MISSING}. Plain torch runs: slower")


def answer(folder: Path, speculation: Any, **options: Any) -> list[int]:
    if isinstance(speculation, dict):
        speculation = {"policy": "static", "min_n": 1, **speculation}
    llm = LLM(
        folder,
        speculative_config=speculation,
        dtype="fp32",
        device="cpu",
        max_model_len=128,
        **options,
    )
    assert llm.target.decoder.native is (library.unavailable() is None)
    return llm.generate([PROMPT], GREEDY)[0].outputs[0].token_ids


# --------------------------------------------------------------------------------------------
# shapes without kernels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 24}, "head dimension 24 is none of 16, 32, 64, 96, 128, 256"),
        ({"hidden": 33}, "hidden size 33 is odd"),
        ({"ffn": 47}, "intermediate size 47 is odd"),
        ({"heads": 33, "kv_heads": 1}, "33 query heads share a key head, more than 32"),
    ],
)
def test_the_number_that_is_not_served_is_named(change: dict[str, int], message: str) -> None:
    assert kernel_check.unserved(SERVED) is None
    assert kernel_check.use_native(SERVED, CPU)
    config = replace(SERVED, **change)
    assert kernel_check.unserved(config) == message
    with pytest.raises(ModelError, match="the CPU kernels do not serve this model: ") as caught:
        kernel_check.use_native(config, CPU)
    assert message in str(caught.value)
    assert "--allow-slow" in str(caught.value)


def test_llm_refuses_a_shape_before_weights_are_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path / "model", ODD)
    monkeypatch.setattr(loading, "open_weights", None)
    with pytest.raises(ModelError, match="intermediate size 47 is odd"):
        LLM(folder, device="cpu")


def test_a_draft_model_is_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = saved(tmp_path / "target", SERVED)
    draft = saved(tmp_path / "draft", ODD)
    config = {"method": "draft_model", "model": str(draft), "policy": "chain"}
    options: dict[str, Any] = {
        "speculative_config": config,
        "dtype": "fp32",
        "device": "cpu",
        "max_model_len": 128,
    }
    with monkeypatch.context() as patch:
        patch.setattr(
            "smart_decoding.models.checkpoints.weight_files.SafetensorsWeights.__getitem__", None
        )
        with pytest.raises(ModelError, match=r"do not serve the draft model: .* 47 is odd"):
            LLM(target, **options)
    llm = LLM(target, **options, allow_slow=True)
    assert llm.target.decoder.native
    expected = answer(target, False)
    assert llm.generate([PROMPT], GREEDY)[0].outputs[0].token_ids == expected


def test_a_head_beside_a_native_target_must_be_served() -> None:
    lender: Any = SimpleNamespace(native=True, dtype=torch.float32, device=CPU)
    files = HeadFiles({}, {}, (1,), replace(SERVED, head_dim=320))
    with pytest.raises(
        ModelError,
        match=r"do not serve this head: head dimension 320 is none of .*; take another head",
    ):
        EagleHead(files, lender, 1, 1, 64)


# --------------------------------------------------------------------------------------------- what
# a benchmark says

LINE = "plain torch, not the CPU kernels: intermediate size 47 is odd"


def test_a_benchmark_on_plain_torch_says_so_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path / "model", ODD)
    command = (
        "--policies off --tasks general --limit 2 --max-tokens 4 --batch-sizes 1 --device cpu "
        "--dtype fp32"
    )
    assert cli.main(["bench", "--model", str(folder), *command.split(), "--allow-slow"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == LINE


def test_cuda_without_triton_is_told_before_a_model_is_fetched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "smart_decoding.models.torch.triton_ops", None)
    with pytest.raises(ConfigError, match="device='cuda' needs Triton, which torch"):
        kernel_check.require_kernels(CUDA, allow_slow=True)
    with pytest.raises(ConfigError, match="device='cuda' needs Triton"):
        kernel_check.warn_if_missing(CUDA)
