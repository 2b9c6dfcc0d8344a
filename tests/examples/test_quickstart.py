"""examples/quickstart.ipynb: its cells run, here with a tiny model; what is stored in it is of one
whole run. No Jupyter is needed: cells are Python."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "server"))

from serving import save_tiny_model

import smart_decoding
from smart_decoding.llm import LLM

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"
if not NOTEBOOK.is_file():
    pytest.skip("an installed source archive has no examples", allow_module_level=True)
CELLS = [c for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"]
SAME = "identical: True"


def test_its_cells_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    folder = save_tiny_model(tmp_path)

    def tiny(model: str, **options: Any) -> LLM:
        assert model == "smollm2-135m"
        drafts = {"method": "ngram", "policy": "static", "min_n": 1}
        return LLM(folder, speculative_config=drafts, max_model_len=1024, **options)

    monkeypatch.setattr(smart_decoding, "LLM", tiny, raising=False)
    monkeypatch.setenv("MPLBACKEND", "agg")
    names: dict[str, Any] = {}
    for number, cell in enumerate(CELLS):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    out = capsys.readouterr().out
    assert out.count(SAME) == 2
    assert len(names["axes"].patches) == 3 * len(names["rounds"])
    assert sum(names["accepted"]) > 0
    assert "└─" in out


def test_what_is_stored_is_of_a_whole_run() -> None:
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    outputs = [output for cell in CELLS for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}
    assert all(output.get("name") != "stderr" for output in outputs)
    text = "".join("".join(output.get("text", "")) for output in outputs)
    assert text.count(SAME) == 2
    assert "def is_even(n):" in text
