"""Our costs for vLLM's adaptive verification, without vLLM: on a stand-in for its manager, with the
same signatures and scan. `make test-vllm` does the same on vLLM's own."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from verification_world import CONTEXT, LONGEST, MOST, Device, Manager, requests, run, start

from smart_decoding.core.choice import best_size
from smart_decoding.core.correction import Correction
from smart_decoding.errors import ConfigError
from smart_decoding.integrations.vllm import verification
from smart_decoding.integrations.vllm.options import refuse_missing
from smart_decoding.integrations.vllm.verification import PUBLISH_EVERY, SmartVerification

Ours = type("Ours", (SmartVerification, Manager), {})


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(verification, "_event", device.event)
    monkeypatch.setattr(verification, "_from_first_rank", lambda value: value)
    return device


def started(kind: Any, device: Device) -> Any:
    manager = kind(requests())
    start(manager, device)
    return manager


def test_a_second_context_tells_attention_apart(device: Device) -> None:
    costs = started(Ours, device)._known
    assert costs.sequence_token == pytest.approx(1.0 / 32 * 33 * CONTEXT / 1e3, rel=1e-6)
    for batch, tokens, context in ((1, 1, 100), (64, 128, 500), (64, 128, 30000), (256, 512, 8192)):
        true = device.forward(tokens, batch, context) + device.draft(batch, context)
        assert 1e3 * costs.verify_seconds(batch, tokens, context) == pytest.approx(true, rel=0.02)


@pytest.mark.parametrize(
    ("batch", "context", "gain"), [(1, 500, 0.99), (64, 500, 1.3), (64, 8192, 1.3)]
)
def test_drafts_are_not_priced_like_sequences(
    device: Device, batch: int, context: int, gain: float
) -> None:
    """Seen: 1.03, 1.67 and 1.74 times vLLM's tokens per second in this world."""
    theirs, _ = run(started(Manager, device), device, batch, context, 0.5, 50)
    ours, _ = run(started(Ours, device), device, batch, context, 0.5, 50)
    assert ours > gain * theirs


def test_the_budget_is_the_core_s_choice(device: Device) -> None:
    manager = started(Ours, device)
    random = np.random.default_rng(0)
    names = [str(i) for i in range(MOST)]
    manager.req_states.num_computed_tokens_np[:] = random.integers(0, 20000, MOST)
    for batch in (1, 3, 40, 200):
        manager.probs = random.random((MOST, LONGEST))
        drafts = {name: [-1] * LONGEST for name in names[:batch]}
        tokens = manager.get_num_tokens(dict.fromkeys(names[:batch], 1 + LONGEST), drafts)
        gains = -np.sort(-manager.probs[:batch].cumprod(1).ravel())
        context = manager.req_states.num_computed_tokens_np[:batch].mean()
        seconds = manager._known.verify_curve(batch, batch, len(gains) + 1, context)
        assert tokens - batch == best_size(gains, batch, 0.0, seconds)[0]


def test_real_steps_correct_the_costs(device: Device) -> None:
    """What every step takes besides makes more drafts pay."""
    manager = started(Ours, device)
    _, before = run(manager, device, 64, 500, 0.4, 2)
    device.beside = 20.0
    _, after = run(manager, device, 64, 500, 0.4, 100)
    assert after > before
    seconds = manager._known.verify_seconds(64, 64 + after, 500)
    true = device.forward(64 + after, 64, 500) + device.draft(64, 500) + 20.0
    assert 1e3 * seconds == pytest.approx(true, rel=0.1)


def test_all_ranks_take_what_the_first_has_learned(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = started(Ours, device)
    first = replace(Correction(), mean=np.full(29, 0.5))
    asked = []

    def from_first_rank(value: Any) -> Any:
        asked.append(value)
        return first

    monkeypatch.setattr(verification, "_from_first_rank", from_first_rank)
    start_correction = manager._known.verify_correction
    run(manager, device, 4, 500, 0.5, PUBLISH_EVERY - 1)
    assert not asked
    assert manager._known.verify_correction is start_correction
    run(manager, device, 4, 500, 0.5, 1)
    assert len(asked) == 1
    assert asked[0] is not first
    assert manager._known.verify_correction is first


def test_only_steps_that_decode_are_learned_from(device: Device) -> None:
    manager = started(Ours, device)
    batch = SimpleNamespace(num_reqs=2, idx_mapping=np.arange(2))
    for prompt in (100, 1, 1):
        drafts = {"0": [-1] * LONGEST} if prompt == 100 else {"0": [-1], "1": [-1]}
        tokens = {"0": 1 + len(drafts["0"]), "1": prompt + len(drafts.get("1", []))}
        manager.get_num_tokens(tokens, drafts)
        manager.reallocate_drafts(["0", "1"], None)
        device.now += 9.0
        manager.record_confidences(np.ones((2, LONGEST)), batch)
        manager.record_confidences(np.ones((2, LONGEST)), batch)  # of a step without drafts
    assert len(manager._pending) == 1  # the second step's was taken by the third


def test_a_start_that_was_timed_otherwise_is_refused(device: Device) -> None:
    manager = Ours(requests())
    samples = [device.timed(**batch) for batch in manager.batches_to_profile([1, 2, 4])]
    with pytest.raises(ConfigError, match=r"timed .* steps of .*unset SMART_VLLM_VERIFICATION"):
        manager.set_initial_cost_curves(samples[:-1])

    class Other(Manager):
        def batches_to_profile(self, capture_sizes: list[int]) -> Any:
            yield {"num_tokens": 1}

    with pytest.raises(ConfigError, match="no context_len"):
        list(type("Ours", (SmartVerification, Other), {})(requests()).batches_to_profile([1]))


def test_the_plugin_does_nothing_unless_asked() -> None:
    code = (
        "import sys; from smart_decoding.integrations.vllm import register; register(); "
        "assert not {'vllm', 'torch', 'numpy'} & set(sys.modules)"
    )
    environment = {"SMART_VLLM_VERIFICATION": "0", "PYTHONPATH": ":".join(sys.path)}
    run_ = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert run_.returncode == 0, run_.stderr


def test_what_is_missing_is_named() -> None:
    refuse_missing("0.40.0", "it", [], "leave it")
    with pytest.raises(ConfigError, match=r"vLLM 0\.40\.0 has no a\.b, c: it needs it; leave it"):
        refuse_missing("0.40.0", "it", ["a.b", "c"], "leave it")
