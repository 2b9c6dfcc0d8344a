"""The counts of vLLM's steps, and what Prometheus reads of them."""

from __future__ import annotations

import pytest

from smart_decoding.integrations.vllm.metrics import HELP, CounterCollector, Counters, Step


@pytest.fixture
def counters() -> Counters:
    """Of a plain step, one that drafts, and one that verifies six drafts, as an exploration."""
    counters = Counters()
    counters.add(Step(2, 0, 0, accepted=[0, 0]))
    counters.add(Step(2, 0, 3, accepted=[0, 0]))
    counters.add(Step(2, 3, 3, 6, [1, 3], exploring=True))
    return counters


def test_steps_are_counted(counters: Counters) -> None:
    assert counters == Counters(1, 2, 6, 4, 1, 0.0, {0: 1, 3: 2})


def test_prometheus_reads_them(counters: Counters) -> None:
    pytest.importorskip("prometheus_client")
    families = {family.name: family for family in CounterCollector(counters).collect()}
    assert families.keys() == {f"smart_vllm_{name}" for name in (*HELP, "length")}
    assert families["smart_vllm_verified"].samples[0].value == 6
    lengths = families["smart_vllm_length"].samples
    assert {each.labels["tokens"]: each.value for each in lengths} == {"0": 1, "3": 2}
