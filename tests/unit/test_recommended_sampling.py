"""A GGUF file's `general.sampling.*` are its model's own sampling, as generation_config.json's."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from smart_decoding.errors import ConfigError
from smart_decoding.llm import LLM

from .test_loading import own_cache, write_gguf  # noqa: F401  # a cache for each test

FOUND = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.05}


def write(path: Path, **sampling: Any) -> Path:
    """A tiny model's file with these values, where llama.cpp's converter writes them."""
    write_gguf(path, "llama", words={f"sampling.{name}": value for name, value in sampling.items()})
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with all that SMART knows, and with some that it does not know."""
    known = {"temp": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "penalty_repeat": 1.05}
    return write(tmp_path / "tiny.gguf", **known, sequence="kpt", mirostat=2, xtc_threshold=0.1)


def defaults(file: Path, **options: Any) -> dict[str, Any]:
    sizes = {"max_model_len": 64, "max_num_seqs": 1, "allow_slow": True}
    return LLM(file, speculative_config=False, **sizes, **options).default_sampling_params


@pytest.mark.parametrize("quantization", [None, "off"])
def test_a_file_says_what_the_defaults_are(quantization: str | None, file: Path) -> None:
    assert defaults(file, quantization=quantization) == FOUND


def test_they_may_be_changed_or_left_out(file: Path, tmp_path: Path) -> None:
    warmer = {"temperature": 0.9}
    assert defaults(file, override_generation_config=warmer) == {**FOUND, **warmer}
    assert defaults(file, generation_config="vllm") == {}
    (tmp_path / "generation_config.json").write_text('{"top_k": 3}')
    assert defaults(file, generation_config=tmp_path) == {"top_k": 3}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("temp", math.nan, "temperature=nan is not allowed: it must be in [0, 2]"),
        ("temp", -1.0, "temperature=-1.0 is not allowed"),
        ("temp", "hot", "temperature='hot' is not allowed"),
        ("top_p", math.inf, "top_p=inf is not allowed"),
        ("top_k", 2.5, "top_k=2.5 is not allowed"),
        ("min_p", True, "min_p=True is not allowed"),
        ("penalty_repeat", 0.0, "repetition_penalty=0.0 is not allowed"),
    ],
)
def test_a_value_that_cannot_be_is_refused(
    name: str, value: Any, said: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "tiny.gguf", **{name: value})
    with pytest.raises(ConfigError, match=re.escape(said)) as found:
        defaults(file)
    assert str(found.value).startswith("general.sampling of the GGUF file: ")
    assert str(found.value).endswith("; generation_config='vllm' leaves it out")
    assert defaults(file, generation_config="vllm") == {}
