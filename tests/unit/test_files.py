"""Results are written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from smart_decoding.errors import CapacityError
from smart_decoding.files import write_json


def test_unknown_values_become_null_and_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    write_json(file, {"a": [float("nan"), float("inf"), 1.5]})
    assert json.loads(file.read_text()) == {"a": [None, None, 1.5]}
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": [None, None, 1.5]}
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
    with pytest.raises(CapacityError, match="could not be written"):
        write_json(tmp_path / "missing" / "r.json", {})
