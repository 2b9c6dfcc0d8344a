"""The options of `LLM`: what is wrong is said before anything is loaded."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

import pytest

from smart_decoding.engine.kv import PAGE
from smart_decoding.engine_args import EngineArgs
from smart_decoding.errors import CapacityError, ConfigError
from smart_decoding.llm import LLM
from smart_decoding.models.target import dtype_of


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
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2 is not supported: leave it at 1"),
        ({"pipeline_parallel_size": 4}, "pipeline_parallel_size=4 is not supported"),
        ({"cpu_offload_gb": 1}, "cpu_offload_gb=1 is not supported"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype='fp8' is not supported: leave it at 'auto'"),
        ({"block_size": 32}, f"block_size=32 is not supported: leave it at {PAGE}"),
        ({"revision": "v1"}, "revision='v1' is not supported: leave it at None"),
        ({"enable_lora": True}, "enable_lora=True is not supported: leave it at False"),
        ({"runner": "pooling"}, "runner='pooling' is not supported: leave it at 'generate'"),
        ({"max_model_len": "100"}, "max_model_len='100' is not allowed: it must be of the type"),
        ({"max_num_seqs": 2.5}, "max_num_seqs=2.5 is not allowed: it must be of the type int"),
        ({"limit_mm_per_prompt": 5}, "limit_mm_per_prompt=5 is not allowed"),
        ({"max_logprobs": -2}, "max_logprobs=-2 is not allowed: it must be at least -1"),
        ({"load_format": "dummy"}, "load_format='dummy' is not supported: leave it at 'auto'"),
        (
            {"tokenizer": "another/model"},
            "tokenizer='another/model' is not supported: give a folder",
        ),
        (
            {"override_generation_config": {"beams": 2}},
            "override_generation_config has an unknown option 'beams': use temperature",
        ),
    ],
)
def test_llm_refuses_wrong_options_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LLM("no/such-model", **options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_the_longest_answer_is_what_model_and_memory_allow() -> None:
    assert EngineArgs().longest(131_072) == 16_384  # half of the KV memory that there is anyway
    assert EngineArgs().kv_tokens(16_384) == EngineArgs().kv_tokens(4096) == 32_768
    assert EngineArgs().longest(8192) == 8192
    assert EngineArgs(max_num_seqs=1).longest(8192) == 4096
    assert EngineArgs(max_num_seqs=6).longest(8192) == 6144
    assert EngineArgs(kv_cache_tokens=512).longest(8192) == 512
    assert EngineArgs(max_model_len=700).longest(8192) == 700
    with pytest.raises(CapacityError, match="max_model_len=700 exceeds the KV memory of 512"):
        EngineArgs(max_model_len=700, kv_cache_tokens=512).longest(8192)


def test_memory_is_for_sixteen_requests_unless_asked_otherwise() -> None:
    assert EngineArgs().kv_tokens(4096) == 16 * 2048
    assert EngineArgs(max_num_seqs=1).kv_tokens(4096) == 4096
    assert EngineArgs(kv_cache_tokens=9000).kv_tokens(4096) == 9000


def test_what_changes_nothing_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    args = EngineArgs(
        model="m",
        tokenizer="m",
        dtype="auto",
        tensor_parallel_size=1,
        gpu_memory_utilization=0.3,
        swap_space=0,
        trust_remote_code=True,
        disable_log_stats=True,
        enable_chunked_prefill=True,
        compilation_config={"level": 3},
        runner="generate",
    )
    assert dtype_of(args.dtype) == dtype_of("bfloat16")
    assert not caplog.records
    assert dtype_of(EngineArgs(dtype="half").dtype) == dtype_of("bfloat16")
    assert "dtype='half' runs in bfloat16" in caplog.text


def test_none_leaves_an_option_at_its_default() -> None:
    """As vLLM's own defaults are; it turned prefix caching off, or ended in a traceback."""
    options = [each.name for each in fields(EngineArgs)]
    assert EngineArgs(**dict.fromkeys(options)) == EngineArgs()


def test_a_parser_gets_all_options() -> None:
    parser = EngineArgs.add_cli_args(argparse.ArgumentParser())
    assert EngineArgs(**vars(parser.parse_args([]))) == EngineArgs()
    line = ["--max-model-len", "9", "--no-enable-prefix-caching", "--swap-space", "2.5"]
    line += ["--speculative-config", '{"method": "ngram"}', "--model", "m"]
    parser.add_argument("--prompts")  # of the script
    assert EngineArgs.from_cli_args(parser.parse_args(line)) == EngineArgs(
        model="m",
        max_model_len=9,
        enable_prefix_caching=False,
        swap_space=2.5,
        speculative_config={"method": "ngram"},
    )
