"""What we rely on in vLLM, on its real classes and without an engine: run by `make test-vllm`, for
each supported version."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from smart_decoding.errors import ConfigError
from smart_decoding.integrations.vllm import seams
from smart_decoding.integrations.vllm.graphs import captured_lengths
from smart_decoding.integrations.vllm.measure import DRAFT_MODEL, resolved

vllm = pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")
MODEL = os.environ.get("SMART_TEST_MODEL", "")
if not MODEL:
    pytest.skip("SMART_TEST_MODEL is not set: make test-vllm", allow_module_level=True)


def test_every_name_that_is_relied_on_is_there() -> None:
    assert seams.missing() == []


@pytest.mark.parametrize("mode", ["FULL_AND_PIECEWISE", "FULL_DECODE_ONLY"])
@pytest.mark.parametrize("schedule", [None, [[1, 8, 4], [9, 32, 1], [33, 100, 0]], [[1, 9, 3]]])
@pytest.mark.parametrize("sizes", [[1, 2, 4, *range(8, 513, 8)], [1, 2, 4, 8, 16, 24, 32]])
@pytest.mark.parametrize("max_num_seqs", [16, 100, 256])
def test_lengths_are_those_that_vllm_captures_graphs_for(
    mode: str, schedule: Any, sizes: list[int], max_num_seqs: int
) -> None:
    """For every batch size: those with a full graph of the second runner's manager."""
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    longest = 4
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(
            cudagraph_mode=CUDAGraphMode[mode],
            cudagraph_capture_sizes=sizes,
            max_cudagraph_capture_size=max(sizes),
        ),
        cache_config=SimpleNamespace(use_kda_recoverssm=False),
        num_speculative_tokens=longest,
        scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs),
        speculative_config=SimpleNamespace(
            num_speculative_tokens_per_batch_size=schedule,
            uses_dynamic_speculative_decoding=lambda: schedule is not None,
        ),
        use_v2_model_runner=True,
    )
    manager = object.__new__(CudaGraphManager)  # the rest of it wants a GPU
    of_manager = {
        "compilation_config": config.compilation_config,
        "cudagraph_mode": CUDAGraphMode[mode],
        "decode_query_len": longest + 1,
        "lora_capture_cases": [0],
        "max_num_reqs": max_num_seqs,
        "ubatch_runner": None,
        "varlen_decode": False,
        "vllm_config": config,
        "_candidates": {},
        "_capture_descs": {},
    }
    vars(manager).update(of_manager)
    manager._init_candidates()
    full = manager._capture_descs[CUDAGraphMode.FULL]
    lookup = schedule and build_dynamic_sd_schedule_lookup(schedule, max_num_seqs, longest)
    ours = captured_lengths(config, lookup, longest)
    assert set(ours.lengths) == (set(lookup[1:]) if lookup else {longest})
    for batch in range(1, max_num_seqs + 1):
        theirs = {
            graph.uniform_token_count - 1
            for graph in full
            if graph.uniform_token_count and graph.num_reqs >= batch
        }
        offered = theirs | {min(ours.lengths)} if theirs else set(ours.lengths)
        assert set(ours.of(batch)) == offered, batch


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
    same["no_adaptive"] = "the drafter 'ngram' has no confidences"
    assert kept == {**same, "scheduled": True}
    assert resolved({**arguments, "data_parallel_size": 2}) == {**same, "scheduled": False}
    with pytest.raises(ConfigError, match="does not take"):
        resolved({**arguments, "no_such_argument": 1})


def test_vllm_says_why_its_adaptive_verification_cannot_run() -> None:
    """On a CPU: it has no full CUDA graphs."""
    drafter = {"method": "draft_model", "model": MODEL, "num_speculative_tokens": 2}
    found = resolved({"model": MODEL, "speculative_config": drafter})
    assert "daptive" in found["no_adaptive"]


def test_a_draft_model_runs_all_its_passes_in_the_second_runner() -> None:
    """What `smart tune vllm` warns of; EAGLE's and MTP's speculator follows a schedule."""
    assert not seams.reads(DRAFT_MODEL, "num_speculative_tokens")
    eagle = "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator"
    assert seams.reads(f"{eagle}:TargetDependentARSpeculator.propose", "num_speculative_tokens")
