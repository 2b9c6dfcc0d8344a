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

from smart_decoding.integrations.vllm.ranks import MARK

vllm = pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")
MODEL = os.environ.get("SMART_TEST_MODEL", "")
if not MODEL:
    pytest.skip("SMART_TEST_MODEL is not set: make test-vllm", allow_module_level=True)

LONGEST, BLOCKS, PROMPT = 4, 100, list(range(5, 25))


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Any:
    import torch
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
        speculative_config=drafter,
        additional_config={"smart": {"shortcuts": False}},
    )
    config = arguments.create_engine_config()
    config.scheduler_config.async_scheduling = True  # as on a GPU
    config.cache_config.num_gpu_blocks = BLOCKS
    spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=1, dtype=torch.float32)
    caches = KVCacheConfig(BLOCKS, [], [KVCacheGroupSpec(["layer"], spec)])
    return SmartAsyncScheduler(config, caches, StructuredOutputManager(config), 16, log_stats=True)


def add(scheduler: Any, *names: str, max_tokens: int = 100) -> None:
    from vllm.v1.request import Request

    params = vllm.SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    for name in names:
        scheduler.add_request(Request(name, PROMPT, params, None))


def answer(
    scheduler: Any, output: Any, accepted: dict[str, int], drafter_seen: bool = False
) -> None:
    """The model's answer to a step: so many of its drafts were right, and one token of its own.
    drafter_seen: what a rank in another process says with it."""
    from vllm.v1.outputs import ModelRunnerOutput

    names = list(output.num_scheduled_tokens)
    sampled = [[7] * (accepted.get(name, 0) + 1) for name in names]
    ran = ModelRunnerOutput(
        req_ids=names,
        req_id_to_index={n: i for i, n in enumerate(names)},
        sampled_token_ids=sampled,
    )
    setattr(ran, MARK, drafter_seen)
    scheduler.update_from_output(output, ran)


def test_places_are_kept_for_the_drafts_that_are_to_be_verified(
    scheduler: Any, monkeypatch: Any
) -> None:
    policy = scheduler.controller.policy
    monkeypatch.setattr(policy, "length", lambda ids: LONGEST)
    wanted = {"a": 2, "b": 0}
    monkeypatch.setattr(
        policy, "trim", lambda ids, drafted, greedy, room: [wanted[id_] for id_ in ids]
    )
    add(scheduler, "a", "b")
    prompts = scheduler.schedule()
    assert prompts.num_scheduled_tokens == {"a": len(PROMPT), "b": len(PROMPT)}
    assert prompts.num_spec_tokens_to_schedule == LONGEST
    wanted.update(a=1, b=3)  # of the step after the next
    step = scheduler.schedule()  # before the prompts' tokens are known
    assert step.num_scheduled_tokens == {"a": 3, "b": 1}
    assert step.scheduled_spec_decode_tokens == {"a": [-1, -1]}
    answer(scheduler, prompts, {})
    following = scheduler.schedule()
    assert following.num_scheduled_tokens == {"a": 2, "b": 4}
    assert {
        name: len(drafts) for name, drafts in following.scheduled_spec_decode_tokens.items()
    } == {"a": 1, "b": 3}
    answer(scheduler, step, {"a": 1})
    assert (policy.counters.verified, policy.counters.accepted) == (2, 1)
    assert scheduler.requests["a"].num_output_tokens == 3
    assert scheduler.requests["b"].num_output_tokens == 2


def test_requests_run_to_their_end_with_speculation_on_and_off(scheduler: Any) -> None:
    """With the real policy: each draft is right with a probability of its request's own."""
    random, chances = np.random.default_rng(0), {"a": 0.95, "b": 0.05, "c": 0.7}
    add(scheduler, *chances, max_tokens=300)
    under_way: deque[Any] = deque()
    requests = dict(scheduler.requests)
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
            assert len(drafts) <= LONGEST
        answer(scheduler, output, accepted)
    assert {name: request.num_output_tokens for name, request in requests.items()} == dict.fromkeys(
        chances, 300
    )
    counters = scheduler.controller.policy.counters
    assert counters.drafted >= counters.verified > counters.accepted > 0


def test_the_draft_model_rests_only_once_a_rank_says_that_it_is_understood(scheduler: Any) -> None:
    policy = scheduler.controller.policy
    add(scheduler, "a")
    for says, may_disable in ((False, False), (True, False), (False, True), (False, True)):
        step = scheduler.schedule()
        assert policy.may_disable == may_disable
        answer(scheduler, step, {}, says)
