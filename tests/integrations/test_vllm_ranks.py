"""Marks on what travels between the scheduler's process and its ranks', without vLLM."""

from __future__ import annotations

import pickle
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from smart_decoding.integrations.vllm import ranks, shortcuts
from smart_decoding.integrations.vllm.ranks import Length


@dataclass
class Output:
    """Stands for vLLM's ModelRunnerOutput."""

    tokens: list[int]


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """This process as a rank with a stand-in for vLLM; holds what was installed."""
    installed: list[str] = []
    monkeypatch.setitem(sys.modules, "vllm.v1.outputs", SimpleNamespace(ModelRunnerOutput=Output))  # type: ignore[arg-type]
    monkeypatch.setattr(ranks, "install", lambda: installed.append("shortcuts"))
    monkeypatch.setattr(shortcuts, "_seen", [])
    monkeypatch.setattr(Output, "__getstate__", Output.__getstate__)  # put back afterwards
    return installed


@pytest.mark.parametrize("k", [-1, 0, 3])
def test_a_length_installs_the_shortcuts_where_it_arrives_as_a_plain_int(
    rank: list[str], k: int
) -> None:
    sent = pickle.dumps({"step": Length(k)}, protocol=pickle.HIGHEST_PROTOCOL)
    assert not rank
    assert Length(k) == k
    assert hash(Length(k)) == hash(k)
    assert repr(Length(k)) == repr(k)
    got = pickle.loads(sent)["step"]
    assert type(got) is int
    assert got == k
    assert rank == ["shortcuts"]


def test_outputs_of_a_rank_tell_once_a_draft_model_has_run_there(rank: list[str]) -> None:
    assert not ranks.marked(there_and_back(Output([1])))
    pickle.loads(pickle.dumps(Length(2)))
    assert not ranks.marked(
        there_and_back(Output([1]))
    )  # the shortcuts are there, but what calls them?
    shortcuts._seen.append(True)
    back = there_and_back(Output([1, 2]))
    assert ranks.marked(back)
    assert back == Output([1, 2])


def there_and_back(output: Any) -> Any:
    return pickle.loads(pickle.dumps(output, protocol=pickle.HIGHEST_PROTOCOL))


def test_only_ranks_of_this_machine_are_told() -> None:
    assert ranks.same_machine("mp", 1)
    assert not ranks.same_machine("mp", 2)
    assert not ranks.same_machine("ray", 1)
    assert not ranks.same_machine("uni", 1)


def test_drafts_are_not_fetched_after_a_step_that_drafts_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Executor:
        def take_draft_token_ids(self) -> str:
            return "drafts"

    place = "vllm.v1.executor.multiproc_executor"
    monkeypatch.setitem(sys.modules, place, SimpleNamespace(MultiprocExecutor=Executor))  # type: ignore[arg-type]
    ranks.shorten_fetching()
    ranks.shorten_fetching()  # once
    executor = Executor()
    assert executor.take_draft_token_ids() == "drafts"
    ranks.drafts_nothing(True)
    assert executor.take_draft_token_ids() is None
    assert executor.take_draft_token_ids() == "drafts"  # of an engine whose scheduler says nothing
    ranks.drafts_nothing(True)
    ranks.drafts_nothing(False)
    assert executor.take_draft_token_ids() == "drafts"


@pytest.mark.parametrize(
    ("length", "drafts", "special", "plain"),
    [
        (-1, {}, "", True),
        (0, {}, "", False),
        (-1, {"a": [5]}, "", False),
        (-1, {}, "async", False),
        (-1, {}, "hybrid", False),
        (-1, {}, "thinking", False),
    ],
)
def test_a_step_that_neither_verifies_nor_drafts_is_taken_without_the_speculative_config(
    length: int, drafts: dict[str, list[int]], special: str, plain: bool
) -> None:
    model = SimpleNamespace(is_hybrid=special == "hybrid")
    batch = SimpleNamespace(
        thinking_budget_state_holder=object() if special == "thinking" else None
    )
    runner = SimpleNamespace(
        speculative_config="config",
        use_async_scheduling=special == "async",
        model_config=model,
        input_batch=batch,
    )
    step = SimpleNamespace(num_spec_tokens_to_schedule=length, scheduled_spec_decode_tokens=drafts)
    during = []

    def fail() -> None:
        during.append(runner.speculative_config)
        raise RuntimeError("a step that fails")

    with pytest.raises(RuntimeError), shortcuts._plain(runner, step):
        fail()
    assert during == [None if plain else "config"]
    assert runner.speculative_config == "config"
