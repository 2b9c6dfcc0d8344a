"""The policy for SGLang's adaptive speculation: by itself, and under SGLang's real controller with
a fake worker.

The controller is loaded from the installed wheel's own file: importing SGLang as a whole needs a
GPU build."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from sglang_wheel import source_of

from smart_decoding.errors import ConfigError
from smart_decoding.integrations import sglang as integration
from smart_decoding.integrations.sglang.costs import TierCosts
from smart_decoding.integrations.sglang.policy import SmartSpecPolicy

SECONDS = {
    "1": {"0": 0.010, "1": 0.012, "3": 0.014, "5": 0.018},
    "32": {"0": 0.020, "1": 0.030, "3": 0.060, "5": 0.1},
}


@pytest.fixture
def policy(tmp_path, monkeypatch) -> SmartSpecPolicy:
    costs, candidates = tmp_path / "costs.json", tmp_path / "adaptive.json"
    costs.write_text(json.dumps({"seconds": SECONDS}))
    candidates.write_text(
        json.dumps(
            {
                "ema_alpha": 0.2,
                "1": {"candidate_steps": [0, 1, 3, 5]},
                "16": {"candidate_steps": [0, 1]},
            }
        )
    )
    monkeypatch.setenv(integration.COSTS, str(costs))
    return SmartSpecPolicy(3, str(candidates))


def serve(policy: Any, batch: int, rounds: int, accept: float, seed: int = 0) -> list[int]:
    """Steps used at each round when every draft is accepted with probability `accept` after the one
    before it."""
    random, used = np.random.default_rng(seed), []
    for _ in range(rounds):
        steps = policy.get_steps_for_batch(batch)
        outcomes = random.random((batch, steps)) < accept
        correct = np.cumprod(outcomes, axis=1).sum(axis=1).tolist() if steps else [0] * batch
        policy.on_verify_complete(correct, batch)
        used.append(steps)
    return used


@pytest.mark.parametrize(
    ("accept", "batch"), [(0.05, 1), (0.5, 1), (0.95, 1), (0.3, 32), (0.9, 32)]
)
def test_it_settles_on_the_steps_with_the_most_tokens_per_second(policy, accept, batch) -> None:
    allowed = [0, 1, 3, 5] if batch == 1 else [0, 1]
    rates = {k: sum(accept**d for d in range(k + 1)) / SECONDS[str(batch)][str(k)] for k in allowed}
    used = serve(policy, batch, 1500, accept)[-500:]
    assert sum(rates[k] for k in used) / len(used) > 0.97 * max(rates.values())


def test_while_off_it_looks_now_and_then_and_comes_back(policy) -> None:
    assert serve(policy, 1, 800, 0.0)[-1] == 0
    off = serve(policy, 1, 1000, 0.0)
    assert set(off) == {0, 1}
    # A step costs a fifth of a plain round: half a per cent of the time, and one run more.
    assert off.count(1) <= 1000 * 0.005 / 0.2 + 2
    back = serve(policy, 1, 2000, 1.0)
    assert back[-200:].count(5) > 190


def test_ranks_that_see_the_same_counts_choose_the_same(tmp_path, policy) -> None:
    other = SmartSpecPolicy(3, str(tmp_path / "adaptive.json"))
    assert serve(policy, 8, 300, 0.6) == serve(other, 8, 300, 0.6)


def test_steps_that_later_versions_name_are_counted_even_as_they_change(policy) -> None:
    """A batch reported late, between two that have other steps, is otherwise unknown."""
    policy.get_steps_for_batch(1)
    policy._recent.extend([1, 5])
    before = policy.lengths.acceptance.tokens()
    policy.on_verify_complete([3], 1)
    assert policy.lengths.acceptance.tokens() == pytest.approx(before)
    policy.on_state_activated(5)
    policy.on_verify_complete([3], 1, num_steps=3)
    assert (policy.lengths.acceptance.tokens()[1:4] > before[1:4]).all()


NODES = {"1": 4, "3": 12, "5": 30}


@pytest.fixture
def tiers(policy, tmp_path) -> SmartSpecPolicy:
    (tmp_path / "costs.json").write_text(json.dumps({"seconds": SECONDS, "nodes": NODES}))
    return SmartSpecPolicy(1, str(tmp_path / "adaptive.json"))


def serve_trees(policy: SmartSpecPolicy, rounds: int, accept: dict[int, float]) -> list[int]:
    """Steps used at batch 2 when the tree of so many steps is accepted one level deeper with
    probability accept[steps]; counts come one round late, as with overlapped scheduling."""
    random, used, late = np.random.default_rng(0), [], None
    for _ in range(rounds):
        steps = policy.get_steps_for_batch(2)
        if late is not None:
            policy.on_verify_complete(late, 2)
        late = [
            int(np.cumprod(random.random(steps) < accept[steps]).sum()) if steps else 0
            for _ in range(2)
        ]
        used.append(steps)
    return used


def test_of_trees_the_tier_of_most_tokens_per_second_is_found(tiers) -> None:
    """A larger tree is accepted better at each level: that is found out although the search began
    at the smallest."""
    accept = {0: 0.0, 1: 0.3, 3: 0.9, 5: 0.92}
    rates = {
        k: tiers.lengths.seconds.predict(2, k) ** -1 * sum(p**d for d in range(k + 1))
        for k, p in accept.items()
    }
    used = serve_trees(tiers, 3000, accept)[-500:]
    assert sum(rates[k] for k in used) / len(used) > 0.97 * max(rates.values())
    assert used.count(max(rates, key=lambda k: rates[k])) > 400


def test_a_tier_that_never_pays_is_left_alone_but_for_exploration(tiers) -> None:
    used = serve_trees(tiers, 1500, dict.fromkeys((0, 1, 3, 5), 0.02))[-660:]
    assert set(used) == {0, 1}
    # A step costs a fifth of a plain round: half a per cent of the time, and one run more.
    assert used.count(1) <= 660 * 0.005 / 0.2 + 2


def test_states_of_tiers_have_their_tokens(tiers) -> None:
    pytest.importorskip(
        "msgspec", reason="SGLang's light dependencies are not installed here: make test-sglang"
    )
    source_of("sglang.srt.speculative.adaptive_runtime_state")
    from smart_decoding.integrations.sglang.trees import TreeController

    worker = Worker(1)
    controller = TreeController(worker, tiers)
    controller.init_states([1, 8, 32])
    assert {steps: tokens for steps, tokens, _ in worker.built} == {0: 1, 1: 5, 3: 13, 5: 31}
    controller.activate_step_by_batch(1)
    assert worker.speculative_num_steps == tiers.get_steps_for_batch(1)


@pytest.mark.parametrize("nodes", [{"3": 2}, {"0": 4}])
def test_trees_smaller_than_their_depth_are_refused(tmp_path, nodes) -> None:
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({"seconds": SECONDS, "nodes": nodes}))
    with pytest.raises(ConfigError, match="nodes"):
        TierCosts.load(path)


def test_captured_graphs_are_those_that_can_be_reached(policy) -> None:
    assert policy.cuda_graph_bs_for_step(3) is None
    policy.set_cuda_graph_bs([8, 1, 16, 32])
    assert policy.cuda_graph_bs_for_step(3) == [1, 8]
    assert policy.cuda_graph_bs_for_step(1) == [
        1,
        8,
        16,
        32,
    ]
    assert max(serve(policy, 12, 200, 1.0)) == 1  # padded to 16


EXAMPLES = Path(__file__).parents[2] / "docs" / "sglang"


def test_the_chains_in_the_docs_are_taken(monkeypatch) -> None:
    monkeypatch.setenv(integration.COSTS, str(EXAMPLES / "chain-costs.json"))
    policy = SmartSpecPolicy(3, str(EXAMPLES / "chain-steps.json"))
    assert policy.candidate_steps == [0, 1, 3, 5]
    assert max(serve(policy, 1, 500, 1.0)) == 5
    assert max(serve(policy, 16, 500, 1.0)) == 1


def test_the_trees_in_the_docs_are_taken(monkeypatch) -> None:
    monkeypatch.setenv(integration.COSTS, str(EXAMPLES / "tree-costs.json"))
    policy = SmartSpecPolicy(4, str(EXAMPLES / "tree-steps.json"))
    assert policy.candidate_steps == [0, 2, 4, 6]
    assert policy.costs.tokens(4) == 15
    assert max(serve_trees(policy, 500, dict.fromkeys((0, 2, 4, 6), 1.0))) == 6


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        '{"seconds": {}}',
        '{"seconds": {"1": {"1": 1.0}}}',
        '{"seconds": {"1": {"0": -1}}}',
    ],
)
def test_files_that_are_none_are_refused(tmp_path, text) -> None:
    path = tmp_path / "costs.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="costs"):
        TierCosts.load(path)


def test_the_plugin_does_nothing_unless_it_is_asked_to(monkeypatch) -> None:
    monkeypatch.delenv(integration.COSTS, raising=False)
    before = set(sys.modules)
    integration.register()
    assert not any(name.startswith("sglang") for name in set(sys.modules) - before)


# --- against the installed wheel ---


def module_of(name: str) -> ModuleType:
    """One module of SGLang, from its file alone."""
    path = source_of(name)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module


class Worker:
    """What SGLang's controller needs of a worker."""

    def __init__(self, steps: int) -> None:
        self.speculative_num_steps = steps
        self.built: list[tuple[int, int, list[int] | None]] = []

    def build_adaptive_runtime_state(
        self, speculative_num_steps, speculative_num_draft_tokens, cuda_graph_bs=None
    ):
        self.built.append((speculative_num_steps, speculative_num_draft_tokens, cuda_graph_bs))
        return speculative_num_steps

    def apply_runtime_state(self, state: int) -> None:
        self.speculative_num_steps = state


def test_the_real_controller_follows_the_policy(policy) -> None:
    controller_module = module_of("sglang.srt.speculative.adaptive_runtime_state")
    worker = Worker(3)
    controller = controller_module.AdaptiveController(worker, policy)
    controller.init_states([1, 8, 32])
    assert {steps: sizes for steps, _, sizes in worker.built} == {
        0: [1, 8, 32],
        1: [1, 8, 32],
        3: [1, 8],
        5: [1, 8],
    }
    assert all(tokens == steps + 1 for steps, tokens, _ in worker.built)
    random = np.random.default_rng(0)
    observed: dict[float, list[int]] = {}
    for accept in (0.95, 0.0, 0.95):
        used = []
        for _ in range(2500):
            controller.activate_step_by_batch(1)
            steps = worker.speculative_num_steps
            correct = int(np.cumprod(random.random(steps) < accept).sum()) if steps else 0
            controller.on_verify_complete([correct], 1)
            used.append(steps)
        observed[accept] = used[-50:]
        assert (np.mean(used[-50:]) > 4) == (accept > 0.5)
    assert set(observed[0.0]) <= {0, 1}
