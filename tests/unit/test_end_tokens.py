"""What ends an answer: the end tokens of config.json, generation_config.json and the tokenizer."""

import json
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers

from smart_decoding import LLM, SamplingParams

VOCAB = 32


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model that ends by token 2 by its config, and by token 7 by its tokenizer."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        vocab_size=VOCAB,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
    )
    folder = tmp_path / "model"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    words = {f"w{i}": i for i in range(VOCAB)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "w7"}))
    return folder


def load(folder: Path) -> LLM:
    return LLM(folder, speculative_config=False, dtype="float32", device="cpu", allow_slow=True)


def test_the_tokenizers_end_token_ends_an_answer_as_in_vllm(folder: Path) -> None:
    llm = load(folder)
    assert set(llm.target.eos_token_ids) == {2, 5, 7}
    for token in (2, 5, 7):
        params = SamplingParams(temperature=0.0, max_tokens=8, logit_bias={token: 100.0})
        (answer,) = llm.generate([[1, 3]], params)
        assert answer.outputs[0].finish_reason == "stop"
        assert len(answer.outputs[0].token_ids) == 1


def test_end_tokens_outside_of_the_vocabulary_are_left_out(folder: Path) -> None:
    """They broke a round for all requests where one had `min_tokens`."""
    path = folder / "config.json"
    outside = {"eos_token_id": [2, VOCAB, -1]}
    path.write_text(json.dumps({**json.loads(path.read_text()), **outside}))
    (folder / "generation_config.json").unlink()
    llm = load(folder)
    assert set(llm.target.eos_token_ids) == {2, 7}
    params = SamplingParams(temperature=0.0, min_tokens=4, max_tokens=8)
    answers = llm.generate([[1, 3], [4]], [params, SamplingParams(max_tokens=4)])
    assert len(answers[0].outputs[0].token_ids) >= 4
