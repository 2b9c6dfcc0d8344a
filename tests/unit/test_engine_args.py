"""The options of `LLM`: what is wrong is said before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from smart_decoding.engine_args import EngineArgs
from smart_decoding.errors import CapacityError, ConfigError
from smart_decoding.llm import LLM


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"max_model_length": 8},
            "unknown option 'max_model_length': did you mean 'max_model_len'?",
        ),
        ({"wings": 2}, "unknown option 'wings': use model, speculative_config"),
        ({"dtype": "int3"}, "dtype='int3' is not supported"),
        (
            {"quantization": "int3"},
            "quantization='int3' is not supported: use None, off, int8, int4",
        ),
        ({"max_num_seqs": 0}, "max_num_seqs=0 is not allowed: it must be at least 1"),
        ({"limit_mm_per_prompt": {"smell": 1}}, "limit_mm_per_prompt: 'smell'"),
    ],
)
def test_llm_refuses_wrong_options_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LLM("no/such-model", **options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_the_longest_answer_is_what_model_and_memory_allow() -> None:
    assert EngineArgs().longest(8192) == 4096
    assert EngineArgs(kv_cache_tokens=512).longest(8192) == 512
    assert EngineArgs(max_model_len=700).longest(8192) == 700
    with pytest.raises(CapacityError, match="max_model_len=700 exceeds the KV memory of 512"):
        EngineArgs(max_model_len=700, kv_cache_tokens=512).longest(8192)


def test_memory_is_for_sixteen_requests_unless_asked_otherwise() -> None:
    assert EngineArgs().kv_tokens(4096) == 16 * 2048
    assert EngineArgs(max_num_seqs=1).kv_tokens(4096) == 4096
    assert EngineArgs(kv_cache_tokens=9000).kv_tokens(4096) == 9000
