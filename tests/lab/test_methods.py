"""Recording and tuning go with every way to draft, on the real model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from smart_decoding.drafters import METHODS
from smart_lab import recorder, tuning
from smart_lab.bench import run
from smart_lab.options import LabOptions

# mtp: no model with such a layer is small enough
DRAFTING = [method for method in METHODS if method not in ("none", "union", "mtp")]


@pytest.mark.model
@pytest.mark.parametrize(
    "method", ["union", *(pytest.param(method, marks=pytest.mark.slow) for method in DRAFTING)]
)
def test_rivals_are_tuned_with_every_method(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = []
    record = recorder.record_wide

    def kept(*given: Any) -> Any:
        recorded.append(record(*given))
        return recorded[-1]

    monkeypatch.setattr(recorder, "record_wide", kept)
    monkeypatch.setattr(recorder, "HOST_TURNS", 1)
    monkeypatch.setattr(tuning, "PER_TASK", 2)
    options = LabOptions(
        tasks=("general",),
        limit=1,
        max_tokens=16,
        batch_sizes=(1,),
        method=method,
        draft="smollm2-135m" if method == "draft_model" else None,
        tune_eagle2=1,
        tune_paper=True,
        tune_chains=True,
        policy_gain=True,
    )
    runs = [each for each in run(options)["runs"] if each["task"] == "all"]
    assert {"off", "smart"} < {each["policy"] for each in runs}
    assert any(each.get("setting") for each in runs)
    assert all(each["identical"] and np.isfinite(each["policy_gain"]) for each in runs)
    others, own = recorded
    assert others.free == own.free == (method == "ngram")
    assert len(others.token) > 0
    if method != "ngram":  # a whole tree at each position, whatever n-grams propose beside it
        assert min(others.sizes.min(), own.sizes.min()) >= 10
