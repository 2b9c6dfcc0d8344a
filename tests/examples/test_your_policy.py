"""The policy of docs/your-policy.md drafts, changes no answer, and is measured as the page says."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "server"))

from serving import save_tiny_model

import smart_decoding
from smart_decoding.cli.main import main
from smart_decoding.core.policies import POLICIES, add_policy
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.errors import ConfigError
from smart_decoding.llm import LLM
from smart_decoding.measuring.tasks import TASKS
from smart_decoding.profiling import measure

PAGE = Path(__file__).parents[2] / "docs" / "your-policy.md"
if not PAGE.is_file():
    pytest.skip("an installed source archive has no docs", allow_module_level=True)
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Policies and tasks of before come back."""
    monkeypatch.setattr("smart_decoding.core.policies.POLICIES", POLICIES.copy())
    monkeypatch.setitem(TASKS, "prompts", lambda: [])


@pytest.fixture
def place(tmp_path: Path) -> str:
    """The page's class in a file of its own."""
    (tmp_path / "narrow.py").write_text(BLOCKS[0], encoding="utf-8")
    return f"{tmp_path / 'narrow.py'}:Narrow"


def test_the_policy_of_the_page_drafts_and_changes_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny_model(tmp_path)

    def tiny(model: str, speculative_config: Any) -> LLM:
        drafts = {"method": "ngram", "min_n": 1, **speculative_config}
        return LLM(folder, speculative_config=drafts, max_model_len=1024)

    monkeypatch.setattr(smart_decoding, "LLM", tiny, raising=False)
    (tmp_path / "narrow.py").write_text(BLOCKS[0], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "narrow", raising=False)
    names: dict[str, Any] = {}
    (use,) = BLOCKS[1:]
    exec(compile(use, str(PAGE), "exec"), names)
    assert capsys.readouterr().out
    llm = names["llm"]
    assert llm.policy.name == "narrow"
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    plain = LLM(folder, speculative_config=False, max_model_len=1024)
    answers = [each.generate("a b a b a b", params)[0] for each in (llm, plain)]
    assert answers[0].outputs[0].token_ids == answers[1].outputs[0].token_ids
    assert answers[0].outputs[0].metrics.accepted > 0


def test_it_is_measured_on_prompts_of_a_file(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "SECONDS", 0.1)
    (tmp_path / "mine.txt").write_text('a b a b a b\n{"prompt": "c d c d c d"}\n')
    words = (
        f"bench -m {save_tiny_model(tmp_path)} --policy {place} --prompts {tmp_path / 'mine.txt'} "
        "--policy-options narrow:levels=2 --policy-options narrow: --method ngram "
        "--method-option min_n=1 --batch-sizes 1 --max-tokens 24"
    )
    assert main(words.split()) == 0
    head, *lines = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert head.endswith("smart / it (95 %)")
    assert [line.split()[0] for line in lines] == ["off", "smart", "narrow(levels=2)", "narrow"]
    assert all(re.search(r" yes +[\d.]+ +2 ", line) for line in lines)  # answers alike, two blocks
    assert [line.split()[-1] for line in lines[:2]] == ["-", "-"]


@pytest.mark.parametrize(
    ("code", "kind", "message"),
    [
        (None, "Narrow", "No such file"),
        ("1 / 0", "Narrow", "cannot be run: ZeroDivisionError"),
        ("", "Narrow", "has no class 'Narrow'"),
        ("class A:\n    name = 'a'", "A", "is no policy: it needs name, cost, plan"),
        ("class A:\n    def __init__(self, b): pass", "A", "give each argument of"),
        (f"{BLOCKS[0]}\nNarrow.name = 'smart'", "Narrow", "'smart' is a built-in policy"),
    ],
)
def test_what_is_no_policy_is_said(
    code: str | None, kind: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.py"
    if code is not None:
        path.write_text(code, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        add_policy(f"{path}:{kind}")
    with pytest.raises(ConfigError, match=r"not of the form FILE\.py:CLASS"):
        add_policy("narrow")


def test_a_file_that_cannot_be_measured_is_said_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").write_text("\n")
    for name, message in (("none", "none: No such file"), ("empty", "holds no prompt")):
        assert main(["bench", "-m", "/no/model", "--prompts", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
