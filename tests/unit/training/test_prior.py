"""A head's prior is learned afresh, and the older one stays until there is a new one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from smart_decoding.core.calibration import Calibration
from smart_decoding.core.policies.smart import Smart
from smart_decoding.training import prior


class Llm:
    """Loaded with the head's older prior; may fail while it answers."""

    fails = False
    learned: Calibration

    def __init__(self, *_: Any, **__: Any) -> None:
        self.policy = Smart(calibration=Calibration())
        self.policy.state.calibration.counts += 7
        self.engine = SimpleNamespace(policy=self.policy)

    def generate(self, *_: Any, **__: Any) -> None:
        Llm.learned = self.policy.state.calibration
        if self.fails:
            raise KeyboardInterrupt


def test_an_older_prior_stays_until_there_is_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "prior.json"
    path.write_text("older")
    monkeypatch.setattr(prior, "LLM", Llm)
    monkeypatch.setattr(Llm, "fails", True)
    with pytest.raises(KeyboardInterrupt):
        prior.learn_prior("model", tmp_path, [[1, 2]])
    assert path.read_text() == "older"
    monkeypatch.setattr(Llm, "fails", False)
    prior.learn_prior("model", tmp_path, [[1, 2]])
    assert path.read_text() != "older"
    assert not Llm.learned.counts.any()
    prior.learn_prior("model", tmp_path, [])
    assert [*tmp_path.iterdir()] == []
