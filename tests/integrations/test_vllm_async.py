"""SmartAsyncScheduler on vLLM's real AsyncScheduler, with a stand-in for the model: run by `make
test-vllm`.

vLLM's CPU build schedules synchronously, so that no engine can be run here: these tests call what
an engine calls, with one step always under way while the next one is scheduled."""

from __future__ import annotations

import os
from collections import deque
from typing import Any

import numpy as np
import pytest

vllm = pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")
MODEL = os.environ.get("SMART_TEST_MODEL", "")
if not MODEL:
    pytest.skip("SMART_TEST_MODEL is not set: make test-vllm", allow_module_level=True)

LONGEST, BLOCKS, PROMPT = 4, 100, list(range(5, 25))


def made(monkeypatch: pytest.MonkeyPatch, mode: str = "NONE", schedule: Any = None) -> Any:
    """A scheduler, of an engine with CUDA graphs of this mode and the second model runner."""
    import torch
    from vllm.config.compilation import CUDAGraphMode
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    from smart_decoding.integrations.vllm import SmartAsyncScheduler

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    drafter = {"method": "draft_model", "model": MODEL, "num_speculative_tokens": LONGEST}
    arguments = EngineArgs(
        model=MODEL,
        dtype="float32",
        max_model_len=512,
        enable_prefix_caching=False,
        speculative_config=drafter | {"num_speculative_tokens_per_batch_size": schedule},
    )
    config = arguments.create_engine_config()
    config.scheduler_config.async_scheduling = True  # as on a GPU
    config.cache_config.num_gpu_blocks = BLOCKS
    config.compilation_config.cudagraph_mode = CUDAGraphMode[mode]
    config.compilation_config.cudagraph_capture_sizes = [1, 2, 4, 8, 16]
    config.compilation_config.max_cudagraph_capture_size = 16
    monkeypatch.setattr(type(config), "use_v2_model_runner", mode != "NONE")
    spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=1, dtype=torch.float32)
    caches = KVCacheConfig(BLOCKS, [], [KVCacheGroupSpec(["layer"], spec)])
    return SmartAsyncScheduler(config, caches, StructuredOutputManager(config), 16, log_stats=True)


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Any:
    return made(monkeypatch)


def add(scheduler: Any, *names: str, max_tokens: int = 100) -> None:
    from vllm.v1.request import Request

    params = vllm.SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    for name in names:
        scheduler.add_request(Request(name, PROMPT, params, None))


def answer(scheduler: Any, output: Any, accepted: dict[str, int]) -> None:
    """The model's answer to a step: so many of its drafts were right, and one token of its own."""
    from vllm.v1.outputs import ModelRunnerOutput

    names = list(output.num_scheduled_tokens)
    sampled = [[7] * (accepted.get(name, 0) + 1) for name in names]
    ran = ModelRunnerOutput(
        req_ids=names,
        req_id_to_index={n: i for i, n in enumerate(names)},
        sampled_token_ids=sampled,
    )
    scheduler.update_from_output(output, ran)


def drafts_of(step: Any) -> dict[str, int]:
    return {name: len(drafts) for name, drafts in step.scheduled_spec_decode_tokens.items()}


def test_a_step_has_one_length_for_all_its_requests(scheduler: Any, monkeypatch: Any) -> None:
    policy = scheduler.controller.policy
    lengths = iter((2, 3, 0))
    monkeypatch.setattr(policy, "choose", lambda batch, allowed: next(lengths))
    add(scheduler, "a", "b")
    prompts = scheduler.schedule()
    assert prompts.num_scheduled_tokens == {"a": len(PROMPT), "b": len(PROMPT)}
    assert prompts.num_spec_tokens_to_schedule == 2
    step = scheduler.schedule()  # before the prompts' tokens are known
    assert step.num_scheduled_tokens == {"a": 3, "b": 3}
    assert drafts_of(step) == {"a": 2, "b": 2}
    answer(scheduler, prompts, {})
    following = scheduler.schedule()
    assert drafts_of(following) == {"a": 3, "b": 3}
    answer(scheduler, step, {"a": 1})
    counters = scheduler.controller.counters
    assert (counters.verified, counters.accepted) == (4, 1)
    assert policy.acceptance.tokens()[1] < 1.7  # one of two first drafts was right
    assert scheduler.requests["a"].num_output_tokens == 3
    assert scheduler.requests["b"].num_output_tokens == 2


def test_requests_run_to_their_end_with_speculation_on_and_off(scheduler: Any) -> None:
    """With the real policy: each draft is right with a probability of its request's own."""
    random, chances = np.random.default_rng(0), {"a": 0.95, "b": 0.05, "c": 0.7}
    add(scheduler, *chances, max_tokens=300)
    under_way: deque[Any] = deque()
    requests = dict(scheduler.requests)
    lengths: set[int] = set()
    for _ in range(2000):
        if not scheduler.requests:
            break
        under_way.append(scheduler.schedule())
        if len(under_way) < 2 and under_way[-1].num_scheduled_tokens:
            continue
        output = under_way.popleft()
        accepted = {}
        for name, drafts in output.scheduled_spec_decode_tokens.items():
            misses = np.flatnonzero(random.random(len(drafts)) >= chances[name])
            accepted[name] = int(misses[0]) if len(misses) else len(drafts)
        lengths |= set(drafts_of(output).values())
        assert len(set(drafts_of(output).values())) <= 1
        answer(scheduler, output, accepted)
    assert {name: request.num_output_tokens for name, request in requests.items()} == dict.fromkeys(
        chances, 300
    )
    counters = scheduler.controller.counters
    assert counters.verified > counters.accepted > 0
    assert max(lengths) > 1


def test_only_lengths_with_full_graphs_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = made(monkeypatch, "FULL_AND_PIECEWISE", [[1, 8, 3], [9, 64, 0]])
    captured = scheduler.controller.captured
    assert captured.of(4) == (0, 3)
    assert captured.of(5) == (0,)  # 20 tokens are more than the largest graph has


def test_without_a_choice_vllm_goes_on_as_without_us(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = made(monkeypatch, "FULL_AND_PIECEWISE")
    assert scheduler.controller is None
    assert scheduler.dynamic_sd_lookup is None
    add(scheduler, "a")
    assert scheduler.schedule().num_spec_tokens_to_schedule == LONGEST
