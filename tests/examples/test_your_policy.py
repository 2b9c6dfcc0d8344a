"""The policy of docs/options.md drafts, and changes no answer."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "server"))

from serving import save_tiny_model

import smart_decoding
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.llm import LLM

PAGE = Path(__file__).parents[2] / "docs" / "options.md"
if not PAGE.is_file():
    pytest.skip("an installed source archive has no docs", allow_module_level=True)


def test_the_policy_of_the_page_drafts_and_changes_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(import numpy.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    folder = save_tiny_model(tmp_path)

    def tiny(model: str, speculative_config: Any) -> LLM:
        drafts = {"method": "ngram", "min_n": 1, **speculative_config}
        return LLM(folder, speculative_config=drafts, max_model_len=1024)

    monkeypatch.setattr(smart_decoding, "LLM", tiny, raising=False)
    names: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    assert capsys.readouterr().out
    llm = names["llm"]
    assert llm.policy.name == "narrow"
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    plain = LLM(folder, speculative_config=False, max_model_len=1024)
    answers = [each.generate("a b a b a b", params)[0] for each in (llm, plain)]
    assert answers[0].outputs[0].token_ids == answers[1].outputs[0].token_ids
    assert answers[0].outputs[0].metrics.accepted > 0
