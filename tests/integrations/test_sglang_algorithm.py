"""SMART_EAGLE3 as SGLang sees it, what it refuses before a model is loaded, and its choice."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sglang_wheel import source_of

from smart_decoding.errors import ConfigError
from smart_decoding.integrations.sglang.costs import RoundCosts
from smart_decoding.integrations.sglang.pooled import PooledChoice, RowCosts

STEPS, NODES = 3, 8


def row_costs(per_row: float, drafting: float = 0.2) -> RowCosts:
    """A second and `per_row` of a second a row."""
    seconds = {
        batch: {0: 1.0 + per_row * batch, STEPS: 1.0 + drafting + per_row * batch * (1 + NODES)}
        for batch in (1, 4, 16)
    }
    return RowCosts(RoundCosts(seconds, {STEPS: NODES}), STEPS)


def drafted(random: np.random.Generator, batch: int) -> np.ndarray:
    """Path probabilities of chains and forks, parents first, in fp32 as SGLang has them."""
    probs = np.ones((batch, NODES + 1), np.float32)
    for node in range(1, NODES + 1):
        parent = random.integers(0, node, batch)
        probs[:, node] = probs[np.arange(batch), parent] * random.random(batch, np.float32)
    return probs[:, 1:]


def test_costs_are_those_of_rows_and_of_drafting() -> None:
    costs = row_costs(0.05)
    assert costs.verify(np.array([1, 16, 160])) == pytest.approx([1.05, 1.8, 9.0])
    assert costs.draft(4) == pytest.approx(0.2)


@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("per_row", [0.005, 0.05, 0.5])
def test_no_other_number_of_nodes_brings_more_tokens_per_second(per_row, batch) -> None:
    costs = row_costs(per_row)
    for seed in range(20):
        probs = drafted(np.random.default_rng(seed), batch)
        keep = PooledChoice(costs, NODES).choose(probs)
        gains = np.sort(probs.astype(float).ravel())[::-1]
        rows = batch + np.arange(len(gains) + 1)
        tokens = batch + np.concatenate(([0.0], np.cumsum(gains)))
        rates = tokens / (costs.draft(batch) + costs.verify(rows))
        found = (batch + probs[keep].sum()) / (
            costs.draft(batch) + costs.verify(batch + keep.sum())
        )
        assert found == pytest.approx(rates.max())


def test_equal_probabilities_keep_parents_first() -> None:
    keep = PooledChoice(row_costs(0.05), NODES).choose(np.full((3, NODES), 0.5, np.float32))
    counts = keep.sum(axis=1)
    assert all(keep[owner, : counts[owner]].all() for owner in range(3))


def served(choice: PooledChoice, accept: float, rounds: int) -> int:
    """How many rounds of batch 4 drafted, when a draft is accepted as often as `accept` times what
    the drafter says."""
    random = np.random.default_rng(0)
    count = 0
    for _ in range(rounds):
        accepted = [0] * 4
        if choice.drafts(4):
            count += 1
            probs = np.sort(random.random((4, NODES), np.float32), axis=1)[:, ::-1]
            keep = choice.choose(probs)
            expected = np.where(keep, probs, 0.0).sum(axis=1) * accept
            accepted = random.binomial(NODES, np.minimum(expected / NODES, 1.0)).tolist()
        choice.observe(accepted)
    return count


def test_a_drafter_that_promises_too_much_is_left_off_and_comes_back() -> None:
    choice = PooledChoice(row_costs(0.05), NODES)
    assert served(choice, 1.0, 200) == 200
    served(choice, 0.0, 400)
    assert choice.correction < 0.4
    assert served(choice, 0.0, 400) < 40
    assert served(choice, 1.0, 3000) > 1500


@pytest.mark.parametrize(
    ("table", "nodes", "wrong"),
    [
        ({1: {0: 1.0, STEPS: 2.0}}, {STEPS: NODES}, "two batch sizes"),
        ({1: {0: 1.0}, 4: {0: 1.0}}, {2: NODES}, "lacks 3"),
    ],
)
def test_costs_that_say_too_little_are_refused(table, nodes, wrong) -> None:
    with pytest.raises(ConfigError, match=wrong):
        RowCosts(RoundCosts(table, nodes), STEPS)


# --- with the installed wheel ---


@pytest.fixture
def algorithm(monkeypatch, tmp_path) -> Any:
    pytest.importorskip(
        "msgspec", reason="SGLang's light dependencies are not installed here: make test-sglang"
    )
    source_of("sglang.version")
    path = tmp_path / "costs.json"
    path.write_text(
        '{"seconds": {"1": {"0": 1, "3": 2}, "4": {"0": 1, "3": 2}}, "nodes": {"3": 5}}'
    )
    monkeypatch.setenv("SMART_SGLANG_COSTS", str(path))
    from smart_decoding.integrations.sglang import algorithm as module

    return module


def test_the_documented_example_starts(algorithm, monkeypatch) -> None:
    """With the options of docs/sglang.md, all of which SGLang has."""
    from sglang.srt.server_args import ServerArgs

    costs = Path(__file__).parents[2] / "docs" / "sglang" / "tree-costs.json"
    monkeypatch.setenv("SMART_SGLANG_COSTS", str(costs))
    given = arguments(
        speculative_eagle_topk=4, speculative_num_steps=4, speculative_num_draft_tokens=15
    )
    algorithm.check(given)
    known = ServerArgs(model_path="none", **vars(given))
    algorithm.check(known)
    assert [option for option in algorithm.REFUSED if not hasattr(known, option)] == []


def arguments(**changed: Any) -> SimpleNamespace:
    given = {
        "attention_backend": "triton",
        "decode_attention_backend": None,
        "prefill_attention_backend": None,
        "disable_cuda_graph": False,
        "disable_decode_cuda_graph": False,
        "cuda_graph_backend_decode": "disabled",
        "disable_overlap_schedule": False,
        "max_running_requests": None,
        "speculative_num_steps": 3,
        "speculative_eagle_topk": 2,
        "speculative_num_draft_tokens": 6,
        "speculative_draft_model_path": "head",
    }
    return SimpleNamespace(**{**given, **changed})


def test_it_answers_as_eagle3_and_runs_without_overlap(algorithm) -> None:
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    ours = algorithm.SmartEagle3(algorithm.NAME, algorithm.worker, supports_overlap=True)
    asked = [name for name in vars(SpeculativeAlgorithm) if name.startswith(("is_", "supports_"))]
    assert len(asked) > 10
    for name in [*asked, "has_draft_kv", "need_topk", "carries_draft_hidden_states"]:
        assert getattr(ours, name)() == getattr(SpeculativeAlgorithm.EAGLE3, name)(), name
    given = arguments()
    ours.handle_server_args(given)
    assert given.disable_overlap_schedule
    assert given.max_running_requests == 48


@pytest.mark.parametrize(
    ("changed", "wrong"),
    [
        ({"attention_backend": "flashinfer"}, "--attention-backend triton"),
        ({"prefill_attention_backend": "fa3"}, "--attention-backend triton"),
        ({"cuda_graph_backend_decode": None}, "--cuda-graph-backend-decode disabled"),
        ({"speculative_eagle_topk": 1}, "topk 2 or more"),
        ({"speculative_num_steps": None}, "--speculative-num-steps"),
        ({"speculative_num_steps": 4}, "'nodes' lacks 4"),
        ({"speculative_num_draft_tokens": 12}, "4 to 11"),
        ({"speculative_adaptive": True}, "--speculative-adaptive"),
        ({"enable_dp_attention": True}, "--enable-dp-attention"),
        ({"pp_size": 2}, "--pp-size above 1"),
    ],
)
def test_what_was_never_tried_is_refused_before_a_model_loads(algorithm, changed, wrong) -> None:
    with pytest.raises(ConfigError, match=wrong):
        algorithm.check(arguments(**changed))
