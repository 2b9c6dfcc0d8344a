"""Conversations about pictures, as a draft head is trained on: each begins where a head that does not see begins."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.nn import functional as F

from smart_decoding.backends.torch.loading import load_checkpoint
from smart_decoding.engine.kv import PAGE
from smart_decoding.llm import LLM
from smart_decoding.training import generate
from smart_decoding.training.train import load_conversations

from .vision import IMAGE, save_llava


def test_pictures_are_left_out_and_the_features_are_those_of_the_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "CONCURRENT", 4)
    monkeypatch.setattr(generate, "ANSWER_TOKENS", 24)
    save_llava(tmp_path / "llava")
    llm = LLM(tmp_path / "llava", speculative_config=False, max_model_len=512, dtype="float32",
              enable_prefix_caching=False)  # fmt: skip
    recorder = generate.Recorder((3,))
    llm.engine.listen(recorder)
    generate.generate(llm, recorder, tmp_path / "data", 800, pictures=True)
    found, _ = load_conversations(tmp_path / "data")
    weights = load_checkpoint(tmp_path / "llava").weights
    right = total = 0
    for item in found:
        tokens = item.tokens[: item.answer].tolist()
        assert tokens.count(IMAGE) < PAGE and IMAGE not in tokens[PAGE:]
        assert llm.tokenizer.decode(tokens).endswith(">")
        said = F.rms_norm(item.taps.float(), (96,), weights["model.norm.weight"].float(), 1e-5)
        best = (said @ weights["lm_head.weight"].float().T).argmax(-1)
        right += int((best[item.answer - 1 : -1] == item.tokens[item.answer :]).sum())
        total += len(item.tokens) - item.answer
    assert len(found) > 5 and right > 0.75 * total  # a tenth is sampled; features are kept in bfloat16
