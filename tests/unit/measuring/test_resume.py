"""Finished work is kept in a file, and refused to another run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from smart_decoding.errors import ConfigError
from smart_decoding.measuring.resume import Progress


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ({"option": {"limit": 4, "seed": 0}}, "option limit 3 there, 4 here"),
        ({"option": {"limit": 3, "seed": 0}, "commit": "b"}, "commit a there, b here"),
    ],
)
def test_another_run_is_refused_in_one_line(
    key: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "run.part"
    Progress(file, {"option": {"limit": 3, "seed": 0}, "commit": "a"}).add("x", 1)
    with pytest.raises(ConfigError, match=message) as caught:
        Progress(file, key)
    assert "\n" not in str(caught.value)


def test_what_is_learnt_later_must_agree_too(tmp_path: Path) -> None:
    file = tmp_path / "run.part"
    first = Progress(file, {})
    first.agree("weights", {"model": "a"})
    first.add("x", 1)
    Progress(file, {}).agree("weights", {"model": "a"})
    with pytest.raises(ConfigError, match="weights model a there, b here"):
        Progress(file, {}).agree("weights", {"model": "b"})


@pytest.mark.parametrize("text", ["{", "[]", '{"key": {}}', '{"key": {}, "units": 3}'])
def test_what_is_no_run_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_text(text)
    with pytest.raises(ConfigError, match="is not a run to go on with"):
        Progress(tmp_path / "x", {})
