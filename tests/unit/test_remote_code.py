"""Code that comes with a model is never run, and nobody is asked whether it may be: a server has no
terminal."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from smart_decoding.errors import ModelError
from smart_decoding.models.families.vision import read_configs
from smart_decoding.models.text.tokenizer import Tokenizer
from smart_decoding.multimodal.pixels import load_reader

pytest.importorskip("transformers")
pytest.importorskip("PIL")

LOADERS: list[Callable[[Path], Any]] = [
    Tokenizer.load,
    lambda folder: read_configs(folder, None),
    lambda folder: load_reader(folder, SimpleNamespace(model_type="mine")),
]


@pytest.mark.parametrize("load", LOADERS, ids=["tokenizer", "config", "pixels"])
def test_a_folders_own_code_is_not_run(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {
        "AutoConfig": "mine.Mine",
        "AutoTokenizer": ["mine.Mine", None],
        "AutoImageProcessor": "mine.Mine",
    }
    given = {
        "model_type": "mine",
        "tokenizer_class": "Mine",
        "image_processor_type": "Mine",
        "auto_map": own,
    }
    for name in ("config", "tokenizer_config", "preprocessor_config"):
        (tmp_path / f"{name}.json").write_text(json.dumps(given))
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    ran = tmp_path / "ran"
    asked = []
    (tmp_path / "mine.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Mine: pass\n")

    def answer(*question: str) -> str:
        asked.append(question)
        return "y"

    monkeypatch.setattr(builtins, "input", answer)
    with pytest.raises(ModelError):
        load(tmp_path)
    assert asked == []
    assert not ran.exists()
