"""The contract with SGLang: every name that the plugin relies on, in the installed wheel."""

from __future__ import annotations

import inspect
import logging
import os
import tomllib
from pathlib import Path

import pytest
from sglang_wheel import source_of

from smart_decoding.integrations import sglang as integration
from smart_decoding.integrations.sglang import seams
from smart_decoding.integrations.sglang.policy import SmartSpecPolicy

pytest.importorskip(
    "msgspec", reason="SGLang's light dependencies are not installed here: make test-sglang"
)
PARAMS = "sglang.srt.speculative.adaptive_spec_params"


def test_every_name_that_is_relied_on_is_there() -> None:
    source_of("sglang.version")
    assert seams.lacking() == []


def test_further_parameters_are_known_or_harmless(monkeypatch) -> None:
    """As in later versions: `num_steps` where our policy is called, defaults where SGLang is."""
    source_of("sglang.version")
    from sglang.srt.speculative.adaptive_spec_params import AdaptiveSpeculativeParams

    def newer(self, num_correct_drafts_per_req, batch_size=0, num_steps=None): ...

    monkeypatch.setattr(AdaptiveSpeculativeParams, "on_verify_complete", newer)
    assert seams.lacking() == []

    def unknown(self, num_correct_drafts_per_req, batch_size, seconds=None): ...

    monkeypatch.setattr(AdaptiveSpeculativeParams, "on_verify_complete", unknown)
    assert seams.lacking() == [f"{PARAMS}.AdaptiveSpeculativeParams.on_verify_complete"]


def test_a_version_without_a_name_is_left_alone(monkeypatch, caplog) -> None:
    source_of("sglang.version")
    from sglang.srt.plugins.hook_registry import HookRegistry

    monkeypatch.setenv(integration.COSTS, "unread.json")
    monkeypatch.setitem(seams.USED, "sglang.srt.plugins.hook_registry", {"HookRegistry.gone": None})
    before = dict(HookRegistry._hooks)
    with caplog.at_level(logging.WARNING):
        integration.register()
    assert "hook_registry.HookRegistry.gone" in caplog.text
    assert before == HookRegistry._hooks


def test_the_policy_has_all_that_is_public_in_the_class_it_replaces() -> None:
    source_of("sglang.version")
    from sglang.srt.speculative.adaptive_spec_params import AdaptiveSpeculativeParams

    names = seams.REPLACED[PARAMS]
    _, _, kind = integration.TARGET.rpartition(".")
    public = {name for name in vars(AdaptiveSpeculativeParams) if not name.startswith("_")}
    assert {f"{kind}.{name}" for name in public} == set(names) - {f"{kind}.__init__"}
    for name, parameters in names.items():
        assert parameters is not None
        ours = inspect.getattr_static(SmartSpecPolicy, name.split(".")[1])
        function = ours.fget if isinstance(ours, property) else ours
        taken = tuple(inspect.signature(function).parameters)[1:]
        assert taken[: len(parameters)] == parameters
        assert set(taken[len(parameters) :]) <= set(seams.NEWER)
    assert f"{kind}(" in source_of("sglang.srt.speculative.eagle_worker_v2").read_text()


def test_options_are_those_of_its_arguments() -> None:
    source_of("sglang.srt.server_args")
    from sglang.srt.arg_groups.overrides import declare_resolution
    from sglang.srt.server_args import ServerArgs

    arguments = ServerArgs(model_path="none")
    assert [name for name in seams.OPTIONS if not hasattr(arguments, name)] == []
    declare_resolution(arguments, "test", speculative_eagle_topk=2)
    assert ("test", {"speculative_eagle_topk": 2}) in getattr(arguments, seams.RECORD)


def test_the_entry_point_is_the_one_that_sglang_looks_for() -> None:
    pyproject = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    (group,) = [g for g in pyproject["project"]["entry-points"] if g.startswith("sglang")]
    assert pyproject["project"]["entry-points"][group] == {
        "smart": "smart_decoding.integrations.sglang:register"
    }
    assert f'"{group}"' in source_of("sglang.srt.plugins.__init__").read_text()
    assert os.environ.get(integration.COSTS) is None
