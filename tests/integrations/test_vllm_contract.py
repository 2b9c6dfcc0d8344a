"""What we rely on in vLLM, on its real classes and without an engine: run by `make test-vllm`, for
each supported version. CUDA's streams and events are stand-ins; the device is one on paper."""

from __future__ import annotations

import contextlib
import os
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from verification_world import Device, Event, requests, run, start

from smart_decoding.errors import ConfigError
from smart_decoding.integrations.vllm import seams, verification
from smart_decoding.integrations.vllm.measure import DRAFT_MODEL, resolved
from smart_decoding.integrations.vllm.verification import SmartVerification

vllm = pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")
MODEL = os.environ.get("SMART_TEST_MODEL", "")
if not MODEL:
    pytest.skip("SMART_TEST_MODEL is not set: make test-vllm", allow_module_level=True)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def place() -> Any:
    from vllm.v1.worker.gpu.spec_decode import adaptive_verification

    return adaptive_verification


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, place: Any) -> Device:
    """In place of a GPU, of one rank."""
    import torch

    device = Device()

    class CopyEvent(Event):
        def __init__(self, blocking: bool) -> None:
            super().__init__(device)

        def synchronize(self) -> None: ...

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "Event", CopyEvent)
    monkeypatch.setattr(place, "stream", lambda *streams: contextlib.nullcontext())
    eager = place._assign_draft_token_budget
    monkeypatch.setattr(place, "_assign_draft_token_budget_compiled", eager)
    group = SimpleNamespace(broadcast_object=lambda value, src: value)
    monkeypatch.setattr(place, "get_tp_group", lambda: group)
    monkeypatch.setattr(verification, "_event", device.event)
    return device


@pytest.mark.parametrize("part", [seams.SCHEDULER, seams.SHORTCUTS, seams.VERIFICATION])
def test_every_name_that_is_relied_on_is_there(part: seams.Seams) -> None:
    assert seams.missing(part) == []


def test_vllm_loads_the_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Any) -> None:
    """By the entry point that the wheel has."""
    entries = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    info = tmp_path / "smart_decoding-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: smart-decoding\nVersion: 0\n")
    (plugin,) = entries["vllm.general_plugins"].items()
    lines = ["[vllm.general_plugins]", f"{plugin[0]} = {plugin[1]}"]
    (info / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(tmp_path))
    theirs = place.AdaptiveVerificationManager
    monkeypatch.setattr(place, "AdaptiveVerificationManager", theirs)  # put back afterwards
    for wanted in ("0", "1", "1"):
        monkeypatch.setenv("SMART_VLLM_VERIFICATION", wanted)
        monkeypatch.setattr(vllm.plugins, "plugins_loaded", False)
        vllm.plugins.load_general_plugins()
        ours = place.AdaptiveVerificationManager
        assert ours.__mro__[1:3] == (SmartVerification, theirs) if wanted == "1" else ours is theirs


def test_the_plugin_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, place: Any) -> None:
    monkeypatch.delattr(place.AdaptiveVerificationManager, "get_num_tokens")
    with pytest.raises(ConfigError, match=r"has no .*get_num_tokens\(.*unset SMART_VLLM"):
        verification.install()


@pytest.mark.parametrize(
    ("batch", "context", "chance", "least"),
    [(1, 500, 0.8, 0.99), (8, 500, 0.5, 1.1), (64, 500, 0.5, 1.3), (64, 8192, 0.8, 1.3)],
)
def test_our_costs_beside_vllm_s(
    device: Device, place: Any, batch: int, context: int, chance: float, least: float
) -> None:
    """In the world of verification_world.py: no measurement of a GPU."""
    import torch

    theirs = place.AdaptiveVerificationManager
    rates = []
    for kind in (theirs, type("Ours", (SmartVerification, theirs), {})):
        manager = kind(requests(), torch.zeros(257, dtype=torch.int32), 1, 10000)
        start(manager, device)
        for index in range(batch):
            manager.add_request(index)
        rate, drafts = run(manager, device, batch, context, chance, 60)
        rates.append(rate)
        print(f"{kind.__name__}: {rate:.0f} tok/s, {drafts} drafts of {4 * batch}")
    assert rates[1] > least * rates[0]


def test_vllm_says_what_it_makes_of_a_schedule() -> None:
    """A CPU has no graphs to lose, and ranks with data of their own no schedule."""
    schedule = [[1, 4, 2], [5, 16, 0]]
    ngram = {"method": "ngram", "prompt_lookup_max": 3, "num_speculative_tokens": 2}
    arguments = {
        "model": MODEL,
        "speculative_config": {**ngram, "num_speculative_tokens_per_batch_size": schedule},
    }
    kept = resolved(arguments)
    graphs = ["NONE", "NONE"]
    same = {"vllm": vllm.__version__, "graphs": graphs, "all_passes": False}
    assert kept == {**same, "scheduled": True}
    assert resolved({**arguments, "data_parallel_size": 2}) == {**same, "scheduled": False}
    with pytest.raises(ConfigError, match="does not take"):
        resolved({**arguments, "no_such_argument": 1})


def test_a_draft_model_runs_all_its_passes_in_the_second_runner() -> None:
    """What `smart vllm-config` warns of; EAGLE's and MTP's speculator follows a schedule."""
    assert not seams.reads(DRAFT_MODEL, "num_speculative_tokens")
    eagle = "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator"
    follows = f"{eagle}:TargetDependentARSpeculator.propose"
    assert seams.missing(seams.Seams({}, called={follows: ("num_speculative_tokens",)})) == []
    assert seams.reads(follows, "num_speculative_tokens")
