"""The draft lengths that full CUDA graphs are captured for, on configurations on paper.

test_vllm_contract.py compares them with what vLLM's own class captures."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from smart_decoding.core.lengths import DraftLengths, StepSeconds
from smart_decoding.integrations.vllm.graphs import captured_lengths

SIZES = [1, 2, 4, *range(8, 513, 8)]
USUAL = [1, 2, 4, *range(8, 257, 8), *range(272, 513, 16)]  # vLLM's own
SCHEDULE = [0, *[4] * 8, *[2] * 24, *[0] * 224]  # K by batch size


def config(
    mode: str, second_runner: bool = True, sizes: list[int] = SIZES, requests: int = 256
) -> SimpleNamespace:
    """A VllmConfig, as far as it is read."""
    parts = mode.split("_AND_")
    graphs = SimpleNamespace(
        separate_routine=lambda: len(parts) > 1 or mode == "FULL_DECODE_ONLY",
        has_full_cudagraphs=lambda: "FULL" in mode,
    )
    return SimpleNamespace(
        compilation_config=SimpleNamespace(
            cudagraph_mode=graphs,
            cudagraph_capture_sizes=sizes,
            max_cudagraph_capture_size=max(sizes, default=0),
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=requests),
        use_v2_model_runner=second_runner,
    )


@pytest.mark.parametrize("mode", ["FULL_AND_PIECEWISE", "FULL_DECODE_ONLY"])
def test_the_lengths_of_a_schedule_are_captured_up_to_the_largest_graph(mode: str) -> None:
    captured = captured_lengths(config(mode), SCHEDULE, 4)
    assert captured.lengths == (0, 2, 4)
    assert captured.of(1) == (0, 2, 4)
    assert captured.of(101) == (0, 2, 4)  # 505 tokens: 504 rounded up
    assert captured.of(102) == (0, 2)
    assert captured.of(168) == (0, 2)
    assert captured.of(169) == (0,)
    assert captured.of(256) == (0,)


def test_without_a_schedule_the_longest_is_captured_alone() -> None:
    assert captured_lengths(config("FULL_AND_PIECEWISE"), None, 4).lengths == (4,)


def test_the_first_runner_captures_the_longest_alone() -> None:
    assert captured_lengths(config("FULL_AND_PIECEWISE", False), SCHEDULE, 4).lengths == (4,)


@pytest.mark.parametrize("mode", ["NONE", "PIECEWISE", "FULL"])
def test_where_no_graph_is_for_uniform_decoding_every_length_will_do(mode: str) -> None:
    assert captured_lengths(config(mode), None, 3).of(500) == (0, 1, 2, 3)
    assert captured_lengths(config(mode), SCHEDULE, 4).of(500) == (0, 2, 4)


def test_beyond_all_graphs_every_length_of_the_schedule_will_do() -> None:
    captured = captured_lengths(config("FULL_AND_PIECEWISE", sizes=[1, 2, 4, 8]), SCHEDULE, 4)
    assert captured.of(8) == (0,)
    assert captured.of(9) == (0, 2, 4)


def test_where_the_longest_alone_has_a_graph_nothing_may_be_drafted() -> None:
    """At a full load stock vLLM drafts nothing here: 96 is the largest size below 100."""
    full = config("FULL_AND_PIECEWISE", sizes=USUAL, requests=100)
    captured = captured_lengths(full, SCHEDULE, 4)
    assert captured.most == {0: 96, 2: 96, 4: 100}
    assert captured.of(96) == (0, 2, 4)
    for batch in range(97, 101):
        assert captured.of(batch) == (0, 4)


@pytest.mark.parametrize(("accepted", "best"), [(True, 4), (False, 0)])
def test_a_full_load_finds_its_length(accepted: bool, best: int) -> None:
    """For 18 of at most 20 requests every length but 0 has a graph."""
    full = config("FULL_AND_PIECEWISE", sizes=USUAL, requests=20)
    captured = captured_lengths(full, [0, *[4] * 5, *[2] * 5, *[1] * 5, *[0] * 5], 4)
    assert captured.most == {0: 16, 1: 20, 2: 19, 4: 20}
    policy = DraftLengths(captured.lengths[-1], StepSeconds(captured.lengths[0]))
    chosen: list[int] = []
    length, exploring = 0, False
    for _ in range(400):
        drafts = policy.choose(18, captured.of(18))
        right = [length if accepted else 0] * 18
        explores = policy.exploring
        seconds = 0.010 + 0.001 * drafts if length == drafts else None
        policy.observe(18, length, right, seconds, exploring)
        length, exploring = drafts, explores
        chosen.append(drafts)
    assert chosen.count(best) > 300
