"""The tokens of a request equal plain decoding in a batch of one: under every policy, batch, chunk
size and memory."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

from smart_decoding.core.policies import POLICIES
from smart_decoding.engine.history import SampleSpec, TokenHistory
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.errors import ConfigError

from .fakes import EOS, alone, finish, make_engine, random_requests, text_of, token_ids

PENALTIES = {
    "repetition_penalty": 1.3,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.3,
    "logit_bias": {5: 1.5},
}
# of 23 tokens, a to w; every word begins with tokens that are allowed
MASKS = {
    "allowed_token_ids": [0, 1, 2, 3, 5, 8, 13, 21],
    "bad_words": ["ab", "ba", "cc", "i", "ncf", "aca", "fvfv"],
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
    "words and a few tokens, greedy": (
        4,
        {"temperature": 0.0, "ignore_eos": True, "max_tokens": 30, **MASKS},
        {"max_num_batched_tokens": 16},
    ),
    "words and a few tokens": (4, {"temperature": 0.8, "max_tokens": 30, **MASKS}, {}),
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


def test_masks_forbid_what_they_name_at_every_node() -> None:
    """Without them the same requests do write these words and tokens."""
    more = {"temperature": 0.8, "ignore_eos": True, "max_tokens": 40}
    free = []
    for masks in ({}, MASKS):
        engine = make_engine("eagle2", drafter={"skill": 0.9})
        requests = []
        for i, (prompt, params) in enumerate(random_requests(3, 3, **more, **masks)):
            requests += engine.add_request(str(i), prompt, params)
        finish(engine)
        assert sum(r.metrics.accepted for r in requests) > 10
        texts = [text_of(request.output) for request in requests]
        written = [word for word in MASKS["bad_words"] for text in texts if word in text]
        others = {token for r in requests for token in r.output} - {*MASKS["allowed_token_ids"]}
        free.append((bool(written), bool(others)))
    assert free == [(True, True), (False, False)]


def test_what_may_leave_no_token_to_draw_is_refused() -> None:
    for params in (
        SamplingParams(allowed_token_ids=[EOS], min_tokens=1),
        SamplingParams(allowed_token_ids=[1, 2], bad_words=["ab", "b", "kc"]),
        SamplingParams(bad_words=[chr(ord("a") + token) for token in range(23)]),
    ):
        with pytest.raises(ConfigError, match="forbid all tokens"):
            make_engine().add_request("x", [1], params.checked(token_ids))
    with pytest.raises(ConfigError, match="bad_words is not supported here"):
        make_engine().add_request("x", [1], SamplingParams(bad_words=["a"]))


@pytest.mark.parametrize("config", [{}, {"max_num_batched_tokens": 7}, {"pages": 8}])
def test_prompt_logprobs_are_those_of_the_prompt_alone(config: dict[str, int]) -> None:
    """In chunks of any size, beside others, after preemptions and with the prompt in the cache."""
    more = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 40, "prompt_logprobs": 3}
    engine = make_engine("eagle2", **config)
    requests = []
    for prompt, params in random_requests(5, 2, **more):
        requests += engine.add_request(str(len(requests)), prompt, params)
    requests += engine.add_request("again", prompt, replace(params, n=2, temperature=0.8))
    finish(engine)
    assert requests.pop().prompt_logprobs is None  # the second answer to the same prompt
    for request in requests:
        first, *entries = request.prompt_logprobs
        assert first is None
        assert [entry.token for entry in entries] == request.prompt[1:]
        for place, entry in enumerate(entries, start=1):
            row = engine.target.logits_of(request.prompt[:place]).astype(np.float64)
            expected = row - np.log(np.exp(row).sum())
            assert entry.logprob == pytest.approx(expected[entry.token], abs=1e-5)
            assert entry.top_tokens.tolist() == np.argsort(-row, kind="stable")[:3].tolist()
    preempted = sum(request.metrics.preemptions for request in requests)
    assert (preempted > 0) == ("pages" in config)


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
