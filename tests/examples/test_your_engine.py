"""examples/your_engine.py answers as `generate` does, whatever drafts and decides."""

from __future__ import annotations

import io
import runpy
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from smart_decoding.core.costs import CostModel
from smart_decoding.core.policies import POLICIES, make_policy

EXAMPLE = Path(__file__).parents[2] / "examples" / "your_engine.py"
if not EXAMPLE.is_file():
    pytest.skip("an installed source archive has no examples", allow_module_level=True)
generate = runpy.run_path(str(EXAMPLE))["generate"]

VOCAB = 97
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
}
CONFIGS = [
    LlamaConfig(**SMALL),
    Qwen3Config(**SMALL, head_dim=16),
    GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None
    ),
]
PROMPT = [(7 * i) % 50 + 3 for i in range(20)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other are slower than one where models are this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_model(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """In float64, so that no rounding decides between two tokens."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model.to(torch.float64).eval()  # type: ignore[arg-type]
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def expected(model: PreTrainedModel, length: int) -> list[int]:
    ids = torch.tensor([PROMPT])
    hugging_face: Any = model.generate
    answer = hugging_face(ids, max_new_tokens=length, do_sample=False, pad_token_id=0)
    tokens: list[int] = answer[0, len(PROMPT) :].tolist()
    return tokens


def forwards(model: PreTrainedModel) -> list[int]:
    """Rows of each forward that follows."""
    rows: list[int] = []
    model.register_forward_hook(
        lambda _module, _args, given, _out: rows.append(given["input_ids"].shape[1]),
        with_kwargs=True,
    )
    return rows


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_answers_are_those_of_generate(config: PreTrainedConfig) -> None:
    target = random_model(config, 0)
    drafter = random_model(CONFIGS[0], 1)
    assert generate(target, drafter, PROMPT, 30) == expected(target, 30)


@pytest.mark.parametrize("name", POLICIES)
def test_under_every_policy(name: str) -> None:
    target = random_model(CONFIGS[0], 0)
    options: dict[str, Any] = {"total_tokens": 12, "top_k": 3} if name == "eagle2" else {}
    policy = make_policy(name, **options)
    answer = generate(target, random_model(CONFIGS[0], 1), PROMPT, 24, policy)
    assert answer == expected(target, 24)


@pytest.mark.parametrize("name", ["chain", "eagle2"])
def test_a_drafter_that_knows_saves_forwards(name: str) -> None:
    target = random_model(CONFIGS[0], 0)
    tokens = expected(target, 40)
    rows = forwards(target)
    options: dict[str, Any] = (
        {"depth": 3, "top_k": 2, "total_tokens": 8} if name == "eagle2" else {}
    )
    drafter = random_model(CONFIGS[0], 0)
    assert generate(target, drafter, PROMPT, 40, make_policy(name, **options)) == tokens
    assert len(rows) - rows.index(len(PROMPT)) < 20


def test_smart_drafts_where_the_drafter_is_cheap_and_right() -> None:
    """By the costs of larger models: a tiny one's are Python's, and drafting with it never pays."""
    target = random_model(CONFIGS[0], 0)
    tokens = expected(target, 40)
    rows = forwards(target)
    drafter = random_model(CONFIGS[0], 0)
    policy = make_policy("smart", cost=CostModel.default())
    assert generate(target, drafter, PROMPT, 40, policy) == tokens
    assert max(rows[rows.index(len(PROMPT)) + 1 :]) > 1


@pytest.mark.parametrize(
    "config",
    [MistralConfig(**SMALL, sliding_window=16), Gemma2Config(**SMALL, head_dim=8)],
    ids=lambda config: config.model_type,
)
def test_a_model_that_sees_a_window_only_is_refused(config: PreTrainedConfig) -> None:
    full = random_model(CONFIGS[0], 0)
    for models in ((random_model(config, 0), full), (full, random_model(config, 0))):
        with pytest.raises(ValueError, match="full attention"):
            generate(*models, PROMPT, 4)


def test_without_arguments_it_says_what_it_takes() -> None:
    done = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert 'your_engine.py TARGET DRAFTER "a prompt"' in done.stderr
    assert "Traceback" not in done.stderr


def test_it_is_as_short_as_the_readme_says() -> None:
    """Lines of code: neither empty, nor a comment or a docstring."""
    code = set()
    statement = True
    for token in tokenize.generate_tokens(io.StringIO(EXAMPLE.read_text()).readline):
        if token.type in (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT):
            statement = True
        elif token.type not in (tokenize.COMMENT, tokenize.ENDMARKER):
            if not (statement and token.type == tokenize.STRING):
                code.add(token.start[0])
            statement = False
    assert 70 < len(code) <= 86


def test_an_end_ends_the_answer() -> None:
    target = random_model(CONFIGS[0], 0)
    target.generation_config.eos_token_id = [expected(target, 30)[20]]
    tokens = expected(target, 30)
    drafter = random_model(CONFIGS[0], 0)
    assert len(tokens) < 30
    for name in ("off", "chain", "smart"):
        assert generate(target, drafter, PROMPT, 30, make_policy(name)) == tokens
