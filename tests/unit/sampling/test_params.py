"""SamplingParams: vLLM's defaults and ranges, one clear line per error."""

import inspect
import math
import re

import numpy as np
import pytest

from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.engine.structured import StructuredOutputsParams
from smart_decoding.errors import ConfigError

BAD = {
    "n": [0, -1, 1.5, True, "2"],
    "temperature": [-0.1, 2.1, math.nan, math.inf, "1", None],
    "top_p": [0.0, -0.5, 1.01, math.nan],
    "top_k": [-2, 1.5, None],
    "min_p": [-0.1, 1.1, math.nan],
    "repetition_penalty": [0.0, -1.0, 1e-300, 101.0, math.inf, math.nan],
    "presence_penalty": [-2.1, 2.1],
    "frequency_penalty": [-2.1, 2.1],
    "logit_bias": [{1: 101.0}, {1: -math.inf}, {-1: 1.0}, {"a": 1.0}, {1: "x"}, [1]],
    "stop": ["", ["a", ""], [1], 3, "x" * 1025],
    "stop_token_ids": [[-1], ["a"], [1.5], 7, "12"],
    "ignore_eos": [1, None],
    "min_tokens": [-1, 17],
    "max_tokens": [0, -3, 2.0],
    "seed": [2**63, -(2**63) - 1, 0.5],
    "logprobs": [-2, 1.5],
    "prompt_logprobs": [-2, "all"],
    "bad_words": ["word", [""], [" "], [3]],
    "allowed_token_ids": [[], [-1], ["a"], 7],
    "detokenize": [None, 1],
    "skip_special_tokens": ["yes"],
    "include_stop_str_in_output": [0],
    "speculate": ["no"],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD.items() for value in values]
)
def test_a_value_out_of_range_is_refused_in_one_line_that_names_it(name, value):
    with pytest.raises(ConfigError) as error:
        SamplingParams(**{name: value})
    message = str(error.value)
    assert name in message
    assert "must be" in message
    assert "\n" not in message
    assert repr(value)[:200] in message or name == "logit_bias"


@pytest.mark.parametrize(
    ("name", "hint"),
    [("max_token", "did you mean 'max_tokens'?"), ("best_of", "use n, temperature, top_p")],
)
def test_an_unknown_name_is_refused_with_the_nearest_one(name, hint):
    with pytest.raises(ConfigError, match=re.escape(f"unknown option {name!r}: {hint}")):
        SamplingParams(**{name: 3})


def test_the_arguments_are_still_seen_by_tools():
    assert [*inspect.signature(SamplingParams).parameters][:3] == ["n", "temperature", "top_p"]


def test_boundaries_are_allowed():
    SamplingParams(
        temperature=2, top_p=1, top_k=-1, min_p=1, presence_penalty=-2, frequency_penalty=2, n=8
    )
    SamplingParams(
        max_tokens=None, min_tokens=10_000, seed=-(2**63), logprobs=-1, logit_bias={0: -100, 3: 100}
    )


def test_defaults_are_vllms():
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (
        1,
        1.0,
        1.0,
        0,
        0.0,
    )
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (
        1.0,
        0.0,
        0.0,
    )
    assert (params.max_tokens, params.min_tokens, params.seed, params.logprobs) == (
        16,
        0,
        None,
        None,
    )
    assert params.speculate
    assert params.skip_special_tokens
    assert not (params.ignore_eos)
    assert not (params.include_stop_str_in_output)
    assert not (params.needs_history)
    assert not (params.greedy)


def test_greedy_allows_one_answer_only():
    assert SamplingParams(temperature=0).greedy
    assert SamplingParams(temperature=1e-6).greedy
    assert not SamplingParams(temperature=1e-4).greedy
    with pytest.raises(ConfigError, match=r"n=2 .*greedy"):
        SamplingParams(temperature=0, n=2)


def test_stops_are_normalised_and_minus_one_is_no_seed():
    assert SamplingParams().stop_strings == ()
    assert SamplingParams(stop="END").stop_strings == ("END",)
    assert SamplingParams(stop=["b", "a", "b"]).stop_strings == ("b", "a")
    assert SamplingParams(stop_token_ids=[3, 1, 3]).stop_ids == {1, 3}
    assert SamplingParams(seed=-1).seed is None


@pytest.mark.parametrize(
    "options",
    [
        {"logit_bias": {50: 1.0}},
        {"stop_token_ids": [3, 99]},
        {"allowed_token_ids": [1, 50]},
        {"logprobs": 51},
        {"prompt_logprobs": 51},
    ],
)
def test_what_does_not_fit_the_vocabulary_is_refused(options):
    params = SamplingParams(**options)
    params.check_vocabulary(1000)
    with pytest.raises(ConfigError, match=next(iter(options))):
        params.check_vocabulary(50)


@pytest.mark.parametrize(
    ("options", "history", "changes"),
    [
        ({}, False, False),
        ({"repetition_penalty": 1.1}, True, True),
        ({"presence_penalty": 0.1}, True, True),
        ({"frequency_penalty": -0.1}, True, True),
        ({"logit_bias": {1: 1}}, False, True),
        ({"min_tokens": 1}, False, True),
        ({"bad_words": ["a"]}, False, True),
        ({"allowed_token_ids": [1]}, False, True),
        ({"prompt_logprobs": 1}, False, False),
    ],
)
def test_what_a_request_needs(options, history, changes):
    params = SamplingParams(**options)
    assert (params.needs_history, params.changes_logits) == (history, changes)


@pytest.mark.parametrize(
    "options",
    [
        {"detokenize": False, "stop": "a"},
        {"bad_words": ["a"], "structured_outputs": StructuredOutputsParams(regex="a")},
        {"allowed_token_ids": [1], "structured_outputs": StructuredOutputsParams(regex="a")},
    ],
)
def test_what_cannot_go_together_is_refused(options):
    with pytest.raises(ConfigError, match=f"{next(iter(options))}=.* is not allowed"):
        SamplingParams(**options)


def test_a_bad_word_is_one_behind_a_blank_too():
    params = SamplingParams(bad_words=[" ab", "ab", "c"]).checked(lambda text: text.encode())
    assert params.bad_words_token_ids == [(97, 98), (32, 97, 98), (99,), (32, 99)]


def test_a_bad_word_has_an_end():
    SamplingParams(bad_words=["a" * 256])
    with pytest.raises(ConfigError, match=r"bad_words=.* at most 256 characters"):
        SamplingParams(bad_words=["b", "a" * 257])


@pytest.mark.parametrize("name", ["allowed_token_ids", "stop_token_ids"])
def test_token_ids_may_be_any_collection(name):
    for given in ({5}, (5,), range(5, 6), {5: None}.keys()):
        params = SamplingParams(**{name: given})
        assert list(getattr(params, f"{name.partition('_')[0]}_array")) == [5]
    with pytest.raises(ConfigError, match=name):
        SamplingParams(**{name: iter([5])})


@pytest.mark.parametrize("name", ["allowed_token_ids", "stop_token_ids"])
def test_token_ids_may_be_arrays(name):
    given = SamplingParams(**{name: np.array([3, 5])})
    checked = given.checked(lambda text: text.encode())
    assert checked.checked(lambda text: text.encode()) == checked == given
    assert given == SamplingParams(**{name: [3, 5]}) != SamplingParams(**{name: [3, 4]})
    assert list(getattr(checked, f"{name.partition('_')[0]}_array")) == [3, 5]
    with pytest.raises(ConfigError, match=name):
        SamplingParams(**{name: np.array([0.5, 3])})
    with pytest.raises(ConfigError, match=name):
        given.check_vocabulary(5)
