"""The tokens of a request are those of plain decoding alone: under every policy, batch, chunk size
and memory."""

import functools

import numpy as np
import pytest
import torch

from smart_decoding.core.policies import POLICIES
from smart_decoding.engine.history import SampleSpec, TokenHistory
from smart_decoding.engine.sampling_params import SamplingParams

from .fakes import EOS, alone, finish, make_engine, random_requests

PENALTIES = {
    "repetition_penalty": 1.3,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.3,
    "logit_bias": {5: 1.5},
}
# name -> (requests, sampling, engine)
SCENARIOS = {
    "one": (1, {"temperature": 0.0}, {}),
    "one, drawn": (1, {"temperature": 0.8}, {}),
    "batch of 4, small chunks": (4, {"temperature": 0.0}, {"max_num_batched_tokens": 7}),
    "batch of 16": (16, {"temperature": 0.8, "top_p": 0.9}, {"max_num_batched_tokens": 64}),
    "penalties": (
        3,
        {"temperature": 0.8, "ignore_eos": True, **PENALTIES},
        {"prefix_caching": False},
    ),
    "penalties, greedy": (
        3,
        {"temperature": 0.0, "min_tokens": 6, **PENALTIES},
        {"max_num_batched_tokens": 16},
    ),
    "tight memory": (4, {"temperature": 0.0, "ignore_eos": True, "max_tokens": 44}, {"pages": 8}),
    "tight memory, no caching": (
        4,
        {"temperature": 0.8, "ignore_eos": True, "max_tokens": 44},
        {"pages": 8, "prefix_caching": False, "max_num_batched_tokens": 20},
    ),
    "few at a time": (7, {"temperature": 0.8, "stop": ["ab", "c"]}, {"max_num_seqs": 3}),
}


@functools.cache
def expected(name: str) -> list[list[int]]:
    count, sampling, _ = SCENARIOS[name]
    return [
        alone(prompt, params)[0].output for prompt, params in random_requests(count, 1, **sampling)
    ]


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("policy", POLICIES)
def test_tokens_are_those_of_plain_decoding_alone(policy: str, name: str) -> None:
    count, sampling, config = SCENARIOS[name]
    engine = make_engine(policy, drafter={"free": name.startswith("batch")}, **config)
    requests = []
    for i, (prompt, params) in enumerate(random_requests(count, 1, **sampling)):
        requests += engine.add_request(str(i), prompt, params)
        if i % 3 == 2:
            engine.step()  # later requests join a running batch
    finish(engine)
    assert [request.output for request in requests] == expected(name)
    if policy == "off":
        assert sum(r.metrics.verified for r in requests) == 0
        assert all(1 + r.metrics.rounds + r.metrics.preemptions >= len(r.output) for r in requests)
    elif sum(map(len, expected(name))) > 20:
        assert (
            sum(r.metrics.verified for r in requests)
            >= sum(r.metrics.accepted for r in requests)
            > 0
        )
    if name.startswith("tight"):
        assert sum(r.metrics.preemptions for r in requests) > 0


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_plain_decoding_alone_is_the_targets_own_sequence(temperature: float) -> None:
    """The engine against a loop without cache, pages or batch."""
    prompt = [1, 2, 3]
    params = SamplingParams(temperature=temperature, max_tokens=50, seed=4, **PENALTIES)
    target = make_engine().target
    tokens = list(prompt)
    history = TokenHistory(prompt)
    while len(tokens) < 53 and (tokens == prompt or tokens[-1] != EOS):
        logits = torch.from_numpy(target.logits_of(tokens))[None]
        spec = SampleSpec(params, 4, 0, len(tokens) - 3, history, (), (EOS,))
        tokens.append(int(target.sample(logits, np.array([0]), [spec])[0]))
        history.append(tokens[-1:])
    assert alone(prompt, params)[0].output == tokens[3:]


def test_a_request_that_refuses_speculation_gets_no_nodes() -> None:
    engine = make_engine("static")
    params = {"temperature": 0.0, "max_tokens": 20, "ignore_eos": True}
    (no,) = engine.add_request("no", [1, 2], SamplingParams(speculate=False, **params))
    (yes,) = engine.add_request("yes", [1, 2], SamplingParams(**params))
    finish(engine)
    assert no.output == yes.output == alone([1, 2], SamplingParams(**params))[0].output
    assert no.metrics.verified == 0 < yes.metrics.accepted
    assert yes.metrics.rounds < no.metrics.rounds == 19


def test_logprobs_do_not_depend_on_the_tree() -> None:
    params = SamplingParams(temperature=0.8, max_tokens=20, seed=2, logprobs=3, ignore_eos=True)
    (plain,) = alone([4, 5, 6], params)
    engine = make_engine("eagle2")
    (drafted,) = engine.add_request("x", [4, 5, 6], params)
    finish(engine)
    assert drafted.metrics.accepted > 0
    for request in (plain, drafted):
        assert [entry.token for entry in request.logprobs] == request.output
    assert [entry.logprob for entry in plain.logprobs] == [
        entry.logprob for entry in drafted.logprobs
    ]
